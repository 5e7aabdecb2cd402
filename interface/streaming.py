"""What the chat and the completion share: texts on the page, and one that streams onto it."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from generation.text_model import Sample

MAX_CHARACTERS = 20_000  # of one text on the page
SECONDS_PER_DRAWING = 0.1


def clip(text: str) -> str:
    """Returns a text as the page shows it: only the end of a very long one."""
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"… ({len(text) - MAX_CHARACTERS:,} characters)\n{text[-MAX_CHARACTERS:]}"


def escape(text: str) -> str:
    """Returns a text as Markdown that shows it as it is."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def offer_prompts(prompts: Iterable[str], on_click: Callable[[str], Any]) -> None:
    """Draws texts to try as buttons. `on_click` gets the one that the user chooses."""
    st.caption("Try one of these:")
    with st.container(horizontal=True):
        for i, text in enumerate(prompts):
            st.button(escape(text), key=f"try {i}", on_click=on_click, args=(text,))


def show_stream(pieces: Generator[str, None, None], placeholder: DeltaGenerator, text: Callable[[], str]) -> None:
    """Shows `text()` in a placeholder while the pieces arrive, as plain text.

    When the user presses Stop, Streamlit runs the page again in a new thread. In this thread, the next use of Streamlit
    raises an exception, which ends the generation.
    """
    st.session_state["drawn for"] = None  # the sampling controls must not stop the text
    with contextlib.closing(pieces):
        drawn = time.monotonic()
        for _ in pieces:
            st.session_state.get("session")  # a use of Streamlit for every piece, so that Stop acts at once
            if time.monotonic() - drawn > SECONDS_PER_DRAWING:
                placeholder.text(clip(text()))
                drawn = time.monotonic()
    placeholder.text(clip(text()))


def speed_line(sample: Sample, start: float, block_size: int) -> str:
    """Returns the speed of a sample that began at `start` (of `time.monotonic`), and how full the context is."""
    n_tokens, seconds = len(sample.tokens), time.monotonic() - start
    n_used = min(sample.n_prompt + n_tokens, block_size)
    speed = n_tokens / max(seconds, 1e-9)
    return f"{n_tokens:,} tokens · {speed:,.1f} tokens/s · context {n_used:,} of {block_size:,}"
