"""How fast training is, and what each optimisation gives: every row of the table is the row above with one more.

    python -m benchmarks.training --generation    # how fast text is written, by GPT-2 small
    python -m benchmarks.training     # on the CPU a small model with GPT-2's vocabulary, on CUDA GPT-2 small
    python -m benchmarks.training --json bench.json

Every row is measured in a process of its own, in turn, several rounds; times are medians, ratios are of one run.
"""

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from system.cli import run
from system.errors import UserError, require_at_least


@dataclass(frozen=True)
class Row:
    """One way to train; the default is how nanoGPT does it on the CPU."""

    name: str
    dtype: str = "float32"
    fused_loss: bool = False
    fused_adamw: bool = False
    compile: bool = False
    fast_attention: bool = False
    keep_memory: bool = False


CPU_ROWS = [
    Row("plain"),
    Row("+ fused head and loss", fused_loss=True),
    Row("+ fused AdamW", fused_loss=True, fused_adamw=True),
    Row("+ freed memory kept", fused_loss=True, fused_adamw=True, keep_memory=True),
    Row("+ bf16, if it has it", "bfloat16", fused_loss=True, fused_adamw=True, keep_memory=True),
]
CUDA_ROWS = [
    Row("plain, bf16", "bfloat16"),
    Row("+ compile", "bfloat16", compile=True),
    Row("+ fused AdamW", "bfloat16", compile=True, fused_adamw=True),
    Row("+ fused head and loss", "bfloat16", True, True, True),
    Row("+ cuDNN attention", "bfloat16", True, True, True, True),
]


INTERNAL = ("json", "row", "generation", "prompts", "new_tokens")  # not handed on to the processes of the rows


@dataclass(frozen=True)
class Config:
    device: str = "auto"
    """auto, cpu, cuda, mps"""
    n_layer: int | None = None
    """layers; 4 on the CPU, else 12"""
    n_head: int | None = None
    """heads; 4 on the CPU, else 12"""
    n_embd: int | None = None
    """width; 256 on the CPU, else 768"""
    block_size: int | None = None
    """context; 256 on the CPU, else 1024"""
    batch_size: int | None = None
    """sequences a step; 8 on the CPU, else 32"""
    vocab_size: int = 50304
    """rows of the embedding"""
    steps: int = 6
    """measured steps a round, after two that are not"""
    rounds: int = 3
    """times that each row is measured, in turn"""
    generation: bool = False
    """measure generation instead of training"""
    prompts: tuple[int, ...] = (8, 512)
    """of --generation: lengths of the prompt"""
    new_tokens: int = 100
    """of --generation: tokens written after it"""
    json: Path | None = None
    """write the figures here too"""
    row: str | None = None
    """internal: the row that this process measures, as JSON"""

    def __post_init__(self):
        require_at_least(1, self, "steps", "rounds")


def main(config: Config) -> None:
    """Measures every row, or, in a process of its own, one."""
    from system.device import choose_device

    if config.row:
        print(json.dumps(measure(config, Row(**json.loads(config.row)))))
        return
    device = choose_device(config.device)
    on_cpu = device.type == "cpu"
    if config.generation:
        measure_generation(config, device)
        return
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "batch_size": 8} if on_cpu else {
        "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 32
    }  # fmt: skip
    config = dataclasses.replace(config, **{k: getattr(config, k) or v for k, v in shape.items()}, device=str(device))
    rows = CUDA_ROWS if device.type == "cuda" else CPU_ROWS
    figures = {row.name: [] for row in rows}
    for _ in range(config.rounds):
        for row in rows:
            figures[row.name].append(in_a_process(config, row))
    table = [summarize(name, rounds) for name, rounds in figures.items()]
    print_table(table, config)
    if config.json:
        from system.files import write_json

        write_json(config.json, {"machine": platform.processor() or platform.machine(), "rows": table})


def measure_generation(config: Config, device) -> None:
    """Measures the ways to generate in turn; the shape is GPT-2 small's but for what flags say."""
    from benchmarks import generation
    from system.files import write_json

    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    shape = {name: getattr(config, name) for name in names if getattr(config, name)}
    shape["n_tokens"] = min(50_259, config.vocab_size)
    rows = generation.measure(config.prompts, config.new_tokens, config.rounds, device, shape)
    print(generation.table(rows))
    if config.json:
        write_json(config.json, {"machine": platform.processor() or platform.machine(), "rows": rows})


