"""What each part of the modern recipe gains over GPT-2's: both trained on the same tokens, and the modern one without
each of its parts.

    python -m benchmarks.recipe                    # Python's documentation, under an hour on two cores
    python -m benchmarks.recipe --data FOLDER …    # prepared data of one's own, other sizes

Every run is `train.py` in a process of its own. Both recipes get the best of three learning rates, tried with the first
seed. Losses are those of the last evaluation, in nats per token; tokens/s are medians between evaluations.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import train
from model import GPT, GPTConfig
from system.cli import run
from system.errors import UserError, require, require_at_least
from text.token_files import read_token_meta
from training.plots import save_figure
from training.run_log import read_log

REPOSITORY = Path(__file__).resolve().parent.parent
GPT2 = ["--preset", "gpt2", "--min-lr", "0"]
MODERN = ["--preset", "modern"]
PARTS = {
    "learned positions": ["--no-rotary"],
    "no QK-norm": ["--no-qk-norm"],
    "no value embeddings": ["--no-value-embeddings"],
    "GELU": ["--no-squared-relu"],
    "a tied head": ["--tie-weights"],
    "AdamW alone": ["--optimizer", "adamw"],
    "embeddings no faster": ["--embedding-lr-scale", "1"],
    "a cosine": ["--cooldown", "0"],
}
"""What stands in for each part of the modern recipe, and its flags."""


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
    share: float = 0.4
    """share of the tokens with which the modern recipe must reach GPT-2's final loss"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of the two recipes; the parts are left out with the first one"""
    gpt2_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    """learning rates to try for GPT-2's recipe"""
    modern_rates: tuple[float, ...] = (2.5e-3, 5e-3, 1e-2)
    """learning rates to try for the modern recipe"""
    plot: Path = Path("recipe.png")
    """the curves of both recipes"""

    def __post_init__(self) -> None:
        require_at_least(1, self, "n_layer", "n_head", "n_embd", "block_size", "batch_size", "steps")
        require(0 < self.share <= 1, "--share must be above 0 and at most 1")
        require(bool(self.seeds and self.gpt2_rates and self.modern_rates), "name at least one seed and rate")


def main(config: Config) -> None:
    """Trains all runs and prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(config, Path(folder))
        first = config.seeds[0]
        gpt2_rate = runs.best_rate("GPT-2", GPT2, config.gpt2_rates)
        modern_rate = runs.best_rate("modern", MODERN, config.modern_rates)
        gpt2_flags, flags = [*GPT2, "--learning-rate", str(gpt2_rate)], [*MODERN, "--learning-rate", str(modern_rate)]
        gpt2 = [runs.train(gpt2_flags, seed) for seed in config.seeds]
        modern = [runs.train(flags, seed) for seed in config.seeds]
        short = [runs.train(flags, seed, max(1, round(config.share * config.steps))) for seed in config.seeds]
        print_sizes(config, runs.vocab_size)
        print(f"{'':30}{'final loss':>12}{'spread':>9}{'tokens/s':>11}")
        print_row("GPT-2", gpt2)
        print_row("modern", modern)
        print_row(f"modern, {config.share:.0%} of the tokens", short)
        for part, changed in PARTS.items():
            print_row(f"modern, with {part}", [runs.train([*flags, *changed], first)])
        goal = statistics.mean(map(final_loss, gpt2))
        crossings = [tokens_to_reach(goal, entries) for entries in modern]
        reached = statistics.mean(map(final_loss, short))
        speed = statistics.median(map(tokens_per_second, modern)) / statistics.median(map(tokens_per_second, gpt2))
        print(
            f"GPT-2's final loss: {goal:.3f}. The modern recipe with {config.share:.0%} of the tokens: {reached:.3f} "
            f"(goal: no more). Its whole runs pass GPT-2's final loss after {max(crossings):.0%} of their tokens. "
            f"Its speed: {speed:.2f} times GPT-2's (goal: 0.9)."
        )
        draw({"GPT-2": gpt2, "modern": modern, f"modern, {config.share:.0%} of the tokens": short}, config.plot)
        print(f"curves in {config.plot}")


Entries = list[dict[str, Any]]


class Runs:
    """Runs of `train.py` on one data set, each logged in a folder."""

    def __init__(self, config: Config, folder: Path):
        """Prepares the data if none is given."""
        self.config, self.folder, self.logs = config, folder, dict[tuple[str, ...], Entries]()
        self.data = config.data.resolve() if config.data else folder / "data"
        if not config.data:
            size = str(config.vocab_size)
            self.script("prepare_data.py", "--dataset", "pydocs", "--vocab-size", size, "--out", str(self.data))
        self.vocab_size = -(-read_token_meta(self.data)["n_tokens"] // 64) * 64

    def script(self, *arguments: str) -> None:
        """Runs a script of the project. Raises UserError if it fails."""
        command = [sys.executable, str(REPOSITORY / arguments[0]), *arguments[1:]]
        result = subprocess.run(command, cwd=self.folder, capture_output=True, encoding="utf-8")
        if result.returncode:
            raise UserError(f"{arguments[0]} failed: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")

    def train(self, flags: list[str], seed: int, steps: int | None = None) -> Entries:
        """Returns the log of a run, which is trained if it has not been."""
        c, steps = self.config, steps or self.config.steps
        key = (*flags, str(seed), str(steps))
        if key not in self.logs:
            shape = ("n_layer", "n_head", "n_embd", "block_size", "batch_size")
            options = [text for name in shape for text in (f"--{name.replace('_', '-')}", str(getattr(c, name)))]
            options += ["--seed", str(seed), "--max-steps", str(steps), "--warmup-steps", str(-(-steps // 10))]
            every = max(1, steps // 20)
            options += ["--eval-every", str(every), "--log-every", str(max(1, every // 2)), "--save-every", str(steps)]
            self.script("train.py", *flags, *options, "--data", str(self.data), "--out", "run.pt", "--overwrite")
            self.logs[key] = read(self.folder / "run.jsonl", tokens_per_step=c.batch_size * c.block_size)
            print(
                f"trained {' '.join(key[:-2])}, seed {seed}, {steps} steps: {final_loss(self.logs[key]):.4f}",
                flush=True,
            )
        return self.logs[key]

    def best_rate(self, name: str, flags: list[str], rates: tuple[float, ...]) -> float:
        """Returns the learning rate with the lowest final loss, with the first seed."""
        losses = {
            rate: final_loss(self.train([*flags, "--learning-rate", str(rate)], self.config.seeds[0])) for rate in rates
        }
        best = min(losses, key=lambda rate: losses[rate])
        print(f"{name}: the best of the learning rates {', '.join(map(str, rates))} is {best}", flush=True)
        return best


def read(path: Path, tokens_per_step: int) -> Entries:
    """Returns the entries of a log, each with its tokens."""
    return [{**entry, "tokens": entry["step"] * tokens_per_step} for entry in read_log(path)]


def final_loss(entries: Entries) -> float:
    """Returns the validation loss of the last evaluation, in nats per token."""
    return [entry["val_loss"] for entry in entries if "val_loss" in entry][-1]


def tokens_to_reach(loss: float, entries: Entries) -> float:
    """Returns the share of a run's tokens after which it had a validation loss, or infinity."""
    reached = [entry["tokens"] for entry in entries if entry.get("val_loss", float("inf")) <= loss]
    return reached[0] / entries[-1]["tokens"] if reached else float("inf")


