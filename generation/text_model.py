"""Text in, text out: a model with its tokenizer that completes texts and holds conversations, streaming."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from generation.config import SamplingConfig
from generation.cpu_linear import quantize_weights, speed_up_decoding
from generation.decoding import (
    CompiledDecoder,
    filtered_probabilities,
    generate,
    next_token_logits,
    occurring,
    one_step_ahead,
    penalize,
)
from model import GPT
from system.device import autocast, choose_device, choose_dtype
from system.errors import UserError
from text.chat import Message, encode_prompt
from text.tokenizer import Tokenizer, unix_line_ends
from weights import checkpoint, describe
from weights.loading import load_checkpoint

CONFIDENCE_TOKENS = 8
"""The first tokens of an answer, whose probabilities say how sure the model is."""


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


class Sample:
    """One generated text. It grows with every token, by whole UTF-8 characters, and ends before a stop text."""

    def __init__(self, tokenizer: Tokenizer, n_prompt: int = 0, stops: Iterable[str] = (), strip: bool = False) -> None:
        """`n_prompt` is the number of tokens before the sample. With `strip`, it begins without white space."""
        self.tokenizer, self.n_prompt, self.strip = tokenizer, n_prompt, strip
        self.stops = [stop for stop in stops if stop]
        self.tokens: list[Token] = []
        self.text = self.piece = ""
        """the text so far, and what was added to it last"""
        self.finish_reason: Literal["length", "end", "stop"] = "length"
        """why the text ended: by its length, by the model's own end, or by a stop text"""
        self.is_finished = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pending = ""  # characters that may be the beginning of a stop text

    def add(self, token: Token) -> None:
        """Adds the next token. Any control token ends the text, and a finished text stays as it is."""
        self.piece = ""
        if self.is_finished:
            return
        if token.id >= self.tokenizer.end_of_text:
            self.finish_reason, self.is_finished = "end", True
            return
        self.tokens.append(token)
        text = self._pending + self._decoder.decode(self.tokenizer.decode_bytes([token.id]))
        starts = [text.index(stop) for stop in self.stops if stop in text]
        if starts:
            text, self._pending = text[: min(starts)], ""
            self.finish_reason, self.is_finished = "stop", True
        else:
            prefixes = (stop[:n] for stop in self.stops for n in range(1, len(stop)))
            certain = len(text) - max((len(prefix) for prefix in prefixes if text.endswith(prefix)), default=0)
            text, self._pending = text[:certain], text[certain:]
        self._append(text)

    def finish(self) -> None:
        """Adds what was held back: the beginning of a stop text that did not come, or of a character."""
        rest = "" if self.finish_reason == "stop" else self._pending + self._decoder.decode(b"", final=True)
        self._append(rest)
        self._pending, self.is_finished = "", True

    def _append(self, text: str) -> None:
        self.piece = text.lstrip() if self.strip and not self.text else text
        self.text += self.piece