def in_a_process(config: Config, row: Row) -> dict:
    """Measures one row in a process of its own, so that no row sees the memory of another."""
    flags = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in INTERNAL}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.training", *arguments, "--row", json.dumps(dataclasses.asdict(row))],
        capture_output=True, encoding="utf-8", cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    if result.returncode:
        raise UserError(f"the row {row.name!r} failed: {result.stderr.strip().splitlines()[-1]}")
    return json.loads(result.stdout.splitlines()[-1])


def measure(config: Config, row: Row) -> dict:
    """Trains a few steps; returns seconds a step, tokens/s, peak memory in bytes, FLOPs a token and the last loss."""
    import torch
    import torch.nn.functional as F

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

    device = choose_device(config.device)
    dtype = choose_dtype(row.dtype, device)
    if row.keep_memory:
        keep_memory()
    torch.manual_seed(0)
    shape = {f.name: getattr(config, f.name) for f in dataclasses.fields(GPTConfig) if hasattr(config, f.name)}
    model = GPT(GPTConfig(**shape, n_tokens=config.vocab_size)).to(device).train()
    (optimizer,) = build_optimizers(model, "adamw", 6e-4, 0.95, 0.1)
    for group in optimizer.param_groups:
        group["fused"] = row.fused_adamw
    tokens, targets = torch.randint(config.vocab_size, (2, config.batch_size, config.block_size), device=device)

    def plain(tokens, targets):  # as in nanoGPT, the logits are returned too, and so live through the backward pass
        logits = model.lm_head(model.hidden(tokens))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"), logits

    def fused(tokens, targets):
        return model(tokens, targets), None

    forward = fused if row.fused_loss else plain
    if row.compile and row.fused_loss:
        model.compile_training()
    elif row.compile:
        forward = torch.compile(forward)

    def step():
        with autocast(device, dtype):
            loss, logits = forward(tokens, targets)  # noqa: RUF059
            loss = loss / tokens.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def synchronize():
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds = []
    with fast_attention(row.fast_attention):
        for i in range(2 + config.steps):
            torch._dynamo.config.error_on_recompile = i >= 2  # all that is compiled has been by then
            started = time.perf_counter()
            loss = step()
            synchronize()
            seconds.append(time.perf_counter() - started)
    second = statistics.median(seconds[2:])
    return {
        "seconds": second,
        "tokens_per_second": tokens.numel() / second,
        "peak_bytes": peak_memory(device),
        "loss": loss.item(),
        "flops_per_token": model.flops_per_token(),
        "peak_flops": peak_flops(device),
        "measured_flops": matrix_product_flops(device, dtype),
    }


def matrix_product_flops(device, dtype) -> float:
    """Returns the FLOP/s of a large matrix product, the ceiling that a measured machine sets."""
    import torch

    n = 8192 if device.type == "cuda" else 1536
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds)


def summarize(name: str, rounds: list[dict]) -> dict:
    """Returns the median of a row's rounds."""
    medians = {key: statistics.median(r[key] for r in rounds) for key in rounds[0] if rounds[0][key] is not None}
    return {"name": name, **medians}


def print_table(table: list[dict], config: Config) -> None:
    """Prints times, ratios to the first row, use of the arithmetic and memory."""
    print(
        f"{config.n_layer} layers × {config.n_embd}, vocabulary {config.vocab_size:,}, "
        f"{config.batch_size} × {config.block_size} tokens a step, {config.device}, {os.cpu_count()} cores"
    )
    print(f"{'':24}{'ms/step':>10}{'tokens/s':>11}{'speed':>8}{'MFU':>8}{'of matmul':>11}{'peak MB':>10}{'memory':>8}")
    first = table[0]
    for row in table:
        flops = row["flops_per_token"] * row["tokens_per_second"]
        mfu = f"{flops / row['peak_flops']:.0%}" if row.get("peak_flops") else "-"
        print(
            f"{row['name']:24}{1e3 * row['seconds']:>10,.1f}{row['tokens_per_second']:>11,.0f}"
            f"{first['seconds'] / row['seconds']:>7.2f}x{mfu:>8}{flops / row['measured_flops']:>11.0%}"
            f"{row['peak_bytes'] / 1e6:>10,.0f}{row['peak_bytes'] / first['peak_bytes']:>7.2f}x"
        )


if __name__ == "__main__":
    run(main, Config)
