"""How fast training is, and what each optimization gains: every row adds one optimization to the row above.

    python -m benchmarks.training                  # a small model with GPT-2's vocabulary, for a CPU
    python -m benchmarks.training --preset gpt2    # GPT-2 small, for a GPU

Each row is measured in a process of its own.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import worker
from gpt_config import GPTConfig
from model import GPT, IGNORE_INDEX
from system.cli import run
from system.device import autocast, choose_device, fast_attention, keep_memory, machine, peak_flops, peak_memory
from system.errors import require_at_least
from training.config import TrainerConfig
from training.optim import build_optimizers

Step = Callable[[Tensor, Tensor], Tensor]
"""Takes a training step on int64 tokens and targets (B, T); returns the loss in nats per token."""


@dataclass(frozen=True)
class Config(GPTConfig):
    preset: str = "gpt2"
    """small or gpt2: the defaults of all other flags"""
    device: str = "auto"
    """auto, cpu, cuda, mps"""
    batch_size: int = 32
    """sequences per step"""
    steps: int = 5
    """steps between two synchronizations; a measurement is the median of three such intervals"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "batch_size", "steps")


SMALL = Config(preset="small", n_layer=4, n_head=4, n_embd=256, block_size=256, batch_size=8)


def main(config: Config) -> None:
    """Measures every row in turn and prints the table, with ratios to the first row."""
    device = choose_device(config.device)
    names, first_ms = optimizations(device), None
    table = [["", "ms/step", "speed", "tokens/s", "MFU", "peak GB", "loss"]]
    for n, name in enumerate(["plain, float32", *names]):
        row = worker.call("benchmarks.training", "measure", config=dataclasses.asdict(config), names=names[:n])
        first_ms = first_ms or row["ms"]
        table.append([name, f"{row['ms']:,.1f}", f"{first_ms / row['ms']:.2f}x", f"{row['tokens_per_s']:,.0f}"])
        table[-1] += [f"{row['mfu']:.0%}", f"{row['peak_gb']:.2f}", f"{row['loss']:.4f}"]
    print(machine(device))
    print(worker.table(table))


def optimizations(device: torch.device) -> tuple[str, ...]:
    """Returns the optimizations in turn; without any, a step is nanoGPT's."""
    if device.type == "cuda":
        return ("bfloat16", "compile", "fused AdamW", "fused head and loss", "cuDNN's attention")
    return ("fused head and loss", "fused AdamW", "freed memory kept", "bfloat16")


def measure(config: dict[str, Any], names: list[str], float32_stream: bool = False) -> dict[str, float]:
    """Trains a few steps on random tokens; a recompilation is an error. `config` has the fields of `Config`.

    With `float32_stream` the residual stream is in float32, as autocast alone has it. Returns milliseconds per step,
    tokens/s, the model FLOPs utilization (0 if the device's peak is unknown), the peak memory in GB, and the last loss
    in nats per token.
    """
    c = Config(**config)
    device = choose_device(c.device)
    model, step = training_step(c, device, names)
    if float32_stream:
        model.h[0].register_forward_pre_hook(lambda block, inputs: (inputs[0].float(), *inputs[1:]))
    tokens, targets = torch.randint(c.n_tokens, (2, c.batch_size, c.block_size), device=device)
    for _ in range(2):
        step(tokens, targets)
    torch._dynamo.config.error_on_recompile = True
    seconds = median_seconds(lambda: step(tokens, targets), c.steps, device)
    tokens_per_s = tokens.numel() / seconds
    return {
        "ms": 1e3 * seconds,
        "tokens_per_s": tokens_per_s,
        "mfu": model.flops_per_token() * tokens_per_s / (peak_flops(device) or math.inf),
        "peak_gb": peak_memory(device) / 1e9,
        "loss": step(tokens, targets).item(),
    }


def training_step(shape: GPTConfig, device: torch.device, names: Collection[str]) -> tuple[GPT, Step]:
    """Returns a model with random weights and its training step. `names` are `optimizations`, or float16."""
    torch.manual_seed(0)
    precision = next((name for name in ("bfloat16", "float16") if name in names), "float32")
    dtype, model = getattr(torch, precision), GPT(shape).to(device).train()
    if "freed memory kept" in names:
        keep_memory()
    (optimizer,) = build_optimizers(model, TrainerConfig())
    for group in optimizer.param_groups:
        group["fused"] = "fused AdamW" in names
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def separate_loss(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = model.lm_head(model.hidden(tokens))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        return loss, logits  # which so live through the backward pass, as in nanoGPT

    def fused_loss(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        return model(tokens, targets), None

    forward = fused_loss if "fused head and loss" in names else separate_loss
    if "compile" in names and forward is fused_loss:
        model.compile_training()
    elif "compile" in names:
        forward = torch.compile(separate_loss)

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        with fast_attention("cuDNN's attention" in names):
            with autocast(device, dtype):
                loss, logits = forward(tokens, targets)
                loss = loss / (targets != IGNORE_INDEX).sum()
            scaler.scale(loss).backward()
        del logits
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return model, step


def median_seconds(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Returns the seconds of one call: the median of three rounds of calls. Waits for a GPU once a round."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    rounds = []
    for _ in range(3):
        wait()
        start = time.perf_counter()
        for _ in range(times):
            work()
        wait()
        rounds.append((time.perf_counter() - start) / times)
    return statistics.median(rounds)


if __name__ == "__main__":
    run(main, Config, {"small": SMALL, "gpt2": Config()})
