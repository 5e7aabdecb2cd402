"""How fast training is, and what each optimization gains: every row adds one optimization to the row above.

    python -m benchmarks.training     # on the CPU a small model with GPT-2's vocabulary, on CUDA GPT-2 small
    python -m benchmarks.training --json bench.json

Each round measures every row once, each in a process of its own. Times are medians over the rounds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from system.cli import run
from system.errors import UserError, require_at_least

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL_SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "batch_size": 8}
GPT2_SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 32}


@dataclass(frozen=True)
class Variant:
    """The optimizations of one row; the defaults train as nanoGPT does on the CPU."""

    name: str
    dtype: str = "float32"
    fused_loss: bool = False
    fused_adamw: bool = False
    compile: bool = False
    attention: Literal["flash", "cudnn"] = "flash"
    """on CUDA"""
    keep_memory: bool = False


CPU_VARIANTS = [
    Variant("plain"),
    Variant("+ fused head and loss", fused_loss=True),
    Variant("+ fused AdamW", fused_loss=True, fused_adamw=True),
    Variant("+ freed memory kept", fused_loss=True, fused_adamw=True, keep_memory=True),
    Variant("+ bf16, if it has it", dtype="bfloat16", fused_loss=True, fused_adamw=True, keep_memory=True),
]
CUDA_VARIANTS = [
    Variant("plain, bf16, Flash attention", dtype="bfloat16"),
    Variant("+ compile", dtype="bfloat16", compile=True),
    Variant("+ fused AdamW", dtype="bfloat16", compile=True, fused_adamw=True),
    Variant("+ fused head and loss", dtype="bfloat16", compile=True, fused_adamw=True, fused_loss=True),
    Variant(
        "+ cuDNN's attention", dtype="bfloat16", compile=True, fused_adamw=True, fused_loss=True, attention="cudnn"
    ),
]


@dataclass(frozen=True)
class Setup:
    """What all rows of one run share."""

    device: str
    vocab_size: int
    steps: int
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_size: int


@dataclass(frozen=True)
class Config:
    device: str = "auto"
    """auto, cpu, cuda, mps"""
    n_layer: int | None = None
    """layers; by default 4 on the CPU, otherwise 12"""
    n_head: int | None = None
    """attention heads; by default 4 on the CPU, otherwise 12"""
    n_embd: int | None = None
    """width; by default 256 on the CPU, otherwise 768"""
    block_size: int | None = None
    """context in tokens; by default 256 on the CPU, otherwise 1024"""
    batch_size: int | None = None
    """sequences per step; by default 8 on the CPU, otherwise 32"""
    vocab_size: int = 50304
    """rows of the embedding"""
    steps: int = 3
    """steps between two synchronizations; a measurement has three such intervals"""
    rounds: int = 3
    """measurements of each row"""
    json: Path | None = None
    """file for the figures as JSON"""

    def __post_init__(self) -> None:
        require_at_least(1, self, "steps", "rounds", *SMALL_SHAPE)


def main(config: Config) -> None:
    """Measures every row in turn and prints the table."""
    from system.device import choose_device
    from system.files import write_json

    device = choose_device(config.device)
    shape = SMALL_SHAPE if device.type == "cpu" else GPT2_SHAPE
    shape = {name: getattr(config, name) or default for name, default in shape.items()}
    setup = Setup(device=str(device), vocab_size=config.vocab_size, steps=config.steps, **shape)
    variants = CUDA_VARIANTS if device.type == "cuda" else CPU_VARIANTS
    rounds: dict[str, list[dict]] = {variant.name: [] for variant in variants}
    for _ in range(config.rounds):
        for variant in variants:
            rounds[variant.name].append(measure(setup, variant))
    rows = [median_row(name, measurements) for name, measurements in rounds.items()]
    print_table(rows, setup)
    if config.json:
        write_json(config.json, {"machine": platform.processor() or platform.machine(), "rows": rows})


def measure(setup: Setup, variant: Variant) -> dict[str, float | None]:
    """Measures one row in a process of its own, so that its peak memory and its allocator are its own. So is its folder
    of compiled kernels, which keep the attention that was chosen when they were traced.

    Returns what `training_worker.measure` returns. Raises UserError if the process fails.
    """
    task = json.dumps({"setup": dataclasses.asdict(setup), "variant": dataclasses.asdict(variant)})
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [sys.executable, "-m", "benchmarks.training_worker", task],
            capture_output=True,
            encoding="utf-8",
            cwd=REPOSITORY,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder},
        )
    if result.returncode:
        last_line = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the row {variant.name!r} failed: {last_line}")
    return json.loads(result.stdout.splitlines()[-1])


def median_row(name: str, measurements: list[dict]) -> dict:
    """Returns the medians over a row's rounds."""
    keys = [key for key, value in measurements[0].items() if value is not None]
    return {"name": name, **{key: statistics.median(m[key] for m in measurements) for key in keys}}


def print_table(rows: list[dict], setup: Setup) -> None:
    """Prints time, speed and memory of each row, and their ratios to the first row."""
    print(
        f"{setup.n_layer} layers × {setup.n_embd}, vocabulary {setup.vocab_size:,}, "
        f"{setup.batch_size} × {setup.block_size} tokens a step, {setup.device}, {os.cpu_count()} cores"
    )
    print(f"{'':30}{'ms/step':>10}{'tokens/s':>11}{'speed':>8}{'MFU':>8}{'of matmul':>11}{'peak MB':>10}{'memory':>8}")
    first = rows[0]
    for row in rows:
        flops = row["flops_per_token"] * row["tokens_per_second"]
        mfu = f"{flops / row['peak_flops']:.0%}" if row.get("peak_flops") else "-"
        print(
            f"{row['name']:30}{1e3 * row['seconds']:>10,.1f}{row['tokens_per_second']:>11,.0f}"
            f"{first['seconds'] / row['seconds']:>7.2f}x{mfu:>8}{flops / row['matmul_flops']:>11.0%}"
            f"{row['peak_bytes'] / 1e6:>10,.0f}{row['peak_bytes'] / first['peak_bytes']:>7.2f}x"
        )
    if setup.device == "cpu":
        print("goals: at least 1.4x in float32, and 2.2x in bf16 where train.py chooses it (--dtype auto)")


if __name__ == "__main__":
    run(main, Config)
