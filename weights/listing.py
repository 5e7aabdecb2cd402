"""Which checkpoints there are: a table of them, and the newest that a script can use."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from system.errors import UserError
from system.untrusted import on_one_line
from weights.checkpoint import Checkpoint
from weights.files import FOLDER, CheckpointFile, checkpoint_files
from weights.loading import load_file

Wanted = Literal["model", "language model", "chat model", "classifier"]
"""What a script can use."""

_FITS: dict[Wanted, Callable[[Checkpoint], bool]] = {
    "model": lambda checkpoint: True,
    "language model": lambda checkpoint: checkpoint["kind"] != "classifier",
    "chat model": lambda checkpoint: bool(checkpoint.get("template")),
    "classifier": lambda checkpoint: checkpoint["kind"] == "classifier",
}
_KINDS = {"base": "base", "sft": "chat", "lora": "chat (LoRA)", "classifier": "classifier"}
_HEADINGS = ("name", "kind", "parameters", "loss", "data", "written", "made from")
_MAX_NAMED = 5
SMALL = 20_000_000
"""Parameters below which a model is trained with the presets for small ones."""
_MAKE_ONE = "make demo, or python train.py --preset demo --data TEXT.txt"


def newest(wanted: Wanted) -> str:
    """Returns the newest checkpoint under `checkpoints/` that is what is wanted, and names it on standard error.

    Snapshots and damaged files do not count. Raises UserError, which says what there is instead, and how to get one.
    """
    others = []
    for file, checkpoint, _ in _headers():
        if file.path.parent.name == "snapshots":
            continue
        if checkpoint and _FITS[wanted](checkpoint):
            untrained = ", still untrained" if checkpoint["kind"] == "base" and checkpoint.get("step") == 0 else ""
            print(on_one_line(f"model: {file.path}, the newest {wanted} in {FOLDER}/{untrained}"), file=sys.stderr)
            return str(file.path)
        others.append((str(file.path), checkpoint))
    command = "python train_classifier.py" if wanted == "classifier" else _MAKE_ONE
    bases = [(name, checkpoint) for name, checkpoint in others if checkpoint and checkpoint["kind"] == "base"]
    if bases and wanted == "classifier":
        command += f" --model {bases[0][0]}"
    elif wanted == "chat model":
        command = fine_tuning_command(bases[0][0], n_parameters(bases[0][1])) if bases else "make demo"
    named = [f"{name} ({_KINDS[checkpoint['kind']] if checkpoint else 'damaged'})" for name, checkpoint in others]
    there_is = f", only {', '.join(named[:_MAX_NAMED])}" if named else ""
    if len(named) > _MAX_NAMED:
        there_is += f" and {len(named) - _MAX_NAMED:,} more"
    raise UserError(f"no {wanted} in {FOLDER}/{there_is}: make one with {command}, or name one with --model")


def fine_tuning_command(name: object, n: int) -> str:
    """Returns the command that teaches chats to a model of `n` parameters. Small ones need the rates of the demo."""
    out = f"{FOLDER}/{Path(str(name)).stem}-chat.pt"
    preset = ["--preset", "demo"] if n < SMALL else []
    return shlex.join(["python", "train_sft.py", *preset, "--model", str(name), "--out", out])


def n_parameters(checkpoint: Checkpoint) -> int:
    """Returns the number of parameters of a checkpoint."""
    return sum(tensor.numel() for tensor in checkpoint["model"].values())


def table() -> str:
    """Returns a line for each checkpoint under `checkpoints/`, the newest first: name, kind, parameters, the validation
    loss of its weights, data, time, and the model that it was fine-tuned from. A damaged file has a line that says so.
    """
    rows: list[tuple[str, ...]] = [_HEADINGS]
    problems = {}
    for file, checkpoint, problem in _headers():
        name = str(file.path)
        if checkpoint is None:
            problems[len(rows)] = problem.removeprefix(name).lstrip(": ")
            rows.append((name, *[""] * (len(_HEADINGS) - 1)))
        else:
            *facts, parent = _facts(checkpoint)
            written = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.modified))
            rows.append((name, *facts, written, parent))
    if len(rows) == 1:
        return f"no model in {FOLDER}/: make one with {_MAKE_ONE}"
    rows = [tuple(map(on_one_line, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for i, row in enumerate(rows):
        cells = [
            cell.rjust(width) if heading in ("parameters", "loss") else cell.ljust(width)
            for cell, width, heading in zip(row, widths, _HEADINGS, strict=True)
        ]
        lines.append("  ".join(cells[:1] + [on_one_line(problems[i])] if i in problems else cells).rstrip())
    return "\n".join(lines)


def _headers() -> Iterator[tuple[CheckpointFile, Checkpoint | None, str]]:
    """Yields each checkpoint file, the newest first, with its content, or with None and what is wrong with it.

    The weights stay on the disk: they are mapped, and nothing reads them.
    """
    for file in checkpoint_files():
        try:
            yield file, load_file(file.path), ""
        except UserError as error:
            yield file, None, str(error)


def _facts(checkpoint: Checkpoint) -> tuple[str, str, str, str, str]:
    """Returns kind, parameters, loss, data and parent of a checkpoint, "-" for what it does not say."""
    options, history = checkpoint.get("train_config") or {}, checkpoint.get("history") or [{}]
    loss = history[-1].get("val_loss")
    return (
        _KINDS[checkpoint["kind"]],
        f"{n_parameters(checkpoint):,}",
        "-" if loss is None else f"{loss:.4f}" + ("" if checkpoint.get("is_held_out", True) else " (training)"),
        data_of(options) or "-",
        parent_of(options) or "-",
    )


def data_of(train_config: Mapping[str, Any]) -> str:
    """Returns the data that a run with these options reads: a folder, a file, the name of a data set, or ""."""
    return next((str(train_config[name]) for name in ("data", "input", "dataset") if train_config.get(name)), "")


def parent_of(train_config: Mapping[str, Any]) -> str:
    """Returns the model that a run with these options starts from, or nothing for random weights."""
    parent = train_config.get("model") or train_config.get("init_from") or "scratch"
    return "" if parent == "scratch" else str(parent)
