"""The completion on the page: a prompt, its continuation, and the probabilities of every token."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from generation.config import SamplingConfig
from generation.text_model import Sample, TextModel, Token
from interface.sidebar import CheckpointFile
from interface.streaming import clip, generation_lock, show_stream, speed_line, wait_for_generation
from interface.token_view import N_CANDIDATES, token_view


@dataclass
class Completion:
    """A prompt and its continuation by a model, token by token."""

    file: CheckpointFile
    """the model's checkpoint"""
    tokens: list[Token] = field(default_factory=list)
    n_prompt: int = 0
    """how many of `tokens` are the prompt"""
    n_full_prompt: int = 0
    """tokens of the prompt before it was cut to the context"""
    speed: str = ""


def completion_view(text_model: TextModel, file: CheckpointFile) -> None:
    """Draws a prompt, its completion, and the model's probabilities at every token. `file` is the model's."""
    state = st.session_state
    prompt = st.text_area("Beginning of a text", key="prompt", placeholder="Once upon a time")
    started, controls = st.button("Complete", type="primary", icon=":material/play_arrow:"), st.empty()
    wait_for_generation()
    completion: Completion | None = state.get("completion")
    if started:
        completion = begin(text_model, prompt, file)
        state.completion, state.step = completion, completion.n_prompt + 1
    if completion is None or completion.file != file:
        return
    with st.container(border=True):
        placeholder = st.empty()
    view = st.empty()  # empty while the model writes
    if started or state.pop("branched", False):
        complete(text_model, state.sampling, completion, placeholder, controls)
    placeholder.text(clip(decode(text_model, completion.tokens)))
    with view.container():
        look_inside(text_model, completion)


def begin(text_model: TextModel, prompt: str, file: CheckpointFile) -> Completion:
    """Returns a completion that holds only its prompt, cut to the last tokens that fit the context."""
    ids = text_model.prompt_ids(prompt)
    kept = ids[-text_model.model.config.block_size :]
    return Completion(file, [Token(i) for i in kept], len(kept), len(ids))


def complete(
    text_model: TextModel,
    config: SamplingConfig,
    completion: Completion,
    placeholder: DeltaGenerator,
    controls: DeltaGenerator,
) -> None:
    """Streams the continuation of a completion's tokens. If the user presses Stop, the text so far stays."""
    sample, before = Sample(), list(completion.tokens)
    controls.button("Stop", icon=":material/stop_circle:")
    pieces = text_model.stream([token.id for token in before], config, sample, N_CANDIDATES)
    start = time.monotonic()
    with generation_lock():
        try:
            show_stream(pieces, placeholder, lambda: decode(text_model, before + sample.tokens))
        finally:
            completion.tokens = before + sample.tokens
            completion.speed = speed_line(sample, start, text_model.model.config.block_size)
            if sample.finish_reason == "end":
                completion.speed += " · the model ended the text"
    controls.empty()


def look_inside(text_model: TextModel, completion: Completion) -> None:
    """Draws the tokens with their probabilities. If the user chooses another token at a step, writes on from there."""
    block_size = text_model.model.config.block_size
    if completion.n_full_prompt > block_size:
        st.caption(
            f"The prompt has {completion.n_full_prompt:,} tokens. The model sees the last {block_size:,}, its context."
        )
    st.caption(completion.speed)
    prompt = completion.tokens[: completion.n_prompt]
    if any(token.logprob is None for token in prompt[1:]):
        with st.spinner("Computing the probabilities of the prompt"):
            completion.tokens[: completion.n_prompt] = text_model.score([token.id for token in prompt], N_CANDIDATES)
    branch = token_view(text_model.tokenizer, completion.tokens, completion.n_prompt)
    if branch:
        position, token = branch
        completion.tokens[position:] = [token]
        completion.n_prompt = min(completion.n_prompt, position)
        st.session_state.branched = True
        st.rerun()


def decode(text_model: TextModel, tokens: list[Token]) -> str:
    """Returns the text of tokens, without the `<|endoftext|>` that opens a document."""
    ids = [token.id for token in tokens]
    if ids and ids[0] == text_model.tokenizer.end_of_text:
        ids = ids[1:]
    return text_model.tokenizer.decode(ids)
