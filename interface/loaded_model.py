"""The model on the page, loaded once for all sessions."""

from __future__ import annotations

from dataclasses import dataclass

import streamlit as st

from generation.text_model import TextModel
from weights import checkpoint
from weights.loading import load_checkpoint


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory."""

    facts: dict[str, str]
    """its kind, size, training and the like, each under a name"""
    text_model: TextModel | None
    """None for a classifier, which writes no text"""


@st.cache_resource(max_entries=1, show_spinner=False)
def load_model(path: str, modified: float) -> LoadedModel:
    """Loads a checkpoint. `modified`, the time of its last change, is a part of the cache's key: a new file under the
    old name is loaded again.

    Raises UserError if the file cannot be read.
    """
    state = load_checkpoint(path, kinds=("base", "sft", "classifier"))
    facts = checkpoint.facts(state)
    if state["kind"] == "classifier":
        return LoadedModel(facts, None)
    text_model = TextModel.from_checkpoint(state, path)
    for parameter in text_model.model.parameters():  # off the file's pages: somebody may overwrite the file
        parameter.data = parameter.data.clone()
    return LoadedModel(facts, text_model)
