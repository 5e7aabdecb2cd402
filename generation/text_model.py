"""Text in, text out: a model with its tokenizer that completes texts and holds conversations, streaming."""

import codecs
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from generation.config import SamplingConfig
from generation.decoding import CompiledDecoder, generate, quantize_weights, speed_up_decoding
from model import GPT
from system.device import autocast, choose_device, choose_dtype
from system.errors import UserError
from text.templates import Message, encode_prompt
from text.tokenizer import Tokenizer
from weights import checkpoint
from weights.loading import load_checkpoint


@dataclass(frozen=True)
class Token:
    """A token that was written, with what the model thought of it before temperature and the like."""

    id: int
    logprob: float | None = None
    """natural logarithm of its probability"""
    candidates: tuple[tuple[int, float], ...] = ()
    """the likeliest ids there and their log-probabilities"""
    entropy: float | None = None
    """of the distribution there, in nats"""


@dataclass
class Sample:
    """One text written by a model: grows while it is being written."""

    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "length"
    """"length", "end" where the model ended it, or "stop" where a stop text came"""
    is_open: bool = True
    n_prompt: int = 0
    """tokens that it continues"""

    def extend(self, token: Token | None, writer: "TextWriter") -> str:
        """Adds what came at one step, None where the model ended the text; returns the text that is certain by then."""
        if token is None:
            self.finish_reason, self.is_open = "end", False
            return ""
        self.tokens.append(token)
        piece = writer.feed(token.id)
        self.text += piece
        if writer.stopped:
            self.finish_reason, self.is_open = "stop", False
        return piece


