"""How fast the project generates tokens, next to the library `transformers`: all variants in turn, in one process.

    python -m benchmarks.generation                       # GPT-2 small with random weights
    python -m benchmarks.generation --prompts 8 --new-tokens 200 --rounds 5 --json bench.json

Temperature 0.8 and top-k 50 everywhere; the batch size is 1 unless the name of the variant says otherwise.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from system.threads import GENERATION, limit_spinning

from system.cli import run
from system.errors import require, require_at_least

if TYPE_CHECKING:
    from model import GPTConfig


GOALS = {"+ products for few rows": "1.2 on Intel, 1.5 on AMD", "--dtype bfloat16": "1.8", "--quantize int8": "2.5"}
"""ratios to `transformers`, on a CPU; bfloat16 only if it computes in it"""


@dataclass(frozen=True)
class Config:
    prompts: tuple[int, ...] = (8, 512)
    """lengths of the prompts, in tokens"""
    new_tokens: int = 100
    """tokens to generate after each prompt"""
    rounds: int = 3
    """measurements of each variant"""
    json: Path | None = None
    """file for the figures as JSON"""
    device: str = "auto"
    """auto, cpu, cuda, mps"""
    n_layer: int = 12
    """layers"""
    n_head: int = 12
    """attention heads per layer"""
    n_embd: int = 768
    """width"""
    block_size: int = 1024
    """context in tokens"""
    vocab_size: int = 50304
    """rows of the embedding"""

    def __post_init__(self) -> None:
        shape = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
        require_at_least(1, self, "new_tokens", "rounds", *shape)
        require(bool(self.prompts) and min(self.prompts) >= 1, "--prompts must be lengths of at least 1")
        longest = max(self.prompts) + self.new_tokens
        require(longest <= self.block_size, f"--block-size {self.block_size} is less than prompt and new tokens")


def main(config: Config) -> None:
    """Measures every variant in turn and prints the table."""
    from benchmarks.generation_variants import measure, read_bandwidth
    from model import GPTConfig
    from system.device import choose_device
    from system.files import write_json

    shape = GPTConfig(
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        block_size=config.block_size,
        vocab_size=config.vocab_size,
        n_tokens=min(GPTConfig().n_tokens, config.vocab_size),
    )
    device = choose_device(config.device)
    rows = measure(shape, device, config.prompts, config.new_tokens, config.rounds)
    print(format_table(rows))
    if device.type == "cpu":
        print(format_bandwidth(shape, rows, read_bandwidth()))
    if config.json:
        write_json(config.json, {"machine": platform.processor() or platform.machine(), "rows": rows})


def format_bandwidth(shape: GPTConfig, rows: list[dict], possible: float) -> str:
    """Returns the rate at which float32 weights are read, beside the bytes per second that the machine reads."""
    weights = shape.n_embd * shape.vocab_size + 12 * shape.n_layer * shape.n_embd**2
    reached = 4 * weights * max(row["tokens_per_second"] for row in rows if row["name"] == "+ products for few rows")
    share = f"{reached / 1e9:.1f} of {possible / 1e9:.1f} GB/s, {reached / possible:.0%}"
    return f"float32 weights are read at {share} of the rate of a dot product; goal: at least 75%"


def format_table(rows: list[dict]) -> str:
    """Returns the rows as text: a line for each variant, a column for each prompt."""
    columns = dict.fromkeys(f"prompt of {row['prompt']}" for row in rows)
    lines = [f"{'tokens/s (ratio to transformers)':34}" + "".join(f"{name:>20}" for name in columns) + "   goal"]
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = [
            f"{row['tokens_per_second']:,.1f}" + (f" ({row['ratio']:.2f})" if row["ratio"] else "")
            for row in rows
            if row["name"] == name
        ]
        goal = f"   at least {GOALS[name]}" if name in GOALS else ""
        lines.append(f"{name:34}" + "".join(f"{cell:>20}" for cell in cells) + goal)
    return "\n".join(lines)


if __name__ == "__main__":
    limit_spinning(GENERATION)  # as generate.py does
    run(main, Config)
