"""The variants that `benchmarks.generation` compares."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from generation.cpu_linear import quantize_weights, speed_up_decoding
from generation.decoding import CompiledDecoder, generate, one_step_ahead
from model import GPT, GPTConfig

SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_k": 50}


@dataclass(frozen=True)
class Variant:
    """One way to generate: `generate` continues int64 tokens (1, T) by a number of tokens."""

    name: str
    generate: Callable[[Tensor, int], None]
    batch_size: int = 1
    """sequences generated at a time"""

    def tokens_per_second(self, tokens: Tensor, new_tokens: int) -> float:
        """Measures one call, which reads the prompt too."""
        start = time.perf_counter()
        self.generate(tokens, new_tokens)
        return self.batch_size * new_tokens / (time.perf_counter() - start)


def build_variants(shape: GPTConfig, device: torch.device) -> list[Variant]:
    """Returns the variants for a device, all with the same random weights; `transformers` only if it is installed."""
    torch.manual_seed(0)
    model = GPT(shape).eval().to(device)
    half = copy.deepcopy(model).bfloat16()
    speed_up_decoding(half)
    reference = transformers_variant(shape, device)
    variants = [*([reference] if reference else []), our_variant("cache", model)]
    if device.type != "cpu":
        return [
            *variants,
            our_variant("bfloat16", half),
            our_variant("bfloat16, compiled", half, is_compiled=True),
            our_variant("bfloat16, batch of 8", half, batch_size=8),
        ]
    few_rows, int8 = copy.deepcopy(model), copy.deepcopy(model)
    speed_up_decoding(few_rows)
    quantize_weights(int8)
    return [
        *variants,
        our_variant("+ products for few rows", few_rows),
        our_variant("the same, batch of 8", few_rows, batch_size=8),
        our_variant("--dtype bfloat16", half),
        our_variant("--quantize int8", int8),
    ]


def our_variant(name: str, model: GPT, batch_size: int = 1, is_compiled: bool = False) -> Variant:
    """Returns a variant that generates with this project's code."""
    compiled = CompiledDecoder(model) if is_compiled else None

    def write(tokens: Tensor, new_tokens: int) -> None:
        options = {"num_samples": batch_size, "compiled": compiled, **SAMPLING}
        steps = generate(model, tokens, new_tokens, **options)
        for ids, *_ in one_step_ahead(steps) if tokens.is_cuda else steps:  # as `TextModel` does
            ids.tolist()  # wait for each token, as a program that streams does

    if is_compiled:
        write(torch.zeros(1, 8, dtype=torch.int64, device=model.wte.weight.device), 8)  # compiles
    return Variant(name, write, batch_size)


def transformers_variant(shape: GPTConfig, device: torch.device) -> Variant | None:
    """Returns the variant that generates with the library `transformers`, or None if it is not installed.

    Its model has the same shape, in float32 on the CPU and in bfloat16 elsewhere.
    """
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    names = ("vocab_size", "n_embd", "n_layer", "n_head")
    same = GPT2Config(n_positions=shape.block_size, **{name: getattr(shape, name) for name in names})
    reference = GPT2LMHeadModel(same).eval().to(device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    reference.generation_config.pad_token_id = reference.generation_config.eos_token_id = None

    def write(tokens: Tensor, new_tokens: int) -> None:
        options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": new_tokens, "do_sample": True}
        result = reference.generate(tokens, **options, **SAMPLING)
        assert result.size(1) == tokens.size(1) + new_tokens

    return Variant("transformers", write)


def read_bandwidth() -> float:
    """Returns the bytes per second that this machine reads, by the fastest dot product of 400 MB."""
    x = torch.ones(100_000_000)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        x.dot(x)
        times.append(time.perf_counter() - start)
    return x.nbytes / min(times)
