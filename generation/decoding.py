"""Tokens from a model: the KV cache, the decoding loop, and sampling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPT, GPTConfig


@torch.inference_mode()
def generate(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    compiled: CompiledDecoder | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Continues int64 tokens (B, T ≥ 1), each row `num_samples` times, so N = B * num_samples rows.

    Yields at each step the new ids, int64 (N,), and the model's logits (N, n_tokens) before temperature and the like.
    `sample` chooses the ids. Text longer than the context slides the window: the newer half of the context is read
    again, and decoding continues behind it. `use_cache=False` recomputes all positions for every token; tests compare
    with it. `compiled` decodes single tokens with a compiled function.
    """
    block_size = model.config.block_size
    window = new = tokens[:, -block_size:]
    cache = KVCache(model.config, len(tokens), model.wte.weight, min(block_size, window.size(1) + max_new_tokens))
    penalty = RepetitionPenalty(tokens, model.config.n_tokens, repetition_penalty) if repetition_penalty != 1 else None
    for step in range(max_new_tokens):
        if window.size(1) > block_size:
            window = new = window[:, -max(1, block_size // 2) :]
            cache.clear()
        if not use_cache:
            logits = next_token_logits(model, model.hidden(window))
        elif compiled and cache.length and new.size(1) == 1:
            logits = compiled.step(new, cache)
        else:
            logits = prefill(model, new, cache)
        if step == 0 and num_samples > 1:  # the prompt is read once for all its samples
            logits = logits.repeat_interleave(num_samples, dim=0)
            window = window.repeat_interleave(num_samples, dim=0)
            cache.repeat(num_samples)
            if penalty:
                penalty.repeat(num_samples)
        if step == 0 and compiled:
            cache = compiled.take_over(cache)
        adjusted = penalty.apply(logits) if penalty else logits
        new = sample(adjusted, temperature, top_k, top_p, min_p, generator)[:, None]  # (N, 1)
        if penalty:
            penalty.record(new)
        window = torch.cat((window, new), dim=1)
        yield new[:, 0], logits


def prefill(model: GPT, tokens: Tensor, cache: KVCache) -> Tensor:
    """Reads int64 tokens (B, T) behind what the cache holds; returns the logits (B, n_tokens) of the next token."""
    positions = torch.arange(cache.length, cache.length + tokens.size(1), device=tokens.device)
    return next_token_logits(model, model.hidden(tokens, positions, cache.layers))


def decode_one(model: GPT, token: Tensor, position: Tensor, cache: KVCache) -> Tensor:
    """Reads one token a row, int64 (B, 1), at `position`, int64 (1,); returns the logits (B, n_tokens) of the next.

    No shape and no address depends on the position, so one compiled function serves every step, and CUDA can replay it
    as a graph. The caller counts the cache's length.
    """
    n_positions = cache.layers[0].keys.size(2)
    mask = torch.arange(n_positions, device=position.device) <= position[:, None]  # (1, positions)
    caches = [CacheSlot(layer, position, mask) for layer in cache.layers]
    return next_token_logits(model, model.hidden(token, position, caches))


def next_token_logits(model: GPT, hidden: Tensor) -> Tensor:
    """Returns the logits (B, n_tokens) behind the last of the hidden states (B, T, C), without padding ids."""
    return model.lm_head(hidden[:, -1])[:, : model.config.n_tokens]


class LayerCache:
    """Keys and values of one layer, in buffers (B, nh, positions, hs) that are allocated once."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values, self.length = keys, values, 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Stores k and v (B, nh, T, hs) behind the past; see `model.AttentionCache`."""
        past, T = self.length, k.size(2)
        self.length = end = past + T
        self.keys[:, :, past:end] = k
        self.values[:, :, past:end] = v
        mask = torch.ones(T, end, dtype=torch.bool, device=k.device).tril(past) if past and T > 1 else None
        return self.keys[:, :, :end], self.values[:, :, :end], mask


@dataclass(frozen=True)
class CacheSlot:
    """One position of a layer's cache, given as a tensor so that no shape depends on it."""

    layer: LayerCache
    position: Tensor
    mask: Tensor

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stores k and v (B, nh, 1, hs); returns the whole buffers, and a mask of the positions in use."""
        self.layer.keys.index_copy_(2, self.position, k)
        self.layer.values.index_copy_(2, self.position, v)
        return self.layer.keys, self.layer.values, self.mask


class KVCache:
    """The keys and values of every layer for B sequences."""

    def __init__(self, config: GPTConfig, batch_size: int, like: Tensor, positions: int | None = None):
        """Allocates room for `positions`, by default for the whole context, with the dtype and device of `like`."""
        shape = (batch_size, config.n_head, positions or config.block_size, config.n_embd // config.n_head)
        self.layers = [LayerCache(like.new_empty(shape), like.new_empty(shape)) for _ in range(config.n_layer)]

    @property
    def length(self) -> int:
        """Number of positions in use."""
        return self.layers[0].length

    def clear(self) -> None:
        """Forgets all positions."""
        for layer in self.layers:
            layer.length = 0

    def advance(self) -> None:
        """Counts one more position."""
        for layer in self.layers:
            layer.length += 1

    def repeat(self, n: int) -> None:
        """Repeats every sequence `n` times."""
        for layer in self.layers:
            layer.keys = layer.keys.repeat_interleave(n, dim=0)
            layer.values = layer.values.repeat_interleave(n, dim=0)


class CompiledDecoder:
    """`decode_one`, compiled, over caches whose addresses never change; on CUDA the step is replayed as a graph.

    The first tokens wait for the compiler, and so do the first tokens of another number of rows.
    """

    def __init__(self, model: GPT):
        mode = "reduce-overhead" if model.wpe.weight.is_cuda else "default"
        self.model = model
        self.decode_one = torch.compile(decode_one, mode=mode, fullgraph=True, dynamic=False)
        self.caches: dict[int, KVCache] = {}

    def take_over(self, cache: KVCache) -> KVCache:
        """Copies a cache into the permanent one for its number of rows, and returns that one."""
        n = len(cache.layers[0].keys)
        if n not in self.caches:
            self.caches[n] = KVCache(self.model.config, n, self.model.wte.weight)
            for layer in self.caches[n].layers:
                layer.keys.zero_()  # attention multiplies masked values by 0, so they must be finite
                layer.values.zero_()
                torch._dynamo.mark_static_address(layer.keys)
                torch._dynamo.mark_static_address(layer.values)
        self.caches[n].clear()
        for mine, other in zip(self.caches[n].layers, cache.layers, strict=True):
            mine.append(other.keys[:, :, : other.length], other.values[:, :, : other.length])
        return self.caches[n]

    def step(self, token: Tensor, cache: KVCache) -> Tensor:
        """Reads one token a row, int64 (B, 1); returns the logits (B, n_tokens) of the next."""
        torch.compiler.cudagraph_mark_step_begin()  # the next replay overwrites the output of this one
        position = torch.full((1,), cache.length, device=token.device)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels are made for many queries
            logits = self.decode_one(self.model, token, position, cache).clone()
        cache.advance()
        return logits


class RepetitionPenalty:
    """Makes tokens that occurred less likely (CTRL, Keskar et al. 2019): divides their positive logits by a penalty and
    multiplies their negative ones."""

    def __init__(self, tokens: Tensor, n_tokens: int, penalty: float):
        """`tokens`, int64 (B, T), are those that occurred so far."""
        self.penalty = penalty
        self.occurred = tokens.new_zeros(len(tokens), n_tokens, dtype=torch.bool)
        self.record(tokens)

    def record(self, tokens: Tensor) -> None:
        """Counts int64 tokens (B, T) as occurred."""
        self.occurred.scatter_(1, tokens, True)

    def repeat(self, n: int) -> None:
        """Repeats every row `n` times."""
        self.occurred = self.occurred.repeat_interleave(n, dim=0)

    def apply(self, logits: Tensor) -> Tensor:
        """Returns the penalized logits (B, n_tokens)."""
        penalized = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return torch.where(self.occurred, penalized, logits)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws one id a row, int64 (B,), from logits (B, n). Temperature 0 takes the likeliest id.

    The filters apply in this order: temperature; the `top_k` likeliest tokens (Fan et al. 2018); the smallest set of
    these whose probabilities reach `top_p` (nucleus sampling, Holtzman et al. 2019); of these the tokens with at least
    `min_p` times the probability of the likeliest (Nguyen et al. 2024).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, ids = logits.float() / temperature, None
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k, dim=-1)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        if ids is None:
            probabilities, ids = _likeliest(probabilities, top_p)
        mass_before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(mass_before >= top_p, 0.0)  # always keeps the first
    if min_p is not None and min_p > 0:
        highest = probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < min_p * highest, 0.0)
    # The draw of torch.multinomial, which would make the host wait for a GPU.
    waiting_time = torch.empty_like(probabilities).exponential_(generator=generator)
    choice = (probabilities / waiting_time).argmax(dim=-1, keepdim=True)  # (B, 1)
    return (choice if ids is None else ids.gather(-1, choice))[:, 0]


def _likeliest(probabilities: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """Returns the largest of probabilities (B, n) in descending order, and their ids: enough to reach `mass`."""
    if probabilities.device.type == "cpu" and probabilities.size(-1) > 1024:  # a full sort is slow on the CPU
        values, ids = probabilities.topk(1024, dim=-1)
        if values.sum(dim=-1).min() > mass:
            return values, ids
    return probabilities.sort(dim=-1, descending=True)
