"""What each part of the modern recipe gains over GPT-2's: both trained on the same tokens, and the modern one without
each of its parts.

    python -m benchmarks.recipe                    # Python's documentation, under an hour on two cores
    python -m benchmarks.recipe --data FOLDER …    # prepared data of one's own, other sizes

Every run is `train.py` in a process of its own. Both recipes get the best of three learning rates, tried with the first
seed. Losses are those of the last evaluation, in nats per token; tokens/s are medians between evaluations.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.worker import REPOSITORY, last_error, read_log
from system.cli import run
from system.errors import UserError, require, require_at_least

GPT2 = ("--preset", "gpt2", "--min-lr", "0")
MODERN = ("--preset", "modern")
SHARE = 0.4  # of the tokens, with which the modern recipe must reach GPT-2's final loss
REPLACEMENTS = {
    "learned positions": ("--no-rotary",),
    "no QK-norm": ("--no-qk-norm",),
    "GELU": ("--no-squared-relu",),
    "a tied head": ("--tie-weights",),
    "AdamW alone": ("--optimizer", "adamw"),
    "embeddings no faster": ("--embedding-lr-scale", "1"),
    "a cosine": ("--cooldown", "0"),
}
"""What replaces each part of the modern recipe, and its flags."""


@dataclass(frozen=True)
class Config:
    data: Path | None = None
    """folder written by prepare_data.py; by default Python's documentation is prepared"""
    vocab_size: int = 2045
    """tokens of the vocabulary, if the data is prepared"""
    n_layer: int = 4
    n_head: int = 3
    n_embd: int = 192
    block_size: int = 128
    batch_size: int = 32
    """sequences per step"""
    steps: int = 300
    """optimizer steps of each run"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of the two recipes; the parts are left out with the first one"""
    gpt2_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    """learning rates to try for GPT-2's recipe"""
    modern_rates: tuple[float, ...] = (2.5e-3, 5e-3, 1e-2)
    """learning rates to try for the modern recipe"""

    def __post_init__(self) -> None:
        require_at_least(1, self, "n_layer", "n_head", "n_embd", "block_size", "batch_size", "steps")
        require(bool(self.seeds and self.gpt2_rates and self.modern_rates), "name at least one seed and rate")


Entries = list[dict[str, Any]]


def main(config: Config) -> None:
    """Trains all runs and prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(config, Path(folder))
        gpt2_flags = runs.with_best_rate(GPT2, config.gpt2_rates)
        modern_flags = runs.with_best_rate(MODERN, config.modern_rates)
        gpt2 = [runs.train(gpt2_flags, seed) for seed in config.seeds]
        modern = [runs.train(modern_flags, seed) for seed in config.seeds]
        steps = max(1, round(SHARE * config.steps))
        short = [runs.train(modern_flags, seed, steps) for seed in config.seeds]
        tokens = config.steps * config.batch_size * config.block_size
        print(f"{tokens:,} tokens a run, seeds {', '.join(map(str, config.seeds))}, {os.cpu_count()} cores")
        print(f"{'':34}{'final loss':>12}{'spread':>9}{'tokens/s':>11}")
        print_row("GPT-2", gpt2)
        print_row("modern", modern)
        print_row(f"modern, {SHARE:.0%} of the tokens", short)
        for name, flags in REPLACEMENTS.items():
            print_row(f"modern, with {name}", [runs.train((*modern_flags, *flags), config.seeds[0])])
        goal = statistics.mean(map(final_loss, gpt2))
        speed = statistics.median(map(tokens_per_second, modern)) / statistics.median(map(tokens_per_second, gpt2))
        print(
            f"The modern recipe passes GPT-2's final loss, {goal:.3f}, after "
            f"{max(share_to_reach(goal, entries) for entries in modern):.0%} of the tokens "
            f"(goal: {SHARE:.0%}), at {speed:.2f} times GPT-2's speed (goal: 0.9)."
        )


class Runs:
    """Runs of `train.py` on one data set, each logged in a folder."""

    def __init__(self, config: Config, folder: Path):
        """Prepares the data if none is given."""
        self.config, self.folder, self.logs = config, folder, dict[tuple[Any, ...], Entries]()
        self.data = config.data.resolve() if config.data else folder / "data"
        if not config.data:
            self.script("prepare_data.py", "--dataset", "pydocs", "--vocab-size", config.vocab_size, "--out", self.data)

    def script(self, name: str, *arguments: object) -> None:
        """Runs a script of the project. Raises UserError if it fails."""
        command = [sys.executable, str(REPOSITORY / name), *map(str, arguments)]
        result = subprocess.run(command, cwd=self.folder, capture_output=True, encoding="utf-8")
        if result.returncode:
            raise UserError(f"{name} failed: {last_error(result.stderr, result.returncode)}")

    def train(self, flags: tuple[str, ...], seed: int, steps: int | None = None) -> Entries:
        """Returns the log of a run, which is trained if it has not been; each entry has its `tokens`."""
        c, steps = self.config, steps or self.config.steps
        if (*flags, seed, steps) in self.logs:
            return self.logs[*flags, seed, steps]
        every = max(1, steps // 20)
        options = {"seed": seed, "max_steps": steps, "warmup_steps": -(-steps // 10), "batch_size": c.batch_size}
        options |= {"eval_every": every, "log_every": max(1, every // 2), "save_every": steps}
        options |= {name: getattr(c, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
        words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
        self.script("train.py", *flags, *words, "--data", self.data, "--out", "run.pt", "--overwrite")
        entries = read_log(self.folder / "run.jsonl")
        entries = [{**entry, "tokens": entry["step"] * c.batch_size * c.block_size} for entry in entries]
        print(f"trained {' '.join(flags)}, seed {seed}, {steps} steps: {final_loss(entries):.4f}", flush=True)
        self.logs[*flags, seed, steps] = entries
        return entries

    def with_best_rate(self, flags: tuple[str, ...], rates: tuple[float, ...]) -> tuple[str, ...]:
        """Returns flags with the learning rate that has the lowest final loss, with the first seed."""
        choices = [(*flags, "--learning-rate", str(rate)) for rate in rates]
        return min(choices, key=lambda choice: final_loss(self.train(choice, self.config.seeds[0])))


def final_loss(entries: Entries) -> float:
    """Returns the validation loss of the last evaluation, in nats per token."""
    return [entry["val_loss"] for entry in entries if "val_loss" in entry][-1]


def share_to_reach(loss: float, entries: Entries) -> float:
    """Returns the share of a run's tokens after which it had a validation loss, or infinity."""
    reached = [entry["tokens"] for entry in entries if entry.get("val_loss", float("inf")) <= loss]
    return reached[0] / entries[-1]["tokens"] if reached else float("inf")


def tokens_per_second(entries: Entries) -> float:
    """Returns the median speed between neighbouring lines of the log, without evaluations."""
    pairs = [(a, b) for a, b in itertools.pairwise(entries) if "loss" in b and b["seconds"] > a["seconds"]]
    return statistics.median((b["tokens"] - a["tokens"]) / (b["seconds"] - a["seconds"]) for a, b in pairs)


def print_row(name: str, runs: list[Entries]) -> None:
    """Prints the mean final loss of runs, its spread and the median speed."""
    losses = [final_loss(entries) for entries in runs]
    spread = f"{max(losses) - min(losses):.3f}" if len(losses) > 1 else "-"
    speed = statistics.median(map(tokens_per_second, runs))
    print(f"{name:34}{statistics.mean(losses):>12.3f}{spread:>9}{speed:>11,.0f}", flush=True)


if __name__ == "__main__":
    run(main, Config)