@dataclass(frozen=True)
class TextModel:
    """A model that reads and writes text: `TextModel.load("checkpoints/pretrained.pt")`, or of a model in memory."""

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
    min_confidence: float = 0.0
    """below this `confidence`, an answer is a guess; 0 if fine-tuning measured none"""

    @classmethod
    def load(cls, path: str | Path, device: str = "auto", dtype: str = "auto", **options: Any) -> TextModel:
        """Reads a checkpoint of a language model, or a model of the Hub, for `from_checkpoint` with `options`. Raises
        UserError as that does, and if there is no such model."""
        return cls.from_checkpoint(load_checkpoint(path), path, device, dtype, **options)

    @classmethod
    def from_checkpoint(
        cls,
        state: checkpoint.Checkpoint,
        path: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        *,
        quantize: str = "none",
        convert_weights: bool = True,
        compile: bool = False,
        device_check: bool = True,
    ) -> TextModel:
        """Makes a checkpoint that was read from `path` ready to write.

        `quantize="int8"` stores the weights in 8 bits: on the CPU about twice as fast, and a little less exact.
        `convert_weights=False` keeps the weights in float32 and computes under autocast, as training does. `compile`
        compiles the decoding of one token. Raises UserError as `checkpoint.place` does, or for int8 on a GPU.
        """
        chosen = choose_device(device)
        if quantize == "int8" and (chosen.type != "cpu" or choose_dtype(dtype, chosen) != torch.float32):
            raise UserError("--quantize int8 works on the CPU in float32: add --device cpu --dtype float32")
        convert = convert_weights and quantize == "none"
        model, precision = checkpoint.place(state, device, dtype, device_check, convert)
        if quantize == "int8":
            quantize_weights(model)
        elif convert:
            speed_up_decoding(model)
        tokenizer, description = checkpoint.tokenizer_of(state), f"{path}: {describe.introduction(state)}"
        compiled = CompiledDecoder(model) if compile else None
        template, min_confidence = state.get("template"), float(state.get("min_confidence", 0))
        return cls(model, tokenizer, template, description, precision, compiled, min_confidence)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.ln_f.weight.device

    def prompt_ids(self, prompt: str) -> list[int]:
        """Returns the ids of a text to complete. An empty text becomes `<|endoftext|>`, which opens every document."""
        return self.tokenizer.encode(unix_line_ends(prompt)) or [self.tokenizer.end_of_text]

    def answer_ids(self, messages: list[Message], config: SamplingConfig) -> list[int]:
        """Returns the ids of a conversation up to its answer, with the oldest exchanges dropped if it is too long.

        At least a quarter of the context stays free for the answer, less if `max_new_tokens` is less. Raises UserError
        if the model was not fine-tuned to answer.
        """
        if not self.template:
            raise UserError("this model only completes text: fine-tune it with train_sft.py, or give it a --prompt")
        block_size = self.model.config.block_size
        max_tokens = block_size - min(config.max_new_tokens, block_size // 4)
        return encode_prompt(messages, self.tokenizer, self.template, max_tokens)

    def is_guess(self, answer: Sequence[Token]) -> bool:
        """Returns whether the model was unsure of an answer. Its tokens need log-probabilities."""
        return bool(self.min_confidence) and confidence(answer) < self.min_confidence

    def stream(
        self, ids: list[int], config: SamplingConfig, n: int = 1, top_logprobs: int | None = None, strip: bool = False
    ) -> Generator[list[Sample], None, None]:
        """Continues token ids `n` times, as one batch; yields the samples after every token, and once more at the end.

        With `top_logprobs`, tokens carry their log-probability, the entropy, and that many candidates. With `strip`,
        the texts begin without white space, as an answer should. Raises UserError if the logits are not finite.
        """
        samples = [Sample(self.tokenizer, len(ids), config.stop, strip) for _ in range(n)]
        generator = torch.Generator(self.device)
        if config.seed is None:
            generator.seed()
        else:
            generator.manual_seed(config.seed)
        tokens = torch.tensor([ids], dtype=torch.int64, device=self.device)
        steps = generate(self.model, tokens, config, num_samples=n, generator=generator, compiled=self.compiled)
        if self.device.type == "cuda":  # on other devices this would only delay the first token
            steps = one_step_ahead(steps)
        for i in range(config.max_new_tokens):
            with self.autocast():  # for one step at a time: between two steps the caller computes
                new_ids, logits, n_context = next(steps)  # (n,), (n, n_tokens)
            if i == 0 and not logits.isfinite().all():
                raise UserError("the logits are not finite: the weights are damaged, or need --dtype float32")
            new_tokens = self._tokens(new_ids, logits, top_logprobs, [n_context] * n)
            for sample, token in zip(samples, new_tokens, strict=True):
                sample.add(token)
            yield samples
            if all(sample.is_finished for sample in samples):
                break
        for sample in samples:
            sample.finish()
        yield samples

    def write(self, ids: list[int], config: SamplingConfig, strip: bool = False) -> str:
        """Returns the text that continues token ids; the parameters are those of `stream`."""
        *_, [sample] = self.stream(ids, config, strip=strip)
        return sample.text

    def samples(
        self, ids: list[int], config: SamplingConfig, n: int, top_logprobs: int | None = None, strip: bool = False
    ) -> Iterator[Sample]:
        """Yields `n` finished samples, as `stream` makes them, in batches that fit into memory.

        Each batch has a seed of its own. The batch size depends on the device alone, so a seed repeats all samples.
        """
        batch_size = self._samples_that_fit(len(ids), config, top_logprobs)
        for start in range(0, n, batch_size):
            if config.seed is not None and start > 0:
                config = dataclasses.replace(config, seed=(config.seed + 1) % 2**63)
            *_, batch = self.stream(ids, config, min(batch_size, n - start), top_logprobs, strip)
            yield from batch

    def _samples_that_fit(self, n_prompt: int, config: SamplingConfig, top_logprobs: int | None) -> int:
        """Returns the largest batch that fits into half of the memory beside a GPU's weights, elsewhere into 1 GiB."""
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

    @torch.inference_mode()
    def score(self, ids: list[int], top_logprobs: int) -> list[Token]:
        """Returns the tokens of a text, at most as long as the context, with their probabilities and candidates.

        The first token has none, since nothing comes before it.
        """
        tokens, rows = [Token(ids[0])], torch.tensor([ids], device=self.device)  # (1, T)
        if len(ids) == 1:
            return tokens
        with self.autocast():
            x = self.model.hidden(rows[:, :-1])  # (1, T - 1, C)
            for start in range(0, len(ids) - 1, 128):  # all logits at once would need much memory
                logits = self.model.lm_head(x[0, start : start + 128])[:, : self.tokenizer.n_tokens]
                contexts = range(start + 1, start + 1 + len(logits))
                tokens += self._tokens(rows[0, contexts.start : contexts.stop], logits, top_logprobs, contexts)
        return tokens

    @torch.inference_mode()
    def next_logits(self, ids: list[int]) -> Tensor:
        """Returns the logits of the token that follows ids, at most as many as the context: float32 (n_tokens,), on the
        CPU."""
        with self.autocast():
            hidden = self.model.hidden(torch.tensor([ids], device=self.device))  # (1, T, C)
            return next_token_logits(self.model, hidden)[0].float().cpu()

    def autocast(self) -> contextlib.AbstractContextManager:
        """Returns the context in which the model computes in its precision."""
        if self.model.ln_f.weight.dtype == self.dtype:
            return contextlib.nullcontext()
        return autocast(self.device, self.dtype)

    def _tokens(self, ids: Tensor, logits: Tensor, top_logprobs: int | None, n_contexts: Iterable[int]) -> list[Token]:
        """Returns ids (n,) as tokens that follow `n_contexts` tokens each, with what `logits` (n, n_tokens) say about
        them if `top_logprobs` is given."""
        if top_logprobs is None:
            return [Token(i, n_context=n) for i, n in zip(ids.tolist(), n_contexts, strict=True)]
        logprobs = logits.float().log_softmax(dim=-1)  # (n, n_tokens)
        top = logprobs.topk(min(top_logprobs, logprobs.size(-1)), dim=-1)  # (n, top_logprobs)
        columns = (
            ids.tolist(),
            logprobs.gather(-1, ids.to(logits.device)[:, None])[:, 0].tolist(),
            [tuple(zip(*pair, strict=True)) for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True)],
            torch.special.entr(logprobs.exp()).sum(dim=-1).tolist(),
            n_contexts,
        )
        return [Token(*row) for row in zip(*columns, strict=True)]


