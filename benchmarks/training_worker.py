"""Measures one row of `benchmarks.training` in this process; the argument is the row as JSON, and so is the output."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.training import Setup, Variant
from model import GPT, GPTConfig
from system.device import (
    autocast,
    choose_device,
    choose_dtype,
    fast_attention,
    keep_memory,
    peak_flops,
    peak_memory,
)
from training.optim import build_optimizers

WARMUP_STEPS = 2


def measure(setup: Setup, variant: Variant) -> dict[str, float | None]:
    """Trains a few steps on random tokens.

    Returns the median seconds per step, tokens/s, the peak memory in bytes, the last loss in nats, the model's FLOPs
    per token, the FLOP/s of the datasheet (None if unknown) and the FLOP/s of a large matrix product.
    """
    device = choose_device(setup.device)
    dtype = choose_dtype(variant.dtype, device)
    if variant.keep_memory:
        keep_memory()
    torch.manual_seed(0)
    names = {field.name for field in dataclasses.fields(GPTConfig)}
    shape = {name: value for name, value in dataclasses.asdict(setup).items() if name in names}
    model = GPT(GPTConfig(**shape, n_tokens=setup.vocab_size)).to(device).train()
    (optimizer,) = build_optimizers(model, "adamw", 6e-4, 0.95, 0.1)
    for group in optimizer.param_groups:
        group["fused"] = variant.fused_adamw
    tokens, targets = torch.randint(setup.vocab_size, (2, setup.batch_size, setup.block_size), device=device)
    forward = build_forward(model, variant)

    def step() -> Tensor:
        with autocast(device, dtype):
            loss, _ = forward(tokens, targets)
            loss = loss / tokens.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    with fast_attention(variant.attention == "cudnn"):
        seconds, loss = time_steps(step, setup.steps, device)
    return {
        "seconds": seconds,
        "tokens_per_second": tokens.numel() / seconds,
        "peak_bytes": peak_memory(device),
        "loss": loss,
        "flops_per_token": model.flops_per_token(),
        "peak_flops": peak_flops(device),
        "matmul_flops": measure_matmul(device, dtype),
    }


def build_forward(model: GPT, variant: Variant) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]:
    """Returns the forward pass of a row: tokens and targets (B, T) to the summed loss in nats and the logits.

    Without the fused loss, the logits (B, T, V) are returned as in nanoGPT, and so live through the backward pass.
    """

    def separate(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = model.lm_head(model.hidden(tokens))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"), logits

    def fused(tokens: Tensor, targets: Tensor) -> tuple[Tensor, None]:
        return model(tokens, targets), None

    if not variant.fused_loss:
        return torch.compile(separate) if variant.compile else separate
    if variant.compile:
        model.compile_training()
    return fused


def time_steps(step: Callable[[], Tensor], steps: int, device: torch.device) -> tuple[float, float]:
    """Runs the warm-up steps, then three rounds of `steps`, and waits for the GPU once a round.

    Returns the median seconds of a step, and the last loss.
    """
    for _ in range(WARMUP_STEPS):
        loss = step()
    torch._dynamo.config.error_on_recompile = True
    rounds = []
    for _ in range(3):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(steps):
            loss = step()
        synchronize(device)
        rounds.append((time.perf_counter() - started) / steps)
    return statistics.median(rounds), loss.item()


def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOP/s of a large matrix product, the practical limit of the machine."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    seconds, _ = time_steps(lambda: torch.mm(a, b)[0, 0], 4, device)
    return 2 * n**3 / seconds


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    print(json.dumps(measure(Setup(**task["setup"]), Variant(**task["variant"]))))
