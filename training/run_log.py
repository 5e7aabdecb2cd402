"""The log of a training run: one JSON object per line, and the same numbers for TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from system.cli import plain
from system.errors import UserError
from system.files import atomic_write, naming
from system.untrusted import MAX_JSON_BYTES, parse_json
from training.config import TrainerConfig
from training.state import Listener, TrainingState

Sink = Callable[[dict[str, Any]], None]
"""Takes an entry of the log: `step` and numbers."""


class RunLog(Listener):
    """Writes the log; each entry gets the `seconds` since the run began, without interruptions."""

    def __init__(self) -> None:
        self.seconds_before, self.start = 0.0, time.perf_counter()
        self.sinks: list[Sink] = []

    def on_start(self, state: TrainingState) -> None:
        """Drops what a killed run logged after the current step. Raises UserError for a missing library."""
        config = state.config
        if config.tensorboard:
            self.sinks.append(tensorboard_sink(config))
        if config.wandb:
            self.sinks.append(wandb_sink(config))
        entries = read_log(config.log_path) if state.step else []
        kept = [entry for entry in entries if entry["step"] <= state.step]
        with atomic_write(config.log_path, "w") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in kept)
        self.seconds_before = max((entry["seconds"] for entry in kept), default=0.0)
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time since the run began, without interruptions."""
        return self.seconds_before + time.perf_counter() - self.start

    def on_log(self, state: TrainingState, entry: dict[str, Any]) -> None:
        self.write(state, entry)

    def on_evaluation(self, state: TrainingState, entry: dict[str, Any], is_best: bool) -> None:
        self.write(state, entry)

    def write(self, state: TrainingState, entry: dict[str, Any]) -> None:
        """Adds an entry: `step`, numbers, and perhaps `examples`."""
        path = state.config.log_path
        with naming(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({**entry, "seconds": round(self.seconds, 3)}) + "\n")
        for sink in self.sinks:
            sink({name: value for name, value in entry.items() if name != "examples"})


def read_log(path: Path) -> list[dict[str, Any]]:
    """Reads a log. Skips a last line that a kill cut short, and everything else that is not an entry."""
    entries = []
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict) and "step" in entry]


def holds_only_a_beginning(path: Path) -> bool:
    """Whether a file is a log, perhaps an empty one, without an evaluation after step 0. A last line may be cut short.

    A file with any other line, which somebody else may have written, is none.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        return False
    *lines, last = path.read_bytes().split(b"\n")
    beginning = b'{"step": '
    entries = []
    for line in lines:
        try:
            entries.append(parse_json(line.decode()))
        except ValueError:
            return False
    is_log = all(isinstance(entry, dict) and entry.keys() >= {"step", "seconds"} for entry in entries)
    is_cut = beginning.startswith(last[: len(beginning)])
    return is_log and is_cut and not any("val_loss" in entry and entry["step"] != 0 for entry in entries)


def tensorboard_sink(config: TrainerConfig) -> Sink:
    """Returns a sink that writes event files beside the log. Raises UserError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package: pip install tensorboard") from None
    writer = SummaryWriter(f"{config.out.with_suffix('')}_tensorboard")

    def add(entry: dict[str, Any]) -> None:
        for name, value in entry.items():
            if name != "step":
                writer.add_scalar(name, value, entry["step"])
        writer.flush()

    return add


def wandb_sink(config: TrainerConfig) -> Sink:
    """Returns a sink that sends entries to Weights & Biases. Raises UserError if that fails."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the package: pip install wandb") from None
    try:
        run = wandb.init(project="gpt2", name=config.out.stem, config=plain(config))
    except wandb.Error as error:
        raise UserError(f"--wandb: {error}") from None
    return lambda entry: run.log({name: value for name, value in entry.items() if name != "step"}, step=entry["step"])
