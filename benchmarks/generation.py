"""How fast the project generates tokens, next to the library `transformers`: all variants in turn, in one process.

    python -m benchmarks.generation                       # GPT-2 small with random weights
    python -m benchmarks.generation --prompts 8 --new-tokens 200 --rounds 5

Temperature 0.8 and top-k 50 everywhere; the batch size is 1 unless the name of the variant says otherwise.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from gpt_config import GPTConfig
from system.cli import GENERATION, run
from system.errors import require, require_at_least

GOALS = {"+ products for few rows": "1.2 on Intel, 1.5 on AMD", "--dtype bfloat16": "1.8", "--quantize int8": "2.5"}
"""ratios to `transformers`, on a CPU; bfloat16 only if it computes in it"""


@dataclass(frozen=True)
class Config(GPTConfig):
    prompts: tuple[int, ...] = (8, 512)
    """lengths of the prompts, in tokens"""
    new_tokens: int = 100
    """tokens to generate after each prompt"""
    rounds: int = 3
    """measurements of each variant"""
    device: str = "auto"
    """auto, cpu, cuda, mps"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "new_tokens", "rounds")
        require(bool(self.prompts) and min(self.prompts) >= 1, "--prompts must be lengths of at least 1")
        longest = max(self.prompts) + self.new_tokens
        require(longest <= self.block_size, f"--block-size {self.block_size} is less than prompt and new tokens")


def main(config: Config) -> None:
    """Measures every variant in turn and prints the table: median tokens/s, median ratio to `transformers`."""
    import torch

    from benchmarks.generation_variants import build_variants, read_bandwidth
    from system.device import choose_device

    device = choose_device(config.device)
    variants = build_variants(config, device)
    table: dict[str, list[str]] = {variant.name: [] for variant in variants}
    fastest = 0.0
    for prompt in config.prompts:
        speeds: dict[str, list[float]] = {variant.name: [] for variant in variants}
        for _ in range(config.rounds):
            for variant in variants:
                tokens = torch.randint(config.n_tokens, (1, prompt), device=device)
                speeds[variant.name].append(variant.tokens_per_second(tokens, config.new_tokens))
        reference = speeds.get("transformers", [])
        for name, measured in speeds.items():
            ratios = [a / b for a, b in zip(measured, reference, strict=False)]
            ratio = f" ({statistics.median(ratios):.2f})" if ratios else ""
            table[name].append(f"{statistics.median(measured):,.1f}{ratio}")
        fastest = max(fastest, statistics.median(speeds.get("+ products for few rows", [0])))
    titles = (f"prompt of {prompt}" for prompt in config.prompts)
    print(f"{'tokens/s (ratio to transformers)':34}" + "".join(f"{title:>20}" for title in titles) + "   goal")
    for name, cells in table.items():
        goal = f"   at least {GOALS[name]}" if device.type == "cpu" and name in GOALS else ""
        print(f"{name:34}" + "".join(f"{cell:>20}" for cell in cells) + goal)
    if device.type == "cpu":
        read = fastest * 4 * (config.n_embd * config.vocab_size + 12 * config.n_layer * config.n_embd**2)
        possible = read_bandwidth()
        share = f"{read / 1e9:.1f} of {possible / 1e9:.1f} GB/s, {read / possible:.0%}"
        print(f"float32 weights are read at {share} of the rate of a dot product; goal: at least 75%")


if __name__ == "__main__":
    run(main, Config, spin=GENERATION)
