"""What the modes of the page share: its state, the sidebar, and texts. Imports no torch: the controls come at once."""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from generation.config import SamplingConfig
from weights.files import FOLDER, CheckpointFile, checkpoint_files

if TYPE_CHECKING:
    from generation.text_model import Sample, Token
    from text.chat import Message
    from text.tokenizer import Tokenizer

NO_MODEL = """There is no model yet. Make one with either of these:

    make demo                                    # a small one, on this computer, in a few minutes
    python prepare_data.py && python train.py    # GPT-2, on a GPU"""
MAX_PAGES = 50
"""Pages whose state outlives a reload."""
WIDGETS = ("mode", "prompt", "step", "tokens", "part", "compare", "second model", "second temperature")
"""Keys of the widgets whose values stay while another mode hides them, and after a reload."""
SECONDS_PER_DRAWING = 0.1


@dataclass(eq=False)
class Text:
    """A prompt and its continuation by a model, token by token. It holds no model, so that the page keeps none."""

    name: str
    file: CheckpointFile
    """the model's checkpoint"""
    tokenizer: Tokenizer
    block_size: int
    tokens: list[Token]
    n_prompt: int
    """how many of `tokens` are the prompt"""
    n_full_prompt: int
    """tokens of the prompt before it was cut to the context"""
    speed: str = ""
    is_new: bool = True
    """whether the model has yet to continue it"""

    @property
    def ids(self) -> list[int]:
        """The ids of the tokens."""
        return [token.id for token in self.tokens]

    def decode(self) -> str:
        """Returns the characters, without the `<|endoftext|>` that opens a document."""
        return self.tokenizer.decode(self.ids).removeprefix("<|endoftext|>")


@dataclass
class PageState:
    """Everything that a visitor made. It outlives a reload, since the page's address holds its key.

    Whoever has the address of a page sees its texts; nobody else does. Nothing is written to the disk.
    """

    key: str
    widgets: dict[str, Any] = field(default_factory=dict)
    """values of widgets by their key"""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    bars_for: SamplingConfig | None = None
    """the sampling controls for which the page shows bars, if it shows any"""
    file: CheckpointFile | None = None
    """the model's checkpoint"""
    computed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """the last result of each computation with this model, and what else it depends on"""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """held while the model writes"""
    messages: list[Message] = field(default_factory=list)
    """the chat"""
    answers: list[Text] = field(default_factory=list)
    """the tokens of every second message"""
    message_to_send: str = ""
    is_editing: bool = False
    clicked_token: tuple[int, int] | None = None
    """the chosen token of the chat: number of its message, and position in its text"""
    starts: bool = False
    """whether the next drawing of the page completes the prompt"""
    branches: list[Text] = field(default_factory=list)
    """the completion and the other ways in which it went on, the oldest first"""
    branch: Text | None = None
    """the one on the page"""
    compared: list[Text] = field(default_factory=list)
    """two completions of one prompt, or none"""
    inside_text: str | None = None
    """the text in the mode Inside, if the user has typed or chosen one"""
    inside_head: int = 0
    """the chosen attention head, counted through all layers, and the position that looks"""
    inside_query: int | None = None
    inside_cell: tuple[int, int] | None = None
    """the chosen layer and position"""

    def once(self, name: str, key: Any, compute: Callable[[], Any]) -> Any:
        """Returns the result of a computation. As long as its key stays the same, it is not computed again: a slider or
        a click should not cost a forward pass."""
        if name not in self.computed or self.computed[name][0] != key:
            self.computed[name] = (key, compute())
        return self.computed[name][1]


_pages: dict[str, PageState] = {}  # by key, the last used at the end
_pages_lock = threading.Lock()


def open_page() -> PageState:
    """Returns the state of this page: after a reload the one that the address names, otherwise a new one.

    An address with an unknown key gets a new one: nobody can choose the key of somebody else.
    """
    state = st.session_state
    with _pages_lock:
        if "page" not in state:
            state.page = _pages.get(st.query_params.get("session", "")) or PageState(secrets.token_urlsafe(16))
        page: PageState = state.page
        _pages.pop(page.key, None)
        _pages[page.key] = page
        while len(_pages) > MAX_PAGES:
            del _pages[next(iter(_pages))]
    if st.query_params.get("session") != page.key:
        st.query_params["session"] = page.key
    page.widgets |= {key: state[key] for key in WIDGETS if key in state}
    state.update(page.widgets)
    page.bars_for = None
    return page


