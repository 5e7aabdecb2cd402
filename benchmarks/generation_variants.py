"""The variants that `benchmarks.generation` compares, and their measurement."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from generation.cpu_linear import quantize_weights, speed_up_decoding
from generation.decoding import CompiledDecoder, generate, one_step_ahead
from model import GPT, GPTConfig

TEMPERATURE, TOP_K = 0.8, 50


@dataclass(frozen=True)
class Variant:
    """One way to generate: `generate` continues int64 tokens (1, T) by a number of tokens."""

    name: str
    generate: Callable[[Tensor, int], None]
    batch_size: int = 1
    """sequences generated at a time"""
    max_new_tokens: int | None = None
    """limit for a slow variant"""

    def tokens_per_second(self, tokens: Tensor, new_tokens: int) -> float:
        """Measures one call, which reads the prompt too."""
        new_tokens = min(new_tokens, self.max_new_tokens or new_tokens)
        start = time.perf_counter()
        self.generate(tokens, new_tokens)
        return self.batch_size * new_tokens / (time.perf_counter() - start)


def measure(
    shape: GPTConfig, device: torch.device, prompts: tuple[int, ...], new_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """Returns a row for each variant and each prompt: median tokens/s, and the median ratio to `transformers`.

    The ratio is None if `transformers` is not installed.
    """
    variants, rows = build_variants(shape, device), []
    for prompt in prompts:
        speeds: dict[str, list[float]] = {variant.name: [] for variant in variants}
        for _ in range(rounds):
            for variant in variants:
                tokens = torch.randint(shape.n_tokens, (1, prompt), device=device)
                speeds[variant.name].append(variant.tokens_per_second(tokens, new_tokens))
        reference = speeds.get("transformers")
        for name, measured in speeds.items():
            ratio = None
            if reference:
                ratio = statistics.median(a / b for a, b in zip(measured, reference, strict=True))
            median = statistics.median(measured)
            rows.append({"name": name, "prompt": prompt, "tokens_per_second": median, "ratio": ratio})
    return rows


def build_variants(shape: GPTConfig, device: torch.device) -> list[Variant]:
    """Returns the variants for a device, all with the same random weights."""
    torch.manual_seed(0)
    model = GPT(shape).eval().to(device)
    half = copy.deepcopy(model).bfloat16()
    speed_up_decoding(half)
    variants = [our_variant("no cache, as nanoGPT", model, use_cache=False, max_new_tokens=8)]
    if reference := transformers_variant(model, device):
        variants.append(reference)
    if device.type != "cpu":
        return [
            *variants,
            our_variant("float32", model),
            our_variant("bfloat16", half),
            our_variant("bfloat16, compiled", half, is_compiled=True),
            our_variant("bfloat16, batch of 8", half, batch_size=8),
        ]
    few_rows, int8 = copy.deepcopy(model), copy.deepcopy(model)
    speed_up_decoding(few_rows)
    quantize_weights(int8)
    return [
        *variants,
        our_variant("cache", model),
        our_variant("+ products for few rows", few_rows),
        our_variant("the same, batch of 8", few_rows, batch_size=8),
        our_variant("--dtype bfloat16", half),
        our_variant("--quantize int8", int8),
    ]


def our_variant(
    name: str,
    model: GPT,
    batch_size: int = 1,
    use_cache: bool = True,
    is_compiled: bool = False,
    max_new_tokens: int | None = None,
) -> Variant:
    """Returns a variant that generates with this project's code."""
    compiled = CompiledDecoder(model) if is_compiled else None

    def generate_text(tokens: Tensor, new_tokens: int) -> None:
        steps = generate(
            model,
            tokens,
            new_tokens,
            num_samples=batch_size,
            temperature=TEMPERATURE,
            top_k=TOP_K,
            use_cache=use_cache,
            compiled=compiled,
        )
        if tokens.is_cuda:
            steps = one_step_ahead(steps)  # as `TextModel` does
        for ids, _ in steps:
            ids.tolist()  # wait for each token, as a program that streams does

    variant = Variant(name, generate_text, batch_size, max_new_tokens)
    if is_compiled:
        variant.generate(torch.zeros(1, 8, dtype=torch.int64, device=model.wte.weight.device), 8)  # compiles
    return variant


def transformers_variant(model: GPT, device: torch.device) -> Variant | None:
    """Returns the variant that generates with the library `transformers`, or None if it is not installed.

    Its model has the same shape, in float32 on the CPU and in bfloat16 elsewhere.
    """
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    c = model.config
    shape = GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head
    )
    reference = GPT2LMHeadModel(shape).eval().to(device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    reference.generation_config.pad_token_id = reference.generation_config.eos_token_id = None

    def generate(tokens: Tensor, new_tokens: int) -> None:
        result = reference.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=TOP_K,
        )
        assert result.size(1) == tokens.size(1) + new_tokens

    return Variant("transformers", generate)


def read_bandwidth() -> float:
    """Returns the bytes per second that this machine reads, by the fastest dot product of 400 MB."""
    x = torch.ones(100_000_000)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        x.dot(x)
        times.append(time.perf_counter() - start)
    return x.nbytes / min(times)
