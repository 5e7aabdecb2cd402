"""How fast training is, and what each optimization gains: every row adds one optimization to the row above.

    python -m benchmarks.training                  # a small model with GPT-2's vocabulary, for a CPU
    python -m benchmarks.training --preset gpt2    # GPT-2 small, for a GPU

Each round measures every row once, each in a process of its own. Figures are medians over the rounds.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from dataclasses import dataclass

from benchmarks import worker
from gpt_config import GPTConfig
from system.cli import run
from system.errors import require_at_least

CPU = ("fused head and loss", "fused AdamW", "freed memory kept", "bfloat16")
CUDA = ("bfloat16", "compile", "fused AdamW", "fused head and loss", "cuDNN's attention")
"""The optimizations in turn; without any, a step is nanoGPT's."""


@dataclass(frozen=True)
class Config(GPTConfig):
    preset: str = "gpt2"
    """small or gpt2: the defaults of all other flags"""
    device: str = "auto"
    """auto, cpu, cuda, mps"""
    batch_size: int = 32
    """sequences per step"""
    steps: int = 3
    """steps between two synchronizations; a measurement has three such intervals"""
    rounds: int = 3
    """measurements of each row"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "batch_size", "steps", "rounds")


SMALL = Config(preset="small", n_layer=4, n_head=4, n_embd=256, block_size=256, batch_size=8)


def main(config: Config) -> None:
    """Measures every row in turn and prints the table."""
    from system.device import choose_device

    device = choose_device(config.device).type
    optimizations = CUDA if device == "cuda" else CPU
    rows = [optimizations[:n] for n in range(len(optimizations) + 1)]
    task = {**dataclasses.asdict(config), "device": device}
    rounds = [
        [worker.call("benchmarks.training_step", "measure", config=task, optimizations=row) for row in rows]
        for _ in range(config.rounds)
    ]
    print(
        f"{config.n_layer} layers × {config.n_embd}, vocabulary {config.vocab_size:,}, "
        f"{config.batch_size} × {config.block_size} tokens a step, {device}, {os.cpu_count()} cores"
    )
    print_table(["plain, float32", *(f"+ {name}" for name in optimizations)], rounds)
    if device == "cpu":
        print("goals: at least 1.4x in float32, and 2.2x in bfloat16 where train.py chooses it (--dtype auto)")


def print_table(names: list[str], rounds: list[list[dict[str, float]]]) -> None:
    """Prints the medians of each row, and the ratios of its time and its memory to those of the first row."""
    print(f"{'':30}{'ms/step':>10}{'tokens/s':>11}{'speed':>8}{'MFU':>8}{'peak MB':>10}{'memory':>8}{'loss':>9}")
    rows = [
        {key: statistics.median(figures[key] for figures in measured) for key in measured[0]}
        for measured in zip(*rounds, strict=True)
    ]
    for name, row in zip(names, rows, strict=True):
        mfu = f"{row['mfu']:.0%}" if row["mfu"] else "-"
        print(
            f"{name:30}{row['ms']:>10,.1f}{row['tokens_per_s']:>11,.0f}{rows[0]['ms'] / row['ms']:>7.2f}x{mfu:>8}"
            f"{1e3 * row['peak_gb']:>10,.0f}{row['peak_gb'] / rows[0]['peak_gb']:>7.2f}x{row['loss']:>9.4f}"
        )


if __name__ == "__main__":
    run(main, Config, {"small": SMALL, "gpt2": Config()})