def current_page() -> PageState:
    return st.session_state.page


def pick_checkpoint() -> CheckpointFile | None:
    """Offers the checkpoints under `checkpoints/`, the newest first. Returns None if there are none."""
    state, files = st.session_state, {file.path: file for file in checkpoint_files()}
    if not files:
        st.title("GPT-2")
        st.info(NO_MODEL)
        return None
    if "model" not in state:  # after a reload, the page's address names the model
        state.model = next((path for path in files if name_of(path) == st.query_params.get("model")), [*files][0])
    if state.model not in files:
        st.warning("The chosen model no longer exists:")
        st.text(state.model)
    path = st.selectbox("Model", files, key="model", format_func=name_of, on_change=forget_mode)
    if st.query_params.get("model") != name_of(path):
        st.query_params["model"] = name_of(path)
    page = current_page()
    if files[path] != page.file:
        page.file, page.computed = files[path], {}
    return files[path]


def forget_mode() -> None:
    """Lets another model open in its own mode."""
    st.session_state.pop("mode", None)
    current_page().widgets.pop("mode", None)


def name_of(path: Path) -> str:
    return str(path.relative_to(FOLDER))


@st.fragment  # a change here neither redraws the whole page nor stops an answer
def pick_sampling() -> None:
    """Draws the sampling controls, and keeps their values for the next answer.

    Draws the whole page again only if it shows probabilities that depend on the values; then the model is not writing.
    """
    page = current_page()
    temperature = "Below 1, the text becomes more predictable; above 1, more varied. 0 takes the likeliest token."
    top_k = "Sample from this many of the likeliest tokens; 0 means all."
    top_p = "Sample from the smallest set of tokens that together have this probability."
    penalty = "Above 1, tokens that already occurred become less likely."
    seed = "The same seed gives the same text. Empty: a new text each time."
    page.sampling = SamplingConfig(
        temperature=st.slider("Temperature", 0.0, 2.0, 0.8, 0.05, help=temperature),
        top_k=st.slider("Top k", 0, 200, 50, help=top_k) or None,
        top_p=st.slider("Top p", 0.05, 1.0, 1.0, 0.05, help=top_p),
        repetition_penalty=st.slider("Repetition penalty", 1.0, 2.0, 1.0, 0.05, help=penalty),
        max_new_tokens=st.slider("Length", 1, 1000, 200, help="Maximum length of a text, in tokens."),
        seed=st.number_input("Seed", 0, None, None, help=seed),
    )
    if page.bars_for not in (None, page.sampling):
        st.rerun()


def escape(text: str) -> str:
    """Returns a text as Markdown that shows it as it is."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def offer_prompts(prompts: Iterable[str], on_click: Callable[[str], Any]) -> None:
    """Draws texts to try as buttons. `on_click` gets the one that the user chooses."""
    st.caption("Try one of these:")
    with st.container(horizontal=True):
        for i, text in enumerate(prompts):
            st.button(escape(text), key=f"try {i}", on_click=on_click, args=(text,))


def show_stream(text: Text, samples: Iterator[Sample], placeholder: DeltaGenerator, before: str = "") -> Sample:
    """Shows a sample while it grows, preceded by `before`, and adds its tokens to a text. Returns the sample.

    When the user presses Stop, Streamlit draws the page in a new thread. In this thread, the next use of Streamlit
    raises an exception, which ends the generation; the text so far stays.
    """
    page, old = current_page(), text.tokens
    page.bars_for, text.is_new = None, False  # the sampling controls must not stop the text
    start = drawn = time.monotonic()
    with page.lock:
        for sample in samples:
            text.tokens = [*old, *sample.tokens]
            now, n, block_size = time.monotonic(), len(sample.tokens), text.block_size
            n_used = min(len(text.tokens), block_size)
            text.speed = f"{n:,} tokens · {n / (now - start):,.1f} tokens/s · context {n_used:,} of {block_size:,}"
            st.session_state.get("page")  # uses Streamlit after every token, so that Stop acts at once
            if now - drawn > SECONDS_PER_DRAWING:
                placeholder.text(before + sample.text)
                drawn = now
        placeholder.text(before + sample.text)
    return sample
