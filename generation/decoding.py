"""Tokens from a model: the KV cache, the decoding loop, and sampling."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from generation.config import SamplingConfig
from model import GPT, GPTConfig
from system.device import copy_to_host

Step = tuple[Tensor, Tensor, int]
"""New ids, int64 (N,); the model's logits (N, n_tokens) before penalty and temperature; the number of tokens that the
model saw."""


@torch.inference_mode()
def generate(
    model: GPT,
    tokens: Tensor,
    config: SamplingConfig,
    *,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    compiled: CompiledDecoder | None = None,
) -> Iterator[Step]:
    """Continues int64 tokens (B, T ≥ 1), each row `num_samples` times, so N = B * num_samples rows.

    Yields a step for each new token; `sample` chooses the ids. When the context is full, the window slides: the model
    reads the newer half of the context again, and decoding continues behind it. `use_cache=False` recomputes all
    positions for every token. `compiled` decodes single tokens with a compiled function.
    """
    block_size, penalty = model.config.block_size, config.repetition_penalty
    window = new = tokens[:, -block_size:]
    n_positions = min(block_size, window.size(1) + config.max_new_tokens)
    cache = KVCache(model.config, len(tokens), model.wte.weight, n_positions)
    occurred = occurring(tokens, model.config.n_tokens)
    for step in range(config.max_new_tokens):
        if window.size(1) > block_size:
            window = new = window[:, -max(1, block_size // 2) :]
            cache.length = 0
        n_context = window.size(1)
        if not use_cache:
            logits = next_token_logits(model, model.hidden(window))
        elif compiled and cache.length and new.size(1) == 1:
            logits = compiled.step(new, cache)
        else:
            logits = prefill(model, new, cache)
        if step == 0 and num_samples > 1:  # the prompt is read once for all its samples
            logits, window, occurred = (t.repeat_interleave(num_samples, dim=0) for t in (logits, window, occurred))
            cache.repeat(num_samples)
        if step == 0 and compiled:
            cache = compiled.take_over(cache)
        adjusted = logits if penalty == 1 else penalize(logits, occurred, penalty)
        new = sample(adjusted, config, generator)[:, None]  # (N, 1)
        occurred.scatter_(1, new, True)
        window = torch.cat((window, new), dim=1)
        yield new[:, 0], logits, n_context


def one_step_ahead(steps: Iterator[Step]) -> Iterator[Step]:
    """Yields what `generate` yields, with the ids on the host, while the GPU already computes the next step.

    The GPU need not wait for the host: each step takes its token from the GPU's memory. If the caller stops early, one
    step is wasted.
    """
    copied = ((*copy_to_host(ids), logits, n) for ids, logits, n in steps)
    step = next(copied, None)
    while step:
        next_step = next(copied, None)  # queues it on the GPU
        ids, wait_for_copy, logits, n_context = step
        wait_for_copy()
        yield ids, logits, n_context
        step = next_step


class KVCache:
    """The keys and values of B sequences: for every layer two buffers (B, nh, positions, hs), allocated once."""

    def __init__(self, config: GPTConfig, batch_size: int, like: Tensor, n_positions: int):
        """The buffers have the dtype and device of `like`."""
        shape = (batch_size, config.n_head, n_positions, config.n_embd // config.n_head)
        self.layers = [(like.new_empty(shape), like.new_empty(shape)) for _ in range(config.n_layer)]
        self.length = 0
        """positions in use"""

    def repeat(self, n: int) -> None:
        """Repeats every sequence `n` times."""
        self.layers = [(k.repeat_interleave(n, dim=0), v.repeat_interleave(n, dim=0)) for k, v in self.layers]


def prefill(model: GPT, tokens: Tensor, cache: KVCache) -> Tensor:
    """Reads int64 tokens (B, T) into an empty cache, or one token (B, 1) behind those in the cache.

    Returns the logits (B, n_tokens) of the next token.
    """
    past, cache.length = cache.length, cache.length + tokens.size(1)
    positions = torch.arange(past, cache.length, device=tokens.device)
    caches = [partial(attend, *layer, past) for layer in cache.layers]
    return next_token_logits(model, model.hidden(tokens, positions, caches))


def attend(keys: Tensor, values: Tensor, past: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Implements `model.CachedAttention` for one position behind the `past`, or for any number of positions from 0."""
    end = past + k.size(2)
    keys[:, :, past:end] = k
    values[:, :, past:end] = v
    # A single query sees every key.
    return F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], is_causal=past == 0)