class TextWriter:
    """Turns token ids into text, piece by piece: whole UTF-8 characters only, and nothing from a stop text on; with
    `strip`, no white space at the beginning."""

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[str] = (), strip: bool = False):
        self.tokenizer, self.stops, self.strip = tokenizer, [stop for stop in stops if stop], strip
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held, self.stopped = "", False

    def feed(self, token: int) -> str:
        """Takes one token; returns the text that is certain by now, perhaps none."""
        return self._release(self.decoder.decode(self.tokenizer.decode_bytes([token])))

    def finish(self) -> str:
        """Returns the rest of the text."""
        rest = self._release(self.decoder.decode(b"", final=True)) + self.held
        return "" if self.stopped else rest

    def _release(self, piece):
        self.held += piece
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.held, self.stopped = self.held[: min(found)], True
        may_begin = max(
            (n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0
        )
        certain = len(self.held) if self.stopped else len(self.held) - may_begin
        piece, self.held = self.held[:certain], self.held[certain:]
        if self.strip:
            piece = piece.lstrip()
            self.strip = not piece
        return piece


@dataclass(frozen=True)
class TextModel:
    """A model ready to write: `TextModel.load("checkpoints/pretrained.pt")`."""

    model: GPT
    tokenizer: Tokenizer
    template: str | None
    """"chat" or "alpaca" for a fine-tuned model, None for one that completes text"""
    facts: str
    """what is known of the checkpoint, in a few words"""
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    compiled: CompiledDecoder | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        quantize: str = "none",
        verify: bool = False,
        compile: bool = False,
    ) -> "TextModel":
        """Loads a checkpoint. `quantize` "int8" makes it twice as fast on a CPU, and a little less exact; `verify`
        compares the file's checksums first; `compile` compiles the step of one token.

        Raises UserError where there is none, or no such device.
        """
        return cls.of(load_checkpoint(path, verify), path, device, dtype, quantize, compile)

    @classmethod
    def of(
        cls,
        state: dict,
        path: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        quantize: str = "none",
        compile: bool = False,
    ) -> "TextModel":
        """Makes a checkpoint that was read from `path` ready to write, as `load` does."""
        place = choose_device(device)
        precision = choose_dtype(dtype, place)
        if quantize == "int8" and (place.type != "cpu" or precision != torch.float32):
            raise UserError("--quantize int8 is for the CPU, in float32: --device cpu --dtype float32")
        model = checkpoint.build(state, path, place).to(precision)
        facts = f"{path}: {checkpoint.describe(state)}"
        if quantize == "int8":
            quantize_weights(model)
        else:
            speed_up_decoding(model)
        compiled = CompiledDecoder(model) if compile else None
        return cls(model, checkpoint.tokenizer_of(state), state.get("template"), facts, place, precision, compiled)

    def check(self, config: SamplingConfig) -> None:
        """Raises UserError for a config that does not fit the model."""
        if config.top_k is not None and config.top_k > self.tokenizer.n_tokens:
            raise UserError(f"--top-k {config.top_k} is more than the model's {self.tokenizer.n_tokens:,} tokens")

    def complete(self, prompt: str, config: SamplingConfig) -> Iterator[str]:
        """Continues a text; yields it in pieces of whole characters. An empty prompt begins a new document."""
        return self.stream(self.prompt_ids(prompt), config)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Returns the ids of a text to be continued: of an empty one, what stands before every document."""
        return self.tokenizer.encode(prompt) or [self.tokenizer.end_of_text]

    def answer(self, messages: list[Message], config: SamplingConfig, sample: Sample | None = None) -> Iterator[str]:
        """Answers a conversation that ends with the user's turn; the oldest exchanges give way to the context's length.

        What was written is recorded in `sample`, if given. Raises UserError where the model was not fine-tuned to
        answer.
        """
        return self.stream(self.answer_ids(messages, config), config, sample, strip=True)

    def answer_ids(self, messages: list[Message], config: SamplingConfig) -> list[int]:
        """Returns the ids of a conversation up to its answer, for which a quarter of the context is kept free."""
        self.check(config)
        if not self.template:
            raise UserError(
                "this model only completes text: fine-tune it first with train_sft.py, or leave --chat away"
            )
        block_size = self.model.config.block_size
        room = block_size - min(config.max_new_tokens, block_size // 4)
        return encode_prompt(messages, self.tokenizer, self.template, max_tokens=room)

    def stream(
        self,
        ids: list[int],
        config: SamplingConfig,
        sample: Sample | None = None,
        top: int | None = None,
        strip: bool = False,
    ) -> Iterator[str]:
        """Continues token ids until the model ends its text or a stop text comes; yields pieces of whole characters.

        What was written is recorded in `sample`, if given, with so many candidates a token as `top` says. With `strip`
        the text begins without white space, as an answer should.
        """
        sample = Sample() if sample is None else sample
        sample.n_prompt = len(ids)
        writer = TextWriter(self.tokenizer, config.stop, strip)
        for [token] in self.steps(ids, config, top=top):
            if piece := sample.extend(token, writer):
                yield piece
            if not sample.is_open:
                break
        if piece := writer.finish():
            sample.text += piece
            yield piece

    def samples(
        self, ids: list[int], config: SamplingConfig, n: int, top: int | None = None, strip: bool = False
    ) -> list[Sample]:
        """Continues token ids `n` times, as one batch; with `top`, log-probabilities and so many candidates a token."""
        samples = [Sample(n_prompt=len(ids)) for _ in range(n)]
        writers = [TextWriter(self.tokenizer, config.stop, strip) for _ in range(n)]
        for step in self.steps(ids, config, n, top):
            for sample, writer, token in zip(samples, writers, step, strict=True):
                if sample.is_open:
                    sample.extend(token, writer)
            if not any(sample.is_open for sample in samples):
                break
        for sample, writer in zip(samples, writers, strict=True):
            sample.text += writer.finish()
        return samples

    def steps(
        self, ids: list[int], config: SamplingConfig, n: int = 1, top: int | None = None
    ) -> Iterator[list[Token | None]]:
        """Continues token ids in `n` ways; yields at each step a token for each, None where the model ended its text.

        Any control token ends a text. With `top`, tokens carry log-probabilities and that many candidates.
        """
        generator = torch.Generator(self.device)
        generator.seed() if config.seed is None else generator.manual_seed(config.seed)
        self.check(config)
        stream = generate(
            self.model,
            torch.tensor([ids], dtype=torch.int64, device=self.device),
            config.max_new_tokens,
            num_samples=n,
            temperature=0.0 if config.greedy else config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            generator=generator,
            compiled=self.compiled,
        )
        is_open, first = [True] * n, True
        while any(is_open):
            with self._precision():
                found = next(stream, None)
            if found is None:
                return
            if first and not found[1].isfinite().all():
                raise UserError("what the model gives is not finite: its weights are damaged, or try --dtype float32")
            first, tokens = False, self._described(*found, top)
            is_open = [o and token.id < self.tokenizer.end_of_text for o, token in zip(is_open, tokens, strict=True)]
            yield [token if o else None for o, token in zip(is_open, tokens, strict=True)]

    def _precision(self):
        stored_so = self.model.wpe.weight.dtype == self.dtype
        return contextlib.nullcontext() if stored_so else autocast(self.device, self.dtype)

    def _described(self, ids, logits, top):
        if top is None:
            return [Token(i) for i in ids.tolist()]
        logprobs = logits.float().log_softmax(dim=-1)  # (n, n_tokens)
        values, candidates = logprobs.topk(min(top, logprobs.size(-1)), dim=-1)
        return [
            Token(i, logprob, tuple(zip(others, theirs, strict=True)), entropy)
            for i, logprob, others, theirs, entropy in zip(
                ids.tolist(),
                logprobs.gather(-1, ids[:, None])[:, 0].tolist(),
                candidates.tolist(),
                values.tolist(),
                torch.special.entr(logprobs.exp()).sum(dim=-1).tolist(),
                strict=True,
            )
        ]

    @torch.inference_mode()
    def score(self, ids: list[int], top: int) -> list[Token]:
        """Returns ids (at most as many as the context) as tokens, with what the model thought of each after those
        before it; of the first nothing is known."""
        tokens, rows = [Token(ids[0])], torch.tensor([ids], device=self.device)
        with self._precision():
            x = self.model.hidden(rows[:, :-1]) if len(ids) > 1 else None
            for start in range(0, len(ids) - 1, 128):  # the logits of a few positions at a time
                logits = self.model.lm_head(x[0, start : start + 128])[:, : self.tokenizer.n_tokens]
                tokens += self._described(rows[0, start + 1 : start + 1 + len(logits)], logits, top)
        return tokens


@dataclass
class Chat:
    """A conversation: what was said so far, and the model that answers."""

    text_model: TextModel
    config: SamplingConfig
    messages: list[Message] = field(default_factory=list)

    def reply(self, text: str, sample: Sample | None = None) -> Iterator[str]:
        """Answers one message in pieces; the exchange is kept, an answer that was broken off too."""
        asked, turn = {"role": "user", "content": text}, {"role": "assistant", "content": ""}
        pieces = self.text_model.answer([*self.messages, asked], self.config, sample)
        self.messages += [asked, turn]
        for piece in pieces:
            turn["content"] += piece
            yield piece

    def undo(self) -> str | None:
        """Takes back the last exchange; returns what the user had said, None where nothing was."""
        if not self.messages:
            return None
        self.messages.pop()
        return self.messages.pop()["content"]

    def reset(self) -> None:
        """Forgets the conversation."""
        self.messages.clear()
