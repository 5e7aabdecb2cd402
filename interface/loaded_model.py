"""The models on the page, loaded once for all sessions."""

from __future__ import annotations

from dataclasses import dataclass

import streamlit as st

from generation.text_model import TextModel
from weights import checkpoint
from weights.describe import loss_name
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
    texts = (checkpoint.facts(state), introduction(state), state.get("prompts", []))
    if state["kind"] == "classifier":
        return LoadedModel(*texts, None)
    text_model = TextModel.from_checkpoint(state, path)
    for parameter in text_model.model.parameters():  # off the file's pages: somebody may overwrite the file
        parameter.data = parameter.data.clone()
    return LoadedModel(*texts, text_model)


def introduction(state: checkpoint.Checkpoint) -> str:
    """Returns one sentence about a checkpoint: its kind and size, and if known its data and its loss."""
    tasks = {"base": "completes text", "sft": "answers questions", "classifier": "classifies text"}
    text = f"A GPT-2 with {rounded(sum(t.numel() for t in state['model'].values()))} parameters that "
    text += tasks[state["kind"]]
    options = state.get("train_config", {})
    if data := options.get("input") or options.get("data") or options.get("dataset"):
        text += f", trained on {data}"
    loss = (state.get("history") or [{}])[-1].get("val_loss")
    if loss is not None:
        text += f", with a {loss_name(state)} of {loss:.2f}"
    return text + "."


def rounded(n: int) -> str:
    """Returns a large number as text, such as "1.2 million"."""
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if n >= size:
            return f"{n / size:.3g} {name}"
    return f"{n:,}"
