"""What each part of the modern recipe gains over GPT-2's: both trained on the same tokens, and the modern one without
each of its parts.

    python prepare_data.py --dataset pydocs --vocab-size 2045 --out data/docs    # Python's documentation
    python -m benchmarks.recipe                                                  # under an hour on two cores

Every run is `train.py` in a process of its own. Losses are those of the last evaluation, in nats per token; times
are medians between evaluations.
"""

import itertools
import math
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import worker
from system.cli import run
from system.errors import require, require_at_least
from training.reporting import read_log

GPT2 = ("--preset", "gpt2", "--min-lr", "0", "--learning-rate", "4e-3")
MODERN = ("--preset", "modern", "--learning-rate", "5e-3")
"""The recipes with the best of three learning rates each, at the default sizes (docs/log.md)."""
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
    data: Path = Path("data/docs")
    """folder written by prepare_data.py"""
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

    def __post_init__(self) -> None:
        require_at_least(1, self, "steps")
        require(bool(self.seeds), "name at least one seed")


Entries = list[dict[str, Any]]


def main(config: Config) -> None:
    """Trains all runs and prints the table."""
    gpt2 = [train(config, GPT2, seed) for seed in config.seeds]
    modern = [train(config, MODERN, seed) for seed in config.seeds]
    rows = {"GPT-2": gpt2, "modern": modern, "modern, first seed": modern[:1]}
    for name, flags in REPLACEMENTS.items():
        rows[f"with {name}"] = [train(config, (*MODERN, *flags), config.seeds[0])]
    table = [["", "final loss", "spread", "ms/step"]]
    for name, runs in rows.items():
        losses = list(map(final_loss, runs))
        table.append(
            [name, f"{statistics.mean(losses):.3f}", f"{max(losses) - min(losses):.3f}", f"{step_time(runs):.1f}"]
        )
    print(worker.table(table))
    goal = statistics.mean(map(final_loss, gpt2))
    share = max(share_to_reach(goal, entries) for entries in modern)
    print(f"The modern recipe passes GPT-2's final loss, {goal:.3f}, after {share:.0%} of the tokens (goal: 40%),")
    print(f"at {step_time(gpt2) / step_time(modern):.2f} times GPT-2's speed (goal: 0.9).")


def train(config: Config, flags: tuple[str, ...], seed: int) -> Entries:
    """Returns the log of a run of `train.py`."""
    every = max(1, config.steps // 20)
    options = {"seed": seed, "max_steps": config.steps, "warmup_steps": -(-config.steps // 10)}
    options |= {"eval_every": every, "log_every": max(1, every // 2), "save_every": config.steps}
    options |= {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "batch_size")}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    with tempfile.TemporaryDirectory() as folder:
        out = ["--data", config.data.resolve(), "--out", f"{folder}/run.pt"]
        worker.run_command([sys.executable, worker.REPOSITORY / "train.py", *flags, *words, *out], Path(folder))
        entries = read_log(Path(folder) / "run.jsonl")
    print(f"trained {' '.join(flags)}, seed {seed}: {final_loss(entries):.4f}", flush=True)
    return entries


def final_loss(entries: Entries) -> float:
    """Returns the validation loss of the last evaluation, in nats per token."""
    return [entry["val_loss"] for entry in entries if "val_loss" in entry][-1]


def share_to_reach(loss: float, entries: Entries) -> float:
    """Returns the share of a run's steps after which it had a validation loss, or infinity."""
    reached = [entry["step"] for entry in entries if entry.get("val_loss", math.inf) <= loss]
    return reached[0] / entries[-1]["step"] if reached else math.inf


def step_time(runs: list[Entries]) -> float:
    """Returns the median milliseconds of a step between neighbouring lines of the logs, without evaluations."""
    return statistics.median(
        1e3 * (b["seconds"] - a["seconds"]) / (b["step"] - a["step"])
        for entries in runs
        for a, b in itertools.pairwise(entries)
        if "loss" in b and b["step"] > a["step"]
    )


if __name__ == "__main__":
    run(main, Config)
