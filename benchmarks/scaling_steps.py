"""The formulas behind `benchmarks.scaling`: what a training step of a GPT-2 computes, exchanges and keeps on many GPUs.

Sizes come from the model itself, built on the meta device. Bytes are those that one process sends; it receives as many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import train
from model import GPT, GPTConfig

FLOAT32, BFLOAT16 = 4, 2
"""Bytes of a number."""
TOKEN = 2
"""Bytes of a token in a data file (uint16)."""
LOSS_CHUNK = 8192
"""Positions whose logits exist at a time, at most: `model.default_chunk_size`."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """A model and its run, in numbers."""

    layers: tuple[tuple[Shape, ...], ...]
    """shapes of the parameters of each layer"""
    rest: tuple[Shape, ...]
    """shapes of the parameters outside of the layers: embeddings, last LayerNorm, a head of its own"""
    config: GPTConfig
    flops_per_token: int
    """of one training step"""
    run_tokens: int = 0
    """tokens of the whole run"""
    run_batch: int = 0
    """tokens of one of its steps"""

    @classmethod
    def of(cls, model: GPT) -> Sizes:
        """Measures a model, which may be on the meta device."""
        in_layers = set(model.h.parameters())
        return cls(
            tuple(tuple(tuple(p.shape) for p in layer.parameters()) for layer in model.h),
            tuple(tuple(p.shape) for p in model.parameters() if p not in in_layers),
            model.config,
            model.flops_per_token(),
        )

    @classmethod
    def of_preset(cls, name: str) -> Sizes:
        """Builds the model of a preset of `train.py`, with GPT-2's vocabulary, and adds its run."""
        preset = train.PRESETS[name]
        with torch.device("meta"):
            sizes = cls.of(GPT(GPTConfig(**train.model_shape(preset))))
        batch = preset.batch_size * preset.block_size
        return cls(
            sizes.layers, sizes.rest, sizes.config, sizes.flops_per_token, preset.max_steps * batch, run_batch=batch
        )

    @property
    def n_parameters(self) -> int:
        """Number of parameters; a tied matrix counts once."""
        return sum(whole(group) for group in (*self.layers, self.rest))

    @property
    def n_in_layers(self) -> int:
        """Number of parameters in the layers."""
        return sum(map(whole, self.layers))


def whole(shapes: Sequence[Shape], n_slices: int = 1) -> int:
    """Returns how many numbers tensors hold. In slices, FSDP2 gives each process equally many rows, so it adds rows
    until their number divides by the processes."""
    return sum(math.ceil(rows / n_slices) * n_slices * math.prod(columns) for rows, *columns in shapes)


def ddp_bytes(sizes: Sizes, n: int) -> float:
    """Returns the bytes that each of `n` processes sends in a step of DDP.

    A ring all-reduce of the float32 gradients sends all of them twice, except for the process's own part: 2 (n - 1) / n
    (Patarasuk & Yuan 2009).
    """
    return 2 * (n - 1) / n * FLOAT32 * sizes.n_parameters


def fsdp_bytes(
    sizes: Sizes, n: int, micro_batches: int = 1, parameter: int = BFLOAT16, reduce_as_all_reduce: bool = False
) -> float:
    """Returns the bytes that each of `n` processes sends in a step of FSDP2, as `training/sharding.py` sets it up.

    Each micro-batch gathers the parameters of each layer twice, for the forward and the backward pass, those outside of
    the layers once, since they stay whole in between. The last one scatters the sum of all float32 gradients
    (Rajbhandari et al. 2019). Each of these sends (n - 1) / n of its tensor. `parameter` is the bytes of a gathered
    number. With `reduce_as_all_reduce`, the sum takes an all-reduce, as in PyTorch's gloo, and sends twice as much.
    """
    layers, rest = sum(whole(layer, n) for layer in sizes.layers), whole(sizes.rest, n)
    gathered = parameter * (2 * layers + rest)
    reduced = (2 if reduce_as_all_reduce else 1) * FLOAT32 * (layers + rest)
    return (n - 1) / n * (micro_batches * gathered + reduced)