def tokens_per_second(entries: Entries) -> float:
    """Returns the median speed between neighbouring lines of the log, without evaluations."""
    pairs = [(a, b) for a, b in zip(entries, entries[1:], strict=False) if "loss" in b and b["seconds"] > a["seconds"]]
    return statistics.median((b["tokens"] - a["tokens"]) / (b["seconds"] - a["seconds"]) for a, b in pairs)


def print_sizes(config: Config, vocab_size: int) -> None:
    """Prints parameters outside embeddings and FLOPs per token of both recipes, and where this runs."""
    import torch

    for name in ("gpt2", "modern"):
        shape = train.model_shape(train.PRESETS[name])
        shape |= {size: getattr(config, size) for size in ("n_layer", "n_head", "n_embd", "block_size")}
        with torch.device("meta"):
            model = GPT(GPTConfig(**shape, vocab_size=vocab_size, n_tokens=vocab_size))
        in_blocks = sum(p.numel() for p in model.h.parameters())
        print(f"{name}: {in_blocks:,} parameters in its layers, {model.flops_per_token():,} FLOPs per token")
    tokens = config.steps * config.batch_size * config.block_size
    print(f"{tokens:,} tokens a run, seeds {', '.join(map(str, config.seeds))}, {os.cpu_count()} cores")


def print_row(name: str, runs: list[Entries]) -> None:
    """Prints the mean final loss of runs, its spread and the median speed."""
    losses = [final_loss(entries) for entries in runs]
    spread = f"{max(losses) - min(losses):.3f}" if len(losses) > 1 else "-"
    speed = statistics.median(map(tokens_per_second, runs))
    print(f"{name:34}{statistics.mean(losses):>8.3f}{spread:>9}{speed:>11,.0f}", flush=True)


def draw(recipes: dict[str, list[Entries]], path: Path) -> None:
    """Draws the validation losses of every run over its tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, (name, runs) in enumerate(recipes.items()):
        for entries in runs:
            points = [
                (entry["tokens"] / 1e6, entry["val_loss"])
                for entry in entries
                if entry.get("val_loss") and entry["step"]
            ]
            axes.plot(
                *zip(*points, strict=True), color=f"C{i}", linewidth=1, label=name if entries is runs[0] else None
            )
    goal = statistics.mean(map(final_loss, next(iter(recipes.values()))))
    axes.axhline(goal, color="0.5", linestyle=":", linewidth=1, label=f"GPT-2's final loss, {goal:.2f}")
    axes.set(
        xlabel="million tokens", ylabel="validation loss, nats per token", title="GPT-2's recipe and the modern one"
    )
    axes.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    run(main, Config)
