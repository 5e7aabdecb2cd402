"""The models on the page, loaded once for all visitors."""

import streamlit as st

from generation.text_model import TextModel
from weights.checkpoint import Checkpoint
from weights.loading import load_checkpoint


@st.cache_resource(max_entries=2, show_spinner=False)  # two, to compare them
def load_model(path: str, modified: float) -> tuple[Checkpoint, TextModel | None]:
    """Loads a checkpoint, and the model in it: None for a classifier, which writes no text. `modified`, the time of its
    last change, is a part of the cache's key: a new file under the old name is loaded again.

    Raises UserError if the file cannot be read.
    """
    state = load_checkpoint(path, kinds=("base", "sft", "classifier"))
    if state["kind"] == "classifier":
        return state, None
    text_model = TextModel.from_checkpoint(state, path)
    for parameter in text_model.model.parameters():  # off the file's pages: a run may overwrite the file
        parameter.data = parameter.data.clone()
    return state, text_model
