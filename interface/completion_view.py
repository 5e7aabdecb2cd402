"""The completion on the page: a prompt, its continuations, and the probabilities of every token."""

from __future__ import annotations

import time

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from generation.config import SamplingConfig
from generation.text_model import Sample, TextModel, Token
from interface.inside_view import MAX_TOKENS
from interface.sessions import Branch, Completion, Session
from interface.sidebar import CheckpointFile, mode_key
from interface.streaming import clip, escape, offer_prompts, show_stream, speed_line
from interface.token_view import logits_behind, token_view
from text.tokenizer import Tokenizer, legible

GENERIC_PROMPTS = ("Once upon a time", "The most important thing is", "In the beginning")


def completion_view(text_model: TextModel, file: CheckpointFile, session: Session, prompts: list[str]) -> None:
    """Draws a prompt, its completion, and the model's probabilities at every token. `file` is the model's; `prompts`
    are offered until one is completed."""
    state = st.session_state
    offers = st.container()
    prompt_field(session)
    started = st.button("Complete", type="primary", icon=":material/play_arrow:") or state.pop("start", False)
    controls = st.empty()
    with session.lock:  # until a stopped generation has stored its text
        completion = session.completion
    if started:
        completion = session.completion = begin(text_model, session.prompt, file)
        state.step = completion.branch.n_prompt + 1
    if completion is None or completion.file != file:
        offer_beginnings(prompts, offers)
        return
    with st.container(border=True):
        placeholder = st.empty()
    view = st.empty()  # empty while the model writes
    if started or state.pop("branched", False):
        controls.button("Stop", icon=":material/stop_circle:")
        complete(text_model, state.sampling, completion.branch, session, placeholder)
        controls.empty()
    placeholder.text(clip(decode(text_model.tokenizer, completion.branch.tokens)))
    with view.container():
        look_inside(text_model, completion)


def prompt_field(session: Session) -> None:
    """Draws the field for the prompt, which the session keeps."""
    st.session_state.setdefault("prompt", session.prompt)
    session.prompt = st.text_area("Beginning of a text", key="prompt", placeholder="Once upon a time")


def offer_beginnings(prompts: list[str], container: DeltaGenerator) -> None:
    """Offers texts to complete, the model's own or generic ones. The next drawing of the page completes the chosen."""
    with container:
        offer_prompts(prompts or GENERIC_PROMPTS, lambda text: st.session_state.update(prompt=text, start=True))


def begin(text_model: TextModel, prompt: str, file: CheckpointFile) -> Completion:
    """Returns a completion that holds only its prompt, cut to the last tokens that fit the context."""
    ids = text_model.prompt_ids(prompt)
    kept = ids[-text_model.model.config.block_size :]
    return Completion(file, len(ids), Branch("1", [Token(i) for i in kept], len(kept)))


def complete(
    text_model: TextModel,
    config: SamplingConfig,
    branch: Branch,
    session: Session,
    placeholder: DeltaGenerator,
) -> None:
    """Streams the continuation of a branch. If the user presses Stop, the text so far stays."""
    sample, before = Sample(), list(branch.tokens)
    pieces = text_model.stream([token.id for token in before], config, sample, top_logprobs=0)
    start = time.monotonic()
    with session.lock:
        try:
            show_stream(pieces, placeholder, lambda: decode(text_model.tokenizer, before + sample.tokens))
        finally:
            branch.tokens = before + sample.tokens
            branch.speed = speed_line(sample, start, text_model.model.config.block_size)
            if sample.finish_reason == "end":
                branch.speed += " · the model ended the text"


def look_inside(text_model: TextModel, completion: Completion) -> None:
    """Draws the tokens with their probabilities, and the branches if there are several."""
    branch, block_size = completion.branch, text_model.model.config.block_size
    if completion.n_full_prompt > block_size:
        st.caption(
            f"The prompt has {completion.n_full_prompt:,} tokens. The model sees the last {block_size:,}, its context."
        )
    st.caption(branch.speed)
    if len(completion.branches) > 1:
        st.caption("Branches")
        with st.container(horizontal=True):
            for one in completion.branches:
                kind = "primary" if one is branch else "secondary"
                st.button(escape(one.name), type=kind, key=f"branch {one.name}", on_click=completion.show, args=(one,))
    prompt = branch.tokens[: branch.n_prompt]
    if any(token.logprob is None for token in prompt[1:]):
        with st.spinner("Computing the probabilities of the prompt"):
            branch.tokens[: branch.n_prompt] = text_model.score([token.id for token in prompt], top_logprobs=0)
    token_view(
        text_model,
        branch.tokens,
        branch.n_prompt,
        lambda i, choice: branch_off(text_model, completion, i, choice),
        lambda i: open_inside(text_model, completion, i),
    )


def open_inside(text_model: TextModel, completion: Completion, position: int) -> None:
    """Lets the next drawing of the page show the mode Inside, with the text up to a position of the branch on the page,
    that token included."""
    state, tokens = st.session_state, completion.branch.tokens[: position + 1]
    state["inside_text"] = decode(text_model.tokenizer, tokens[-MAX_TOKENS:])
    state["inside_part"], state["inside_at_end"] = "Layer by layer", True
    state[mode_key(completion.file)] = "Inside"


def branch_off(text_model: TextModel, completion: Completion, position: int, choice: int) -> None:
    """Lets the next drawing of the page continue from another token at a position of the branch on the page."""
    tokens = completion.branch.tokens
    logits = logits_behind(text_model, [token.id for token in tokens[:position]], tokens[position].n_context)
    logprobs = logits.log_softmax(dim=-1)
    old = tokens[position]
    token = Token(choice, logprobs[choice].item(), (), old.entropy, old.n_context)
    name = legible(text_model.tokenizer.decode_bytes([choice]))
    completion.continue_from(position, token, f"{name} at step {position + 1}")
    st.session_state.branched = True


def decode(tokenizer: Tokenizer, tokens: list[Token]) -> str:
    """Returns the text of tokens, without the `<|endoftext|>` that opens a document."""
    ids = [token.id for token in tokens]
    if ids and ids[0] == tokenizer.end_of_text:
        ids = ids[1:]
    return tokenizer.decode(ids)