def efficiency(compute: float, exchange: float) -> tuple[float, float]:
    """Returns the share of a step's time in which it computes: if no exchange is hidden behind computing, and if as
    much as possible is. Both arguments are seconds."""
    return compute / (compute + exchange), compute / max(compute, exchange)


def ddp_state(sizes: Sizes) -> int:
    """Returns the bytes that weights, gradients and AdamW's two means take in each process with DDP, all float32."""
    return 4 * FLOAT32 * sizes.n_parameters


def fsdp_state(sizes: Sizes, n: int, accumulates: bool = False) -> int:
    """Returns the bytes of the same with FSDP2: slices of all, and what is whole while a layer computes.

    Whole are this layer and the parameters outside of the layers, each as bfloat16 weights, bfloat16 gradients and
    their float32 copy that is reduced, and the bfloat16 weights of the next layer. A step that accumulates several
    micro-batches also keeps the whole float32 gradients.
    """
    layers, rest = [whole(shapes, n) for shapes in sizes.layers], whole(sizes.rest, n)
    layer, sliced = max(layers), (sum(layers) + rest) // n
    accumulated = FLOAT32 * (sum(layers) + rest) if accumulates else 0
    return accumulated + 4 * FLOAT32 * sliced + (2 * BFLOAT16 + FLOAT32) * (layer + rest) + BFLOAT16 * layer


def activation_bytes(sizes: Sizes) -> int:
    """Returns the bytes that the backward pass of one sequence needs: 16 bfloat16 numbers per position, layer and unit
    of width.

    These are the 34 bytes of Korthikanti et al. (2022) without the two masks of dropout; Flash attention keeps no
    matrix of attention weights.
    """
    config = sizes.config
    return 16 * BFLOAT16 * config.n_embd * config.n_layer * config.block_size


def loss_bytes(sizes: Sizes) -> int:
    """Returns the bytes of the largest chunk of logits: in bfloat16, and its softmax in float32."""
    return LOSS_CHUNK * sizes.config.vocab_size * (BFLOAT16 + FLOAT32)


def sequences_that_fit(sizes: Sizes, memory: float, state: float) -> int:
    """Returns how many sequences a GPU of so many bytes can hold beside `state`, in one micro-batch."""
    return max(0, int((memory - state - loss_bytes(sizes)) // activation_bytes(sizes)))


def critical_batch(sizes: Sizes) -> float:
    """Returns the critical batch size in tokens: with it, a run takes twice the steps of an endless batch, and twice
    the tokens of a tiny one (McCandlish et al. 2018).

    It grows as the loss falls (Kaplan et al. 2020, equation 1.4). The loss at the end of the run comes from the number
    of parameters in the layers and of tokens (their equation 1.5, with the values of table 2).
    """
    of_size, of_tokens = 0.076, 0.103
    loss = ((6.4e13 / sizes.n_in_layers) ** (of_size / of_tokens) + 1.8e13 / sizes.run_tokens) ** of_tokens
    return 2e8 / loss ** (1 / 0.21)


def tokens_needed(sizes: Sizes, batch: float) -> float:
    """Returns how many tokens reach the loss of the preset's run with another batch, in tokens: in proportion to
    1 + batch / critical batch (McCandlish et al. 2018, equation 2.11)."""
    critical = critical_batch(sizes)
    return sizes.run_tokens * (1 + batch / critical) / (1 + sizes.run_batch / critical)


def cheapest_batch(sizes: Sizes, n: int, flops: float, exchange: float) -> int:
    """Returns the batch in sequences that reaches a loss in the least time, if no exchange is hidden.

    A run takes tokens_needed / batch steps of batch * flops_per_token / (n * flops) + exchange seconds. This has its
    minimum at the root of exchange * n * flops * critical batch / flops_per_token. The batch is a multiple of the
    processes, from one sequence each to the critical batch.
    """
    tokens = math.sqrt(exchange * n * flops * critical_batch(sizes) / sizes.flops_per_token)
    return n * min(largest_share(sizes, n), max(1, round(tokens / n / sizes.config.block_size)))


def largest_share(sizes: Sizes, n: int) -> int:
    """Returns the sequences of each process in the largest sensible batch, the critical one; at least 1."""
    return max(1, int(critical_batch(sizes) // (n * sizes.config.block_size)))
