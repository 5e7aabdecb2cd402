"""Weights in and out: one dict of plain tensors, numbers, strings, lists and dicts in a `.pt` file.

Nothing in a file is ever executed: everything is read with `weights_only=True`.
"""

import dataclasses
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import torch

import tokenizer as tokenizers
from cli import UserError
from files import atomic_write
from model import GPT, GPTConfig

FORMAT_VERSION = 1


def save(path: str | Path, checkpoint: dict) -> None:
    """Writes a checkpoint atomically, with `format_version` and `created` (UTC, ISO 8601) added.

    Raises UserError where the disk is full or the folder cannot be written; what was at `path` is as it was.
    """
    created = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        with atomic_write(path) as file:
            torch.save({"format_version": FORMAT_VERSION, "created": created, **checkpoint}, file)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides what went wrong
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write {path}: {cause.strerror}; what was there is as it was") from None


def load(path: str | Path, verify: bool = False) -> dict:
    """Reads a checkpoint onto the CPU, its tensors mapped from the file; `verify` compares the checksums first.

    Raises UserError where the file is missing, damaged, no checkpoint of this project, or from a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint {path}: train one with train.py, or name one with --model")
    try:
        if verify and (damaged := zipfile.ZipFile(path).testzip()):
            raise UserError(f"{path} is damaged (checksum of {damaged})")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        config = GPTConfig(**checkpoint["config"])
        checkpoint["model"], checkpoint["tokenizer"], checkpoint["kind"]  # noqa: B018
    except UserError:
        raise
    except Exception as error:  # whatever a damaged or foreign file makes the readers raise
        newer = isinstance(error, TypeError) and "unexpected keyword" in str(error)
        what = "is from a newer version of this project" if newer else "is not a checkpoint of this project, or damaged"
        raise UserError(f"{path} {what} ({type(error).__name__})") from None
    if checkpoint.get("format_version", 0) > FORMAT_VERSION:
        raise UserError(f"{path} is from a newer version of this project: update it")
    return {**checkpoint, "config": config}


def build(checkpoint: dict, path: str | Path, device: torch.device | str = "cpu") -> GPT:
    """Builds the model of a loaded checkpoint, in evaluation mode. Raises UserError where the weights misfit."""
    with torch.device("meta"):
        model = GPT(checkpoint["config"])
    model = model.to_empty(device=device)
    if checkpoint["config"].tie_weights:
        model.lm_head.weight = model.wte.weight
    try:
        weights = checkpoint["model"]
        if checkpoint["config"].tie_weights:
            weights = {**weights, "lm_head.weight": weights["wte.weight"]}
        model.load_state_dict(weights)
    except (RuntimeError, KeyError):
        raise UserError(f"{path} is damaged: its weights do not fit its config") from None
    return model.eval()


def describe(checkpoint: dict) -> str:
    """Returns the facts of a checkpoint in a few words, for people."""
    history = checkpoint.get("history") or [{}]
    loss = history[-1].get("val_loss")
    return f"{checkpoint['kind']}, step {checkpoint.get('step', 0):,}" + (
        "" if loss is None else f", validation loss {loss:.3f}"
    )


def tokenizer(checkpoint: dict) -> tokenizers.Tokenizer:
    """Returns the tokenizer that a checkpoint was trained with."""
    return tokenizers.from_spec(checkpoint["tokenizer"])


def pack(model: GPT, **facts: object) -> dict:
    """Returns the dict to save for a model: its weights (the tied head once), its config and the given facts."""
    weights = model.state_dict()
    if model.config.tie_weights:
        del weights["lm_head.weight"]
    return {"model": weights, "config": dataclasses.asdict(model.config), **facts}
