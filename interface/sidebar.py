"""The controls beside every mode: which model, and how it samples. Imports no torch: the page shows them at once."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from generation.config import SamplingConfig
from system.untrusted import is_text
from weights.files import FOLDER, CheckpointFile, checkpoint_files

NO_MODEL = """There is no model yet. Make one with either of these:

    make demo                                    # a small one, on this computer, in a few minutes
    python prepare_data.py && python train.py    # GPT-2, on a GPU"""


def pick_checkpoint() -> CheckpointFile | None:
    """Offers the checkpoints under `checkpoints/`, the newest first. Returns None if there are none."""
    files = listed_checkpoints()
    if not files:
        st.title("GPT-2")
        st.info(NO_MODEL)
        return None
    paths = list(files)
    names = {path: name_of(path) for path in paths}
    if "model" not in st.session_state:  # after a reload, the page's address names the model
        st.session_state.model = next((p for p in paths if names[p] == st.query_params.get("model")), paths[0])
    previous = st.session_state.model
    if previous not in paths:
        st.warning("The chosen model no longer exists:")
        st.text(previous)
    path = st.selectbox("Model", paths, key="model", format_func=lambda path: names[path])
    if st.query_params.get("model") != names[path]:
        st.query_params["model"] = names[path]
    return files[path]


def listed_checkpoints() -> dict[Path, CheckpointFile]:
    """Returns the checkpoints that the page offers, by path, the newest first."""
    return {file.path: file for file in checkpoint_files() if is_text(str(file.path))}  # the page can show UTF-8 only


def name_of(path: Path) -> str:
    """Returns the name of a checkpoint on the page."""
    return str(path.relative_to(FOLDER))


def mode_key(file: CheckpointFile) -> str:
    """Returns the key under which the session's state holds the mode of the page for a model."""
    return f"mode of {file.path}"


@st.fragment  # a change here neither redraws the whole page nor stops an answer
def pick_sampling() -> None:
    """Draws the sampling controls, and stores their values for the next answer in the session.

    Draws the whole page again only if it shows probabilities that depend on the values; then no text is being written.
    """
    temperature = st.slider(
        "Temperature",
        0.0,
        2.0,
        0.8,
        0.05,
        help="Below 1, the text becomes more predictable; above 1, more varied. At 0, the likeliest token always wins.",
    )
    top_k = st.slider("Top k", 0, 200, 50, help="Sample from this many of the likeliest tokens; 0 means all.")
    top_p = st.slider(
        "Top p",
        0.05,
        1.0,
        1.0,
        0.05,
        help="Sample from the smallest set of tokens that together have this probability.",
    )
    penalty = st.slider(
        "Repetition penalty", 1.0, 2.0, 1.0, 0.05, help="Above 1, tokens that already occurred become less likely."
    )
    length = st.slider("Length", 1, 1000, 200, help="Maximum length of an answer or a completion, in tokens.")
    seed = st.number_input(
        "Seed", 0, None, None, help="The same seed gives the same text. Empty: a new text each time."
    )
    sampling = SamplingConfig(
        max_new_tokens=length,
        temperature=temperature,
        top_k=top_k or None,
        top_p=top_p,
        repetition_penalty=penalty,
        seed=seed,
    )
    st.session_state.sampling = sampling
    if st.session_state.get("drawn for") not in (None, sampling):  # the page shows bars, of other values
        st.rerun()