def confidence(answer: Sequence[Token]) -> float:
    """Returns the geometric mean of the probabilities of an answer's first tokens; later ones follow from them."""
    logprobs = [token.logprob for token in answer[:CONFIDENCE_TOKENS] if token.logprob is not None]
    return math.exp(sum(logprobs) / len(logprobs)) if logprobs else 0.0


def sampling_probabilities(logits: Tensor, ids: list[int], config: SamplingConfig) -> Tensor:
    """Returns the probabilities (n_tokens,) with which a config draws the token that follows `ids`: those of the logits
    (n_tokens,) after the repetition penalty, temperature and filters."""
    rows = penalize(logits[None], occurring(torch.tensor([ids]), len(logits)), config.repetition_penalty)
    if config.is_greedy:
        return torch.nn.functional.one_hot(rows[0].argmax(), len(logits)).float()
    probabilities, kept = filtered_probabilities(rows, config)
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

    def reply(self, text: str, top_logprobs: int | None = None) -> Generator[Sample, None, None]:
        """Answers a message; yields the answer after every token. `top_logprobs` is as in `TextModel.stream`.

        The conversation keeps the message and the answer, also if the generator is closed early.
        """
        question, answer = {"role": "user", "content": text}, {"role": "assistant", "content": ""}
        ids = self.text_model.answer_ids([*self.messages, question], self.config)
        if self.text_model.min_confidence:
            top_logprobs = top_logprobs or 0
        self.messages += [question, answer]
        for [sample] in self.text_model.stream(ids, self.config, top_logprobs=top_logprobs, strip=True):
            answer["content"] = sample.text
            yield sample

    def undo(self) -> str | None:
        """Takes back the last exchange. Returns the user's message, or None if the conversation is empty."""
        if not self.messages:
            return None
        self.messages.pop()
        return self.messages.pop()["content"]
