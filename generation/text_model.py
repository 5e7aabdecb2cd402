"""Text in, text out: a model with its tokenizer that completes texts and holds conversations, streaming."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from generation.config import SamplingConfig
from generation.cpu_linear import quantize_weights, speed_up_decoding
from generation.decoding import (
    CompiledDecoder,
    RepetitionPenalty,
    filtered_probabilities,
    generate,
    next_token_logits,
    one_step_ahead,
)
from generation.lens import LayerPredictions, Trace, predictions_by_layer, trace
from model import GPT
from system.device import autocast, choose_device, choose_dtype
from system.errors import UserError
from text.chat import Message, encode_prompt
from text.tokenizer import Tokenizer, unix_line_ends
from weights import checkpoint
from weights.loading import load_checkpoint


@dataclass(frozen=True)
class Token:
    """A token of a text. Its probabilities are those of the model, before temperature, top-k and the like."""

    id: int
    logprob: float | None = None
    """natural logarithm of the token's probability"""
    candidates: tuple[tuple[int, float], ...] = ()
    """the likeliest ids at this position and their log-probabilities"""
    entropy: float | None = None
    """of the distribution at this position, in nats"""
    n_context: int = 0
    """tokens before this one that the model saw"""


@dataclass
class Sample:
    """One generated text. It grows during the generation."""

    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    finish_reason: Literal["length", "end", "stop"] = "length"
    """why the text ended: by its length, by the model's own end, or by a stop text"""
    is_finished: bool = False
    """whether the model or a stop text ended the text"""
    n_prompt: int = 0
    """number of tokens before the sample"""

    def append(self, token: Token | None, writer: TextWriter) -> str:
        """Adds the next token, None if the model ended the text. Returns the characters that it completes."""
        if token is None:
            self.finish_reason, self.is_finished = "end", True
            return ""
        self.tokens.append(token)
        piece = writer.feed(token.id)
        self.text += piece
        if writer.stopped:
            self.finish_reason, self.is_finished = "stop", True
        return piece


