"""What a model is, in words: everything that says so, from one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weights.checkpoint import facts as facts
from weights.listing import data_of as data_of
from weights.listing import fine_tuning_command as fine_tuning_command
from weights.listing import newest as newest
from weights.listing import table as table


def loss_name(checkpoint: Mapping[str, Any]) -> str:
    """Returns what the validation loss of a checkpoint is: of few conversations none is held out."""
    return "validation loss" if checkpoint.get("is_held_out", True) else "loss on its training conversations"


def introduction(checkpoint: Mapping[str, Any]) -> str:
    """Returns one sentence about a checkpoint: its kind and size, and if known its data and its loss."""
    tasks = {"base": "completes text", "sft": "answers questions", "classifier": "classifies text"}
    n = sum(tensor.numel() for tensor in checkpoint["model"].values())
    text = f"A GPT-2 with {n:,} parameters that {tasks[checkpoint['kind']]}"
    if data := data_of(checkpoint.get("train_config", {})):
        text += f", trained on {data}"
    loss = (checkpoint.get("history") or [{}])[-1].get("val_loss")
    if loss is not None:
        text += f", with a {loss_name(checkpoint)} of {loss:.2f}"
    return text + "."
