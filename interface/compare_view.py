"""Two completions of one prompt, side by side: by two models, or by one model at two temperatures."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from generation.config import SamplingConfig
from generation.text_model import TextModel
from interface.completion_view import begin, complete, decode, offer_beginnings, prompt_field
from interface.loaded_model import load_model
from interface.sessions import Completion, Session
from interface.sidebar import CheckpointFile, listed_checkpoints, name_of
from interface.streaming import clip, escape
from interface.token_view import draw_chips
from system.errors import UserError
from text.tokenizer import Tokenizer, legible


@dataclass(frozen=True)
class Side:
    """One of the two completions. It holds no model, so that the page keeps none in memory."""

    title: str
    tokenizer: Tokenizer
    completion: Completion

    @property
    def ids(self) -> list[int]:
        """The ids behind the prompt."""
        branch = self.completion.branch
        return [token.id for token in branch.tokens[branch.n_prompt :]]


def compare_view(text_model: TextModel, file: CheckpointFile, session: Session, prompts: list[str]) -> None:
    """Draws a prompt, the choice of the second side, and both completions. `file` is the model's; `prompts` are offered
    until one is completed."""
    state = st.session_state
    offers = st.container()
    prompt_field(session)
    other, temperature = pick_second(file)
    writers: list[tuple[TextModel, SamplingConfig]] = []
    started = st.button("Complete both", type="primary", icon=":material/play_arrow:") or state.pop("start", False)
    controls = st.empty()
    with session.lock:  # until a stopped generation has stored its text
        sides: tuple[Side, Side] | None = state.get("comparison")
    if started:
        first: SamplingConfig = state.sampling
        if first.seed is None:  # the same random numbers on both sides: only the model or the temperature differs
            first = dataclasses.replace(first, seed=secrets.randbelow(2**31))
        second = first if other else dataclasses.replace(first, temperature=temperature)
        other_model = load_second(other) if other else text_model
        if other_model is None:
            return
        writers = [(text_model, first), (other_model, second)]
        sides = (
            make_side(text_model, file, session.prompt, first),
            make_side(other_model, other or file, session.prompt, second),
        )
        state.comparison = sides
    if sides is None or sides[0].completion.file != file:
        offer_beginnings(prompts, offers)
        return
    summary = st.container()
    columns = [column.container(border=True) for column in st.columns(2)]
    placeholders = [draw_text(side, column) for side, column in zip(sides, columns, strict=True)]
    if writers:
        controls.button("Stop", icon=":material/stop_circle:")
        for (model, config), side, placeholder in zip(writers, sides, placeholders, strict=True):
            complete(model, config, side.completion.branch, session, placeholder)
        controls.empty()
    line, marks = difference(*sides)
    summary.markdown(escape(line))
    for i, (side, column) in enumerate(zip(sides, columns, strict=True)):
        branch = side.completion.branch
        with column:
            draw_chips(side.tokenizer, branch.tokens[branch.n_prompt :], 0, None, f"compared {i}", mark=marks[i])
            st.caption(branch.speed)


def pick_second(file: CheckpointFile) -> tuple[CheckpointFile | None, float]:
    """Offers the other checkpoints, or the same model at another temperature. Returns None for the same model."""
    others: dict[Path, CheckpointFile] = {path: one for path, one in listed_checkpoints().items() if path != file.path}
    path = st.selectbox(
        "Compare with",
        ["", *map(str, others)],  # not None, for which Streamlit shows no name
        format_func=lambda path: name_of(Path(path)) if path else "the same model at another temperature",
        key="second model",
    )
    temperature = 0.0
    if not path:
        st.session_state.setdefault("second temperature", 0.0)
        temperature = st.slider("Second temperature", 0.0, 2.0, step=0.05, key="second temperature")
    st.caption("Both use the controls of the sidebar and the same random numbers.")
    return others.get(Path(path)), temperature


def load_second(file: CheckpointFile) -> TextModel | None:
    """Loads another model. If it cannot write text, says so and returns None."""
    try:
        with st.spinner("Loading the second model"):
            text_model = load_model(str(file.path), file.modified).text_model
    except (UserError, OSError) as error:
        st.error("The second model cannot be loaded.")
        st.text(str(error))
        return None
    if text_model is None:
        st.info("The second model is a classifier, which writes no text.")
    return text_model


def make_side(text_model: TextModel, file: CheckpointFile, prompt: str, config: SamplingConfig) -> Side:
    """Returns a side that holds only its prompt."""
    title = f"{name_of(file.path)} · temperature {config.temperature:g}"
    return Side(title, text_model.tokenizer, begin(text_model, prompt, file))


def draw_text(side: Side, column: DeltaGenerator) -> DeltaGenerator:
    """Draws the title and the text of a side. Returns the place of the text, for one that grows."""
    column.markdown(f"**{escape(side.title)}**")
    placeholder = column.empty()
    placeholder.text(clip(decode(side.tokenizer, side.completion.branch.tokens)))
    return placeholder


def difference(a: Side, b: Side) -> tuple[str, tuple[int, int]]:
    """Returns a line that says how long two completions are the same, and the position behind the prompt at which each
    goes on by itself: of the first other token, or with two tokenizers of the token with the first other character. A
    text that ends there has no token at its position."""
    if a.tokenizer.spec == b.tokenizer.spec:
        n = common_length(a.ids, b.ids)
        marks, same = (n, n), f"{n:,} token{'s' * (n != 1)}"
    else:
        texts = [side.tokenizer.decode_bytes(side.ids) for side in (a, b)]
        n_bytes = common_length(*texts)
        n = len(texts[0][:n_bytes].decode(errors="ignore"))  # whole characters only
        marks, same = (token_at(a, n_bytes), token_at(b, n_bytes)), f"{n:,} character{'s' * (n != 1)}"
    ends = [mark == len(side.ids) for side, mark in zip((a, b), marks, strict=True)]
    if all(ends):
        return f"Both are the same: {same}.", marks
    begin = f"The same for {same}; then" if n else "They differ from the beginning:"
    return f"{begin} {next_token(a, marks[0])} and {next_token(b, marks[1])}.", marks


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns how many items two sequences share before they differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def token_at(side: Side, n_bytes: int) -> int:
    """Returns the position, behind the prompt, of the token that holds the byte at an offset."""
    end = 0
    for i, token in enumerate(side.ids):
        end += len(side.tokenizer.decode_bytes([token]))
        if end > n_bytes:
            return i
    return len(side.ids)


def next_token(side: Side, position: int) -> str:
    """Returns the token at a position behind the prompt with the model's probability of it, as text."""
    branch = side.completion.branch
    if position == len(side.ids):
        return "the end of the text"
    token = branch.tokens[branch.n_prompt + position]
    return f"“{legible(side.tokenizer.decode_bytes([token.id]))}” ({math.exp(token.logprob or 0.0):.0%})"