class TextWriter:
    """Decodes a stream of token ids into text: whole UTF-8 characters only, and nothing from a stop text on.

    With `strip`, the text begins without white space.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[str] = (), strip: bool = False) -> None:
        self.tokenizer, self.stops, self.strip = tokenizer, [stop for stop in stops if stop], strip
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.pending = ""  # characters that may be the beginning of a stop text
        self.stopped = False

    def feed(self, token: int) -> str:
        """Takes the next token. Returns the text that is certain now, often none."""
        return self._release(self.decoder.decode(self.tokenizer.decode_bytes([token])))

    def finish(self) -> str:
        """Returns the rest of the text."""
        if self.stopped:
            return ""
        return self._release(self.decoder.decode(b"", final=True)) + self.pending

    def _release(self, characters: str) -> str:
        """Adds characters to the pending ones. Returns those that cannot belong to a stop text."""
        text = self.pending + characters
        starts = [text.index(stop) for stop in self.stops if stop in text]
        if starts:
            text, self.pending, self.stopped = text[: min(starts)], "", True
        else:
            prefixes = (stop[:n] for stop in self.stops for n in range(1, len(stop)))
            certain = len(text) - max((len(prefix) for prefix in prefixes if text.endswith(prefix)), default=0)
            text, self.pending = text[:certain], text[certain:]
        if self.strip:
            text = text.lstrip()
            self.strip = not text
        return text


@dataclass(frozen=True)
class TextModel:
    """A model that reads and writes text: `TextModel.load("checkpoints/pretrained.pt")`.

    A model that is already in memory becomes one with `TextModel(model, tokenizer)`.
    """

    model: GPT
    tokenizer: Tokenizer
    template: str | None = None
    """template of a fine-tuned model, "chat" or "alpaca"; None for a model that only completes text"""
    description: str = ""
    """the checkpoint's path and main facts, in one line"""
    dtype: torch.dtype = torch.float32
    """precision of the computation; if the weights have another, under autocast"""
    compiled: CompiledDecoder | None = None
    """decodes single tokens with a compiled function"""

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        *,
        quantize: str = "none",
        verify: bool = False,
        convert_weights: bool = True,
        compile: bool = False,
    ) -> TextModel:
        """Reads a checkpoint of a language model, or a model of the Hub, and makes it ready to write.

        `verify` compares the file's checksums first; `from_checkpoint` explains the other parameters. Raises UserError
        if the file is missing, damaged or a classifier, or if the device does not exist.
        """
        return cls.from_checkpoint(
            load_checkpoint(path, verify),
            path,
            device,
            dtype,
            quantize=quantize,
            convert_weights=convert_weights,
            compile=compile,
        )

    @classmethod
    def from_checkpoint(
        cls,
        state: dict,
        path: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        *,
        quantize: str = "none",
        convert_weights: bool = True,
        compile: bool = False,
    ) -> TextModel:
        """Makes a checkpoint that was read from `path` ready to write.

        `quantize="int8"` stores the weights in 8 bits: on the CPU about twice as fast, and a little less exact.
        `convert_weights=False` keeps the weights in float32 and computes under autocast, as training does. `compile`
        compiles the decoding of one token. Raises UserError if the device does not exist, the weights do not fit, or
        int8 is asked for on another device.
        """
        torch_device = choose_device(device)
        torch_dtype = choose_dtype(dtype, torch_device)
        if quantize == "int8" and (torch_device.type != "cpu" or torch_dtype != torch.float32):
            raise UserError("--quantize int8 works on the CPU in float32: add --device cpu --dtype float32")
        model = checkpoint.build(state, torch_device)
        if quantize == "int8":
            quantize_weights(model)
        elif convert_weights:
            speed_up_decoding(model.to(torch_dtype))
        description = f"{path}: {checkpoint.describe(state)}"
        compiled = CompiledDecoder(model) if compile else None
        tokenizer = checkpoint.tokenizer_of(state)
        return cls(model, tokenizer, state.get("template"), description, torch_dtype, compiled)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.ln_f.weight.device

    def check(self, config: SamplingConfig) -> None:
        """Raises UserError if a sampling config does not fit the model."""
        if config.top_k is not None and config.top_k > self.tokenizer.n_tokens:
            raise UserError(
                f"--top-k {config.top_k} is more than the model's {self.tokenizer.n_tokens:,} tokens: lower it"
            )

    def prompt_ids(self, prompt: str) -> list[int]:
        """Returns the ids of a text to complete. An empty text becomes `<|endoftext|>`, which opens every document."""
        return self.tokenizer.encode(unix_line_ends(prompt)) or [self.tokenizer.end_of_text]

    def complete(self, prompt: str, config: SamplingConfig) -> Generator[str, None, None]:
        """Continues a text; yields pieces of whole characters. An empty prompt begins a new document."""
        return self.stream(self.prompt_ids(prompt), config)

    def answer_ids(self, messages: list[Message], config: SamplingConfig) -> list[int]:
        """Returns the ids of a conversation up to its answer, with the oldest exchanges dropped if it is too long.

        At least a quarter of the context stays free for the answer, less if `max_new_tokens` is less. Raises UserError
        if the model was not fine-tuned to answer.
        """
        self.check(config)
        if not self.template:
            raise UserError("this model only completes text: fine-tune it with train_sft.py, or give it a --prompt")
        block_size = self.model.config.block_size
        max_tokens = block_size - min(config.max_new_tokens, block_size // 4)
        return encode_prompt(messages, self.tokenizer, self.template, max_tokens)

    def answer(
        self,
        messages: list[Message],
        config: SamplingConfig,
        sample: Sample | None = None,
        top_logprobs: int | None = None,
    ) -> Generator[str, None, None]:
        """Answers a conversation that ends with the user's turn; yields pieces of whole characters.

        Records the answer in `sample`, if given; `top_logprobs` is as in `steps`. Raises UserError if the model was not
        fine-tuned to answer.
        """
        return self.stream(self.answer_ids(messages, config), config, sample, top_logprobs, strip=True)

    def stream(
        self,
        ids: list[int],
        config: SamplingConfig,
        sample: Sample | None = None,
        top_logprobs: int | None = None,
        strip: bool = False,
    ) -> Generator[str, None, None]:
        """Continues token ids until the model or a stop text ends the text; yields pieces of whole characters.

        Records the text in `sample`, if given; `top_logprobs` is as in `steps`. With `strip`, the text begins without
        white space, as an answer should.
        """
        sample = Sample() if sample is None else sample
        sample.n_prompt = len(ids)
        writer = TextWriter(self.tokenizer, config.stop, strip)
        for [token] in self.steps(ids, config, top_logprobs=top_logprobs):
            if piece := sample.append(token, writer):
                yield piece
            if sample.is_finished:
                break
        if piece := writer.finish():
            sample.text += piece
            yield piece

    def samples(
        self,
        ids: list[int],
        config: SamplingConfig,
        n: int,
        top_logprobs: int | None = None,
        strip: bool = False,
    ) -> list[Sample]:
        """Continues token ids `n` times, as one batch. The other parameters are those of `stream`.

        The batch must fit into memory: see `samples_in_batches`.
        """
        samples = [Sample(n_prompt=len(ids)) for _ in range(n)]
        writers = [TextWriter(self.tokenizer, config.stop, strip) for _ in range(n)]
        for step in self.steps(ids, config, n, top_logprobs):
            for sample, writer, token in zip(samples, writers, step, strict=True):
                if not sample.is_finished:
                    sample.append(token, writer)
            if all(sample.is_finished for sample in samples):
                break
        for sample, writer in zip(samples, writers, strict=True):
            sample.text += writer.finish()
        return samples

    def samples_in_batches(
        self, ids: list[int], config: SamplingConfig, n: int, top_logprobs: int | None = None, strip: bool = False
    ) -> Iterator[Sample]:
        """Yields `n` samples, as `samples` does, in batches whose memory is bounded.

        With a seed, each batch draws from another one, so the batch size is the same in each run on a device.
        """
        batch_size = self.samples_that_fit(len(ids), config, top_logprobs)
        for start in range(0, n, batch_size):
            if config.seed is not None and start > 0:
                config = dataclasses.replace(config, seed=(config.seed + 1) % 2**63)
            yield from self.samples(ids, config, min(batch_size, n - start), top_logprobs, strip)

    def samples_that_fit(self, n_prompt: int, config: SamplingConfig, top_logprobs: int | None) -> int:
        """Returns how many samples fit as one batch into half of what the weights leave of a GPU, or into 1 GiB."""
        shape, weight = self.model.config, self.model.wte.weight
        positions = min(shape.block_size, n_prompt + config.max_new_tokens)
        cache = 2 * shape.n_layer * shape.n_embd * positions * weight.element_size()
        logits = 32 * self.tokenizer.n_tokens  # with the copies that sampling makes, up to eight in float32
        tokens = 100 * config.max_new_tokens * (1 + (top_logprobs or 0))  # as Python's objects
        budget = 2**30
        if self.device.type == "cuda":
            weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
            budget = (torch.cuda.get_device_properties(self.device).total_memory - weights) // 2
        return max(1, budget // (cache + logits + tokens))

    def steps(
        self, ids: list[int], config: SamplingConfig, n: int = 1, top_logprobs: int | None = None
    ) -> Iterator[list[Token | None]]:
        """Continues token ids `n` times; yields the next token of each at every step, None once the model ended a text.

        Any control token ends a text. With `top_logprobs`, tokens carry their log-probability, the entropy, and that
        many candidates. Raises UserError if the config does not fit the model, or the logits are not finite.
        """
        self.check(config)
        generator = torch.Generator(self.device)
        if config.seed is None:
            generator.seed()
        else:
            generator.manual_seed(config.seed)
        generated = generate(
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
        if self.device.type == "cuda":  # on other devices this would only delay the first token
            generated = one_step_ahead(generated)
        ended, is_first = [False] * n, True
        block_size = self.model.config.block_size
        n_context = min(len(ids), block_size)
        while not all(ended):
            with self._autocast():  # for one step at a time: between two steps the caller computes
                step = next(generated, None)
            if step is None:
                return
            new_ids, logits = step  # (n,), (n, n_tokens)
            if is_first and not logits.isfinite().all():
                raise UserError("the logits are not finite: the weights are damaged, or need --dtype float32")
            is_first = False
            if n_context > block_size:  # here `generate` slides the window
                n_context = max(1, block_size // 2)
            tokens = self._tokens(new_ids, logits, top_logprobs, [n_context] * n)
            n_context += 1
            ended = [e or token.id >= self.tokenizer.end_of_text for e, token in zip(ended, tokens, strict=True)]
            yield [None if e else token for e, token in zip(ended, tokens, strict=True)]

    @torch.inference_mode()
    def score(self, ids: list[int], top_logprobs: int) -> list[Token]:
        """Returns the tokens of a text, at most as long as the context, with their probabilities and candidates.

        The first token has none, since nothing comes before it.
        """
        tokens = [Token(ids[0])]
        if len(ids) == 1:
            return tokens
        rows = torch.tensor([ids], device=self.device)  # (1, T)
        with self._autocast():
            x = self.model.hidden(rows[:, :-1])  # (1, T - 1, C)
            for start in range(0, len(ids) - 1, 128):  # all logits at once would need much memory
                logits = self.model.lm_head(x[0, start : start + 128])[:, : self.tokenizer.n_tokens]
                next_ids = rows[0, start + 1 : start + 1 + len(logits)]
                n_contexts = range(start + 1, start + 1 + len(logits))
                tokens += self._tokens(next_ids, logits, top_logprobs, n_contexts)
        return tokens

    @torch.inference_mode()
    def next_logits(self, ids: list[int]) -> Tensor:
        """Returns the logits of the token that follows ids, at most as many as the context: float32 (n_tokens,), on the
        CPU."""
        with self._autocast():
            hidden = self.model.hidden(torch.tensor([ids], device=self.device))  # (1, T, C)
            return next_token_logits(self.model, hidden)[0].float().cpu()

    def trace(self, text: str, max_tokens: int | None = None) -> Trace:
        """Returns the attention weights and the residual stream of a text's last tokens: those that fit into the
        context, or at most `max_tokens`. `generation/lens.py` says what they are. Raises UserError for an empty text.
        """
        limit = min(max_tokens or self.model.config.block_size, self.model.config.block_size)
        ids = self.tokenizer.encode(text)[-limit:]
        if not ids:
            raise UserError("the text is empty: there is nothing to look into")
        with self._autocast():
            return trace(self.model, torch.tensor(ids, device=self.device))

    def predictions_by_layer(self, trace: Trace, k: int = 10) -> LayerPredictions:
        """Returns what the model would say after each layer: the `k` likeliest next tokens at every position."""
        with self._autocast():
            return predictions_by_layer(self.model, trace, k)

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.model.ln_f.weight.dtype == self.dtype:
            return contextlib.nullcontext()
        return autocast(self.device, self.dtype)

    def _tokens(self, ids: Tensor, logits: Tensor, top_logprobs: int | None, n_contexts: Iterable[int]) -> list[Token]:
        """Returns ids (n,) as tokens that follow `n_contexts` tokens each, with what `logits` (n, n_tokens) say about
        them if `top_logprobs` is given."""
        if top_logprobs is None:
            return [Token(i, n_context=n) for i, n in zip(ids.tolist(), n_contexts, strict=True)]
        logprobs = logits.float().log_softmax(dim=-1)  # (n, n_tokens)
        entropies = torch.special.entr(logprobs.exp()).sum(dim=-1)  # (n,)
        top = logprobs.topk(min(top_logprobs, logprobs.size(-1)), dim=-1)  # (n, top_logprobs)
        return [
            Token(i, logprob, tuple(zip(candidates, candidate_logprobs, strict=True)), entropy, n_context)
            for i, logprob, candidates, candidate_logprobs, entropy, n_context in zip(
                ids.tolist(),
                logprobs.gather(-1, ids.to(logits.device)[:, None])[:, 0].tolist(),
                top.indices.tolist(),
                top.values.tolist(),
                entropies.tolist(),
                n_contexts,
                strict=True,
            )
        ]


def sampling_probabilities(logits: Tensor, ids: list[int], config: SamplingConfig) -> Tensor:
    """Returns the probabilities (n_tokens,) with which a config draws the token that follows `ids`: those of the logits
    (n_tokens,) after the repetition penalty, temperature and filters."""
    rows = logits[None]
    if config.repetition_penalty != 1:
        rows = RepetitionPenalty(torch.tensor([ids]), len(logits), config.repetition_penalty).apply(rows)
    if config.greedy or config.temperature == 0:
        return torch.nn.functional.one_hot(rows[0].argmax(), len(logits)).float()
    probabilities, kept = filtered_probabilities(rows, config.temperature, config.top_k, config.top_p, config.min_p)
    if kept is not None:
        probabilities = probabilities.new_zeros(rows.shape).scatter_(1, kept, probabilities)
    return probabilities[0] / probabilities.sum()


@dataclass
class Chat:
    """A conversation with a model."""

    text_model: TextModel
    config: SamplingConfig
    messages: list[Message] = field(default_factory=list)
    """what was said so far; user and assistant take turns"""

    def reply(
        self, text: str, sample: Sample | None = None, top_logprobs: int | None = None
    ) -> Generator[str, None, None]:
        """Answers a message; yields pieces of whole characters.

        The conversation keeps the message and the answer, also if the generator is closed early. Records the answer
        in `sample`, if given; `top_logprobs` is as in `TextModel.steps`.
        """
        question, answer = {"role": "user", "content": text}, {"role": "assistant", "content": ""}
        pieces = self.text_model.answer([*self.messages, question], self.config, sample, top_logprobs)
        self.messages += [question, answer]
        for piece in pieces:
            answer["content"] += piece
            yield piece

    def undo(self) -> str | None:
        """Takes back the last exchange. Returns the user's message, or None if the conversation is empty."""
        if not self.messages:
            return None
        self.messages.pop()
        return self.messages.pop()["content"]

    def reset(self) -> None:
        """Clears the conversation."""
        self.messages.clear()
