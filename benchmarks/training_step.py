"""A training step with some of the optimizations that `benchmarks.training` names, and its measurement."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.training import Config
from model import GPT, IGNORE_INDEX, GPTConfig
from system.device import autocast, choose_device, choose_dtype, fast_attention, keep_memory, peak_flops, peak_memory
from training.config import TrainerConfig
from training.optim import build_optimizers


class TrainingStep:
    """A model with random weights, its optimizer and its forward pass. A call takes one step."""

    def __init__(self, shape: GPTConfig, device: torch.device, optimizations: Collection[str]):
        """`optimizations` are names out of `benchmarks.training`, or float16."""
        torch.manual_seed(0)
        self.device, self.has_fast_attention = device, "cuDNN's attention" in optimizations
        precision = next((name for name in ("bfloat16", "float16") if name in optimizations), "float32")
        self.dtype = choose_dtype(precision, device)
        if "freed memory kept" in optimizations:
            keep_memory()
        self.model = GPT(shape).to(device).train()
        (self.optimizer,) = build_optimizers(self.model, TrainerConfig())
        for group in self.optimizer.param_groups:
            group["fused"] = "fused AdamW" in optimizations
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]] = self.separate_loss
        if "fused head and loss" in optimizations:
            self.forward = self.fused_loss
            if "compile" in optimizations:
                self.model.compile_training()
        elif "compile" in optimizations:
            self.forward = torch.compile(self.separate_loss)

    def fused_loss(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, None]:
        """Returns the summed loss in nats of int64 tokens and targets (B, T)."""
        return self.model(tokens, targets), None

    def separate_loss(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the same loss and the logits (B, T, V), which so live through the backward pass, as in nanoGPT."""
        logits = self.model.lm_head(self.model.hidden(tokens))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"), logits

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Takes one step on int64 tokens and targets (B, T); returns the loss in nats per token."""
        with fast_attention(self.has_fast_attention):
            with autocast(self.device, self.dtype):
                loss, logits = self.forward(tokens, targets)
                loss = loss / (targets != IGNORE_INDEX).sum()
            self.scaler.scale(loss).backward()
        del logits
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def measure(config: dict[str, Any], optimizations: list[str]) -> dict[str, float]:
    """Returns the figures of one row of `benchmarks.training`, whose config this is."""
    c = Config(**config)
    return measure_step(TrainingStep(c, choose_device(c.device), optimizations), c.batch_size, c.steps)


def measure_step(step: TrainingStep, batch_size: int, steps: int) -> dict[str, float]:
    """Trains a few steps on random tokens; a recompilation is an error.

    Returns milliseconds per step, tokens/s, the model FLOPs utilization (0 if the device's peak is unknown), the peak
    memory in GB, and the last loss in nats per token.
    """
    shape = step.model.config
    tokens, targets = torch.randint(shape.n_tokens, (2, batch_size, shape.block_size), device=step.device)
    for _ in range(2):
        step(tokens, targets)
    torch._dynamo.config.error_on_recompile = True
    seconds = median_seconds(lambda: step(tokens, targets), steps, step.device)
    tokens_per_s = tokens.numel() / seconds
    peak = peak_flops(step.device)
    return {
        "ms": 1e3 * seconds,
        "tokens_per_s": tokens_per_s,
        "mfu": step.model.flops_per_token() * tokens_per_s / peak if peak else 0.0,
        "peak_gb": peak_memory(step.device) / 1e9,
        "loss": step(tokens, targets).item(),
    }


def median_seconds(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Returns the seconds of one call: the median of three rounds of calls. Waits for a GPU once a round."""
    rounds = []
    for _ in range(3):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(times):
            work()
        synchronize(device)
        rounds.append((time.perf_counter() - start) / times)
    return statistics.median(rounds)


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
