"""The log of a training run: one JSON object per line, and the same numbers for TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from system.cli import plain
from system.errors import UserError
from system.files import atomic_write
from system.untrusted import MAX_JSON_BYTES, parse_json
from training.config import TrainerConfig
from training.state import Listener, TrainingState

Sink = Callable[[dict[str, Any]], None]
"""Takes an entry of the log: `step` and numbers."""


class RunLog(Listener):
    """Writes the log. Each line gets the `seconds` since the run began, without interruptions, and `max_steps`."""

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
        with atomic_write(config.log_path, "w") as file:
            for entry in entries(config.log_path) if state.step else ():
                if entry["step"] <= state.step:
                    file.write(json.dumps(entry) + "\n")
                    self.seconds_before = max(self.seconds_before, entry.get("seconds", 0.0))
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
        line = {**entry, "seconds": round(self.seconds, 3), "max_steps": state.config.max_steps}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for sink in self.sinks:
            sink({name: value for name, value in entry.items() if name != "examples"})


def read_log(path: Path) -> list[dict[str, Any]]:
    """Returns the entries of a log, without numbers that no plot can show; of a very long log, some 60,000 entries."""
    shown = (
        {name: value for name, value in entry.items() if name == "examples" or abs(value) < 1e30}
        for entry in entries(path, last_bytes=2**23)
    )
    return [entry for entry in shown if is_entry(entry)]  # examples beside an infinite loss are gone too


def entries(path: Path, last_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """Yields the entries of a log, or those in its last bytes; none if there is no such file.

    Skips a last line that a kill cut short, and everything else that is not an entry. Raises UserError if the file
    cannot be read.
    """
    try:
        if not path.is_file():
            return
        with open(path, "rb") as file:
            if last_bytes is not None:
                file.seek(max(0, path.stat().st_size - last_bytes))
            while line := file.readline(MAX_JSON_BYTES):
                if is_entry(entry := _parse(line)):
                    yield entry
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def is_entry(entry: object) -> bool:
    """Whether a value is an entry of a log."""
    return isinstance(entry, dict) and isinstance(entry.get("step"), int)


def _parse(line: bytes) -> Any:
    """Returns the value in a line of a log, or None if the line cannot be an entry."""
    try:
        return parse_json(line.decode("utf-8")) if line.startswith(b'{"') else None
    except ValueError:
        return None


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
