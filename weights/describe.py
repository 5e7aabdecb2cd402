"""What a model is, in words: everything that says so, from one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def loss_name(checkpoint: Mapping[str, Any]) -> str:
    """Returns what the validation loss of a checkpoint is: of few conversations none is held out."""
    return "validation loss" if checkpoint.get("is_held_out", True) else "loss on its training conversations"
