"""The completion on the page: a prompt, its continuations, and the probabilities of every token."""

import dataclasses
from itertools import accumulate

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from generation.config import SamplingConfig
from generation.text_model import TextModel
from interface.inside_view import MAX_TOKENS
from interface.page import PageState, Text, current_page, escape, offer_prompts, show_stream
from interface.tokens import begin, curve, draw_bars, draw_chips, logits_before, name_of_token
from weights.files import CheckpointFile

GENERIC_PROMPTS = ("Once upon a time", "The most important thing is", "In the beginning")


def completion_view(text_model: TextModel, file: CheckpointFile, prompts: list[str]) -> None:
    """Draws a prompt, its completion, and the model's probabilities at every token. `file` is the model's; `prompts`
    are offered until one is completed."""
    page, offers = current_page(), st.container()
    prompt, starts = prompt_field(page, "Complete")
    controls = st.empty()
    if starts:
        page.branch = begin(text_model, file, text_model.prompt_ids(prompt), "1")
        page.branches = [page.branch]
        st.session_state.step = page.branch.n_prompt + 1
    text = page.branch
    if text is None or text.file != file:
        with offers:
            offer_beginnings(page, prompts)
        return
    with st.container(border=True):
        placeholder = st.empty()
    view = st.empty()  # empty while the model writes
    if text.is_new:
        controls.button("Stop", icon=":material/stop_circle:")
        write_text(text_model, page.sampling, text, placeholder)
        controls.empty()
    placeholder.text(text.decode())
    with view.container():
        draw_branches(page, text)
        draw_tokens(text_model, page, text)


def prompt_field(page: PageState, label: str) -> tuple[str, bool]:
    """Draws the field for the prompt, and a button. Returns the prompt, and whether it is to be completed now."""
    prompt = st.text_area("Beginning of a text", key="prompt", placeholder="Once upon a time")
    starts = st.button(label, type="primary", icon=":material/play_arrow:") or page.starts
    page.starts = False
    return prompt, starts


def offer_beginnings(page: PageState, prompts: list[str]) -> None:
    """Offers texts to complete, the model's own or generic ones. The next drawing of the page completes the chosen."""

    def choose(text: str) -> None:
        st.session_state.prompt = text
        page.starts = True

    offer_prompts(prompts or GENERIC_PROMPTS, choose)


def write_text(text_model: TextModel, config: SamplingConfig, text: Text, placeholder: DeltaGenerator) -> None:
    """Streams the continuation of a text. If the user presses Stop, the text so far stays."""
    samples = (sample for [sample] in text_model.stream(text.ids, config, top_logprobs=0))
    if show_stream(text, samples, placeholder, before=text.decode()).finish_reason == "end":
        text.speed += " · the model ended the text"


def draw_branches(page: PageState, text: Text) -> None:
    """Draws the speed of a text, and buttons that lead to its other branches."""
    if text.n_full_prompt > text.block_size:
        st.caption(
            f"The prompt has {text.n_full_prompt:,} tokens. The model sees the last {text.block_size:,}, its context."
        )
    st.caption(text.speed)
    if len(page.branches) > 1:
        st.caption("Branches")
        with st.container(horizontal=True):
            for one in page.branches:
                kind = "primary" if one is text else "secondary"
                label, key = escape(one.name), f"branch {one.name}"
                st.button(label, type=kind, key=key, on_click=setattr, args=(page, "branch", one))


def draw_tokens(text_model: TextModel, page: PageState, text: Text) -> None:
    """Draws the tokens of a text with their probabilities, and the candidates of the chosen one."""
    state, tokens = st.session_state, text.tokens
    if any(token.logprob is None for token in tokens[1 : text.n_prompt]):
        with st.spinner("Computing the probabilities of the prompt"):
            tokens[: text.n_prompt] = text_model.score(text.ids[: text.n_prompt], top_logprobs=0)
    state.step = min(max(1, state.get("step", text.n_prompt + 1)), len(tokens))
    position = state.step - 1
    st.caption("The stronger the colour, the more probable the token. The prompt is underlined. Click a token.")
    draw_chips(text, "chips", chosen=position, on_click=lambda i: state.update(step=i + 1))
    if len(tokens) > 1:
        st.slider("Step", 1, len(tokens), key="step", help="Chooses a token, as a click does.")
    st.button(
        "Look inside",
        icon=":material/search:",
        on_click=open_inside,
        args=(page, text, position),
        help="Shows what the model makes of the text up to the chosen token, layer by layer.",
    )
    if tokens[position].logprob is None:
        st.caption("Nothing comes before the first token, so the model gives no probabilities for it.")
        return
    st.markdown("**Click a bar to continue from there**")
    draw_bars(text_model, text, position, "bars", lambda choice: branch_off(text_model, page, text, position, choice))
    left, right = st.columns(2)
    left.caption("Entropy (nats)")
    left.altair_chart(curve([token.entropy for token in tokens], position))
    right.caption("Cumulative log-probability (nats)")
    right.altair_chart(curve(list(accumulate(token.logprob or 0.0 for token in tokens)), position))


def open_inside(page: PageState, text: Text, position: int) -> None:
    """Lets the next drawing of the page show the mode Inside with a text up to a position, that token included."""
    start = max(0, position + 1 - MAX_TOKENS)
    page.inside_text = dataclasses.replace(text, tokens=text.tokens[start : position + 1]).decode()
    st.session_state.update(mode="Inside", part="Layer by layer")


def branch_off(text_model: TextModel, page: PageState, text: Text, position: int, choice: int) -> None:
    """Lets the next drawing of the page continue a text from another token at a position."""
    logprob = logits_before(page, text_model, text, position).log_softmax(dim=-1)[choice].item()
    token = dataclasses.replace(text.tokens[position], id=choice, logprob=logprob)
    name = f"{len(page.branches) + 1}: {name_of_token(text.tokenizer, choice)} at step {position + 1}"
    tokens, n_prompt = [*text.tokens[:position], token], min(text.n_prompt, position)
    page.branch = dataclasses.replace(text, name=name, tokens=tokens, n_prompt=n_prompt, is_new=True)
    page.branches.append(page.branch)
