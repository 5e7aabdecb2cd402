"""Text in, text out: a model with its tokenizer that completes texts and holds conversations, streaming."""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

import checkpoint
from cli import SamplingConfig, UserError
from device import autocast, choose_device, choose_dtype
from model import GPT
from tokenizer import Message, Tokenizer, encode_prompt


@dataclass(frozen=True)
class TextModel:
    """A model ready to write."""

    model: GPT
    tokenizer: Tokenizer
    template: str | None
    """"chat" or "alpaca" for a fine-tuned model, None for one that completes text"""
    facts: str
    """what is known of the checkpoint, in a few words"""
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    @classmethod
    def load(cls, path: str | Path, device: str = "auto", dtype: str = "auto") -> "TextModel":
        """Loads a checkpoint. Raises UserError where there is none, or no such device."""
        state, place = checkpoint.load(path), choose_device(device)
        model = checkpoint.build(state, path, place)
        facts = f"{path}: {checkpoint.describe(state)}, {model.n_parameters() / 1e6:.1f}M parameters"
        return cls(model, checkpoint.tokenizer(state), state.get("template"), facts, place, choose_dtype(dtype, place))

    def complete(self, prompt: str, config: SamplingConfig) -> Iterator[str]:
        """Continues a text; yields it in pieces of whole characters. An empty prompt begins a new document."""
        return self.stream(self.tokenizer.encode(prompt) or [self.tokenizer.end_of_text], config)

    def answer(self, messages: list[Message], config: SamplingConfig) -> Iterator[str]:
        """Answers a conversation that ends with the user's turn; the oldest exchanges give way to the context's length.

        Raises UserError where the model was not fine-tuned to answer.
        """
        if not self.template:
            raise UserError(
                "this model only completes text: fine-tune it first with train_sft.py, or leave --chat away"
            )
        block_size = self.model.config.block_size
        room = block_size - min(config.max_new_tokens, block_size // 4)
        ids = encode_prompt(messages, self.tokenizer, self.template, max_tokens=room)
        first = True
        for piece in self.stream(ids, config):
            piece, first = (piece.lstrip() if first else piece), first and not piece.strip()
            if piece:
                yield piece

    def stream(self, ids: list[int], config: SamplingConfig) -> Iterator[str]:
        """Continues token ids until the model ends its text; yields pieces of whole UTF-8 characters."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in self.tokens(ids, config):
            if piece := decoder.decode(self.tokenizer.decode_bytes([token])):
                yield piece
        if piece := decoder.decode(b"", final=True):
            yield piece

    def tokens(self, ids: list[int], config: SamplingConfig) -> Iterator[int]:
        """Continues token ids until the model ends its text, which any control token does; yields token ids."""
        generator = torch.Generator(self.device)
        generator.seed() if config.seed is None else generator.manual_seed(config.seed)
        tokens = torch.tensor([ids], dtype=torch.int64, device=self.device)
        stream = self.model.generate(
            tokens,
            config.max_new_tokens,
            temperature=0.0 if config.greedy else config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            generator=generator,
        )
        while True:
            with autocast(self.device, self.dtype):
                token = next(stream, None)
            if token is None or token.item() >= self.tokenizer.end_of_text:
                return
            yield token.item()

    @torch.inference_mode()
    def token_probabilities(self, text: str, top: int = 5) -> list[dict]:
        """Returns what the model thought of each token of a text (of its end, where it is longer than the context).

        Keys: `token`, its `probability` after the tokens before it, and the `top` likeliest `candidates` there.
        """
        ids = [self.tokenizer.end_of_text, *self.tokenizer.encode(text)][-self.model.config.block_size :]
        with autocast(self.device, self.dtype):
            logits = self.model(torch.tensor([ids], device=self.device))[0, :-1, : self.tokenizer.n_tokens]
        probabilities = logits.float().softmax(dim=-1)  # (T - 1, n_tokens)
        likeliest = probabilities.topk(top, dim=-1)
        return [
            {
                "token": repr(self.tokenizer.decode([token]))[1:-1],
                "probability": probabilities[i, token].item(),
                "candidates": ", ".join(
                    f"{self.tokenizer.decode([other])!r} {p:.0%}"
                    for p, other in zip(likeliest.values[i].tolist(), likeliest.indices[i].tolist(), strict=True)
                ),
            }
            for i, token in enumerate(ids[1:])
        ]


@dataclass
class Chat:
    """A conversation: what was said so far, and the model that answers."""

    text_model: TextModel
    config: SamplingConfig
    messages: list[Message] = field(default_factory=list)

    def reply(self, text: str) -> Iterator[str]:
        """Answers one message in pieces; the exchange is kept, an answer that was broken off too."""
        self.messages.append({"role": "user", "content": text})
        answer = ""
        try:
            for piece in self.text_model.answer(self.messages, self.config):
                answer += piece
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": answer})

    def reset(self) -> None:
        """Forgets the conversation."""
        self.messages.clear()
