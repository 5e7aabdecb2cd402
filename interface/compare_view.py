"""Two completions of one prompt, side by side: by two models, or by one model at two temperatures."""

import bisect
import dataclasses
import math
import os
import secrets
from itertools import accumulate
from pathlib import Path

import streamlit as st

from generation.config import SamplingConfig
from generation.text_model import TextModel
from interface.completion_view import offer_beginnings, prompt_field, write_text
from interface.loaded_model import load_model
from interface.page import Text, current_page, escape, name_of
from interface.tokens import begin, draw_chips, name_of_token
from system.errors import UserError
from weights.files import CheckpointFile, checkpoint_files


def compare_view(text_model: TextModel, file: CheckpointFile, prompts: list[str]) -> None:
    """Draws a prompt, the choice of the second side, and both completions. `file` is the model's; `prompts` are offered
    until one is completed."""
    page, offers = current_page(), st.container()
    prompt, starts = prompt_field(page, "Complete both")
    config = page.sampling
    if config.seed is None:  # the same random numbers on both sides
        config = dataclasses.replace(config, seed=secrets.randbelow(2**31))
    other_file, other_config = pick_second(file, config)
    controls = st.empty()
    writers: list[tuple[TextModel, SamplingConfig]] = []
    if starts:
        try:
            with st.spinner("Loading the second model"):
                _, other_model = load_model(str(other_file.path), other_file.modified)
            if other_model is None:
                raise UserError("The second model is a classifier, which writes no text.")
        except (UserError, OSError) as error:
            st.error("The second model cannot be used.")
            st.text(str(error))
            return
        writers = [(text_model, config), (other_model, other_config)]
        page.compared = [
            begin(model, one, model.prompt_ids(prompt), f"{name_of(one.path)} · temperature {config.temperature:g}")
            for (model, config), one in zip(writers, (file, other_file), strict=True)
        ]
    if not page.compared or page.compared[0].file != file:
        with offers:
            offer_beginnings(page, prompts)
        return
    summary = st.container()
    columns = [column.container(border=True) for column in st.columns(2)]
    placeholders = []
    for text, column in zip(page.compared, columns, strict=True):
        column.markdown(f"**{escape(text.name)}**")
        placeholders.append(column.empty())
        placeholders[-1].text(text.decode())
    if writers:
        controls.button("Stop", icon=":material/stop_circle:")
        for (model, config), text, placeholder in zip(writers, page.compared, placeholders, strict=True):
            write_text(model, config, text, placeholder)
        controls.empty()
    line, marks = difference(*page.compared)
    summary.markdown(escape(line))
    for i, (text, column) in enumerate(zip(page.compared, columns, strict=True)):
        with column:
            draw_chips(text, f"compared {i}", text.n_prompt, mark=marks[i])
            st.caption(text.speed)


def pick_second(file: CheckpointFile, config: SamplingConfig) -> tuple[CheckpointFile, SamplingConfig]:
    """Offers the other checkpoints, or the same model at another temperature. Returns what to compare with."""
    others = {str(one.path): one for one in checkpoint_files() if one.path != file.path}
    path = st.selectbox(
        "Compare with",
        ["", *others],  # not None, for which Streamlit shows no name
        format_func=lambda path: name_of(Path(path)) if path else "the same model at another temperature",
        key="second model",
    )
    st.caption("Both use the controls of the sidebar and the same random numbers.")
    if path:
        return others[path], config
    st.session_state.setdefault("second temperature", 0.0)
    temperature = st.slider("Second temperature", 0.0, 2.0, step=0.05, key="second temperature")
    return file, dataclasses.replace(config, temperature=temperature)


def difference(*texts: Text) -> tuple[str, list[int]]:
    """Returns a line that says how much two continuations share, and for each the position of the token with the first
    other character. A continuation that ends there has no token at its position."""
    spelled = [text.tokenizer.decode_bytes(text.ids[text.n_prompt :]) for text in texts]
    same: bytes = os.path.commonprefix(spelled)  # type: ignore[assignment]
    marks = [token_at(text, len(same)) for text in texts]
    n = len(same.decode(errors="ignore"))  # whole characters only
    shared = f"{n:,} character{'' if n == 1 else 's'}"
    if same == spelled[0] == spelled[1]:
        return f"Both are the same: {shared}.", marks
    beginning = f"The same for {shared}; then" if n else "They differ from the beginning:"
    return f"{beginning} {' and '.join(map(describe_token, texts, marks))}.", marks


def token_at(text: Text, n_bytes: int) -> int:
    """Returns the position of the token that holds the byte at an offset in the continuation."""
    lengths = (len(text.tokenizer.decode_bytes([i])) for i in text.ids[text.n_prompt :])
    return text.n_prompt + bisect.bisect_right(list(accumulate(lengths)), n_bytes)


def describe_token(text: Text, position: int) -> str:
    """Returns a token with the model's probability of it, as text."""
    if position == len(text.tokens):
        return "the end of the text"
    token = text.tokens[position]
    return f"“{name_of_token(text.tokenizer, token.id)}” ({math.exp(token.logprob or 0.0):.0%})"