def decode_one(model: GPT, token: Tensor, position: Tensor, cache: KVCache) -> Tensor:
    """Reads one token a row, int64 (B, 1), at `position`, int64 (1,); returns the logits (B, n_tokens) of the next.

    No shape and no address depends on the position, so one compiled function serves every step, and CUDA can replay it
    as a graph. The caller counts the cache's length.
    """
    n_positions = cache.layers[0][0].size(2)
    is_used = torch.arange(n_positions, device=position.device) <= position  # (positions,)
    caches = [partial(attend_at, *layer, position, is_used) for layer in cache.layers]
    return next_token_logits(model, model.hidden(token, position, caches))


def attend_at(
    keys: Tensor, values: Tensor, position: Tensor, is_used: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Implements `model.CachedAttention` for one position, int64 (1,), up to which `is_used`, bool (positions,), holds.

    The compiler makes kernels of these sums that read each key and each value once, in their own precision, and add in
    float32. `F.scaled_dot_product_attention` has fused kernels for many queries only. Without them, it copies
    half-precision keys and values to float32.
    """
    keys = keys.index_copy_(2, position, k)  # (B, nh, positions, hs)
    values = values.index_copy_(2, position, v)
    scores = (q.float() * keys).sum(dim=-1) / math.sqrt(q.size(-1))  # (B, nh, positions)
    weights = scores.masked_fill(~is_used, -math.inf).softmax(dim=-1)
    return (weights[..., None] * values).sum(dim=2, keepdim=True).to(q.dtype)  # (B, nh, 1, hs)


def next_token_logits(model: GPT, hidden: Tensor) -> Tensor:
    """Returns the logits (B, n_tokens) behind the last of the hidden states (B, T, C), without padding ids."""
    return model.lm_head(hidden[:, -1])[:, : model.config.n_tokens]


MAX_SIZES = 8
"""Numbers of rows for which a `CompiledDecoder` keeps a cache and a compiled function."""


@dataclass
class StaticStep:
    """A decoding step of N sequences, and what it reads and writes. A CUDA graph repeats the addresses of its capture,
    so these tensors are filled and never replaced."""

    decode_one: Callable[[GPT, Tensor, Tensor, KVCache], Tensor]
    cache: KVCache
    token: Tensor  # int64 (N, 1)
    position: Tensor  # int64 (1,)
    graph: torch.cuda.CUDAGraph | None = None
    logits: Tensor | None = None  # (N, n_tokens), written by the graph


class CompiledDecoder:
    """`decode_one`, compiled. On CUDA one launch replays the whole step as a graph.

    The first tokens of each number of rows wait for the compiler; the last few numbers are kept. A graph reads the
    weights where they lay when it was captured: make a new decoder after moving or converting the model.
    """

    def __init__(self, model: GPT):
        self.model = model
        # With this option, products with one row become reductions, which fuse with the GELU or the addition that
        # follows. They read a matrix at the full bandwidth only if their block sizes are tuned.
        self.options: dict[str, Any] = {"coordinate_descent_tuning": True} if model.ln_f.weight.is_cuda else {}
        self.static_steps: dict[int, StaticStep] = {}

    def compile(self) -> Callable[[GPT, Tensor, Tensor, KVCache], Tensor]:
        """Compiles a copy of `decode_one`: PyTorch limits how often one function is compiled, and frees nothing."""
        copy = types.FunctionType(decode_one.__code__.replace(), decode_one.__globals__)
        return torch.compile(copy, fullgraph=True, dynamic=False, options=self.options)

    def take_over(self, cache: KVCache) -> KVCache:
        """Copies a cache into the static one for its number of rows, and returns that one."""
        n, config = len(cache.layers[0][0]), self.model.config
        if n not in self.static_steps:
            static = KVCache(config, n, self.model.wte.weight, config.block_size)
            for _, values in static.layers:
                values.zero_()  # attention multiplies unused values by 0, so they must be finite
            token = torch.zeros(n, 1, dtype=torch.int64, device=self.model.wte.weight.device)
            if len(self.static_steps) == MAX_SIZES:
                del self.static_steps[next(iter(self.static_steps))]
            self.static_steps[n] = StaticStep(self.compile(), static, token, token.new_zeros(1))
        static, static.length = self.static_steps[n].cache, cache.length
        for mine, other in zip(static.layers, cache.layers, strict=True):
            for target, source in zip(mine, other, strict=True):
                target[:, :, : cache.length] = source[:, :, : cache.length]
        return static

    def step(self, token: Tensor, cache: KVCache) -> Tensor:
        """Reads one token a row, int64 (N, 1), behind a cache that `take_over` returned; returns the logits
        (N, n_tokens) of the next."""
        static = self.static_steps[len(token)]
        static.token.copy_(token)
        static.position.fill_(cache.length)
        cache.length += 1
        if static.graph and static.logits is not None:
            static.graph.replay()
            return static.logits.clone()  # the next replay overwrites them
        logits = static.decode_one(self.model, static.token, static.position, cache)
        if token.is_cuda:  # after the call above, which compiled and tuned: both are forbidden during a capture
            static.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(static.graph):  # records the kernels without running them
                static.logits = static.decode_one(self.model, static.token, static.position, cache)
        return logits


def occurring(tokens: Tensor, n_tokens: int) -> Tensor:
    """Returns which ids occur in each row of int64 tokens (B, T), bool (B, n_tokens)."""
    return tokens.new_zeros(len(tokens), n_tokens, dtype=torch.bool).scatter_(1, tokens, True)


def penalize(logits: Tensor, occurred: Tensor, penalty: float) -> Tensor:
    """Returns logits (B, n) that make ids which occurred, bool (B, n), less likely (CTRL, Keskar et al. 2019): positive
    logits are divided by the penalty, negative ones multiplied."""
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(occurred, penalized, logits)


def sample(logits: Tensor, config: SamplingConfig, generator: torch.Generator | None = None) -> Tensor:
    """Draws one id a row, int64 (B,), from logits (B, n), as `filtered_probabilities` says; greedily the likeliest."""
    if config.is_greedy:
        return logits.argmax(dim=-1)
    probabilities, ids = filtered_probabilities(logits, config)
    # The draw of torch.multinomial, which would make the host wait for a GPU.
    waiting_time = torch.empty_like(probabilities).exponential_(generator=generator).clamp_(min=1e-30)  # MPS draws 0
    choice = (probabilities / waiting_time).argmax(dim=-1, keepdim=True)  # (B, 1)
    return (choice if ids is None else ids.gather(-1, choice))[:, 0]


def filtered_probabilities(logits: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor | None]:
    """Returns the probabilities (B, m) of logits (B, n) among which `sample` draws, and the ids (B, m) that have them,
    or None if they are all ids in their order. A removed id has probability 0; the sum of a row may be below 1.

    The filters apply in this order: temperature, above 0; the `top_k` likeliest tokens (Fan et al. 2018); the smallest
    set of these whose probabilities reach `top_p` (nucleus sampling, Holtzman et al. 2019); of these the tokens with at
    least `min_p` times the probability of the likeliest (Nguyen et al. 2024).
    """
    logits, ids = logits.float() / config.temperature, None
    if config.top_k is not None and config.top_k < logits.size(-1):
        logits, ids = logits.topk(config.top_k, dim=-1)
    probabilities = logits.softmax(dim=-1)
    if config.top_p is not None and config.top_p < 1:
        if ids is None:
            probabilities, ids = _likeliest(probabilities, config.top_p)
        mass_before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(mass_before >= config.top_p, 0.0)  # always keeps the first
    if config.min_p:
        highest = probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < config.min_p * highest, 0.0)
    return probabilities, ids


def _likeliest(probabilities: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """Returns the largest of probabilities (B, n) in descending order, and their ids: enough to reach `mass`."""
    if probabilities.device.type == "cpu" and probabilities.size(-1) > 1024:  # a full sort is slow on the CPU
        values, ids = probabilities.topk(1024, dim=-1)
        if values.sum(dim=-1).min() > mass:
            return values, ids
    return probabilities.sort(dim=-1, descending=True)
