"""The models on the page, loaded once for all sessions."""

from __future__ import annotations

from dataclasses import dataclass

import streamlit as st

from generation.text_model import TextModel
from weights.describe import facts, introduction
from weights.loading import load_checkpoint


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory."""

    facts: dict[str, str]
    """its kind, size, training and the like, each under a name"""
    introduction: str
    """one sentence about the model"""
    prompts: list[str]
    """short texts like those that it was trained on: beginnings of texts, or for a chat model questions"""
    text_model: TextModel | None
    """None for a classifier, which writes no text"""

    @property
    def beginnings(self) -> list[str]:
        """Those of the prompts that are beginnings of texts."""
        return [] if self.text_model and self.text_model.template else self.prompts


@st.cache_resource(max_entries=2, show_spinner=False)  # two, to compare them
def load_model(path: str, modified: float) -> LoadedModel:
    """Loads a checkpoint. `modified`, the time of its last change, is a part of the cache's key: a new file under the
    old name is loaded again.

    Raises UserError if the file cannot be read.
    """
    state = load_checkpoint(path, kinds=("base", "sft", "classifier"))
    texts = (facts(state), introduction(state), state.get("prompts", []))
    if state["kind"] == "classifier":
        return LoadedModel(*texts, None)
    text_model = TextModel.from_checkpoint(state, path)
    for parameter in text_model.model.parameters():  # off the file's pages: somebody may overwrite the file
        parameter.data = parameter.data.clone()
    return LoadedModel(*texts, text_model)
