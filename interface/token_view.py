"""The tokens of a text on the page: chips shaded by probability, the candidates at one step, curves along the text."""

from __future__ import annotations

import math
from itertools import accumulate

import altair as alt
import streamlit as st

from generation.text_model import Token
from interface.curves import BLUE, GREY, curve
from text.tokenizer import Tokenizer, legible

N_CANDIDATES = 10  # shown at each step

_CHIPS = st.components.v2.component(
    "token_chips",
    html='<div class="chips" role="list"></div>',
    css="""
        .chips { line-height: 2; font-family: var(--st-code-font); font-size: 0.875rem; color: var(--st-text-color);
                 max-height: 22rem; overflow-y: auto; overflow-wrap: anywhere; }
        button { font: inherit; line-height: 1.5; color: inherit; margin: 0 1px; padding: 0 3px; border-radius: 4px;
                 border: 1px solid transparent; cursor: pointer; white-space: pre-wrap; text-align: left;
                 background: color-mix(in srgb, #3b82f6 calc(var(--p) * 75%), transparent); }
        button:hover { border-color: var(--st-text-color); }
        button.prompt { border-bottom: 1px dashed #9ca3af; }
        button.chosen { outline: 2px solid #f59e0b; }
        .sign { opacity: 0.4; }
    """,
    js="""
        export default function ({ data, parentElement, setTriggerValue }) {
            const box = parentElement.querySelector(".chips");
            const scrolled = box.scrollTop;
            box.replaceChildren();
            data.tokens.forEach((token, i) => {
                const chip = document.createElement("button");
                chip.className = (i < data.n_prompt ? "prompt" : "") + (i === data.chosen ? " chosen" : "");
                chip.style.setProperty("--p", token.p ?? 0);
                chip.title = token.p === null ? "the first token" : (100 * token.p).toPrecision(3) + " %";
                for (const part of token.text.split(/([␣↵⇥])/)) {
                    const span = document.createElement("span");
                    span.textContent = part;
                    span.className = /^[␣↵⇥]$/.test(part) ? "sign" : "";
                    chip.append(span);
                }
                chip.onclick = () => setTriggerValue("clicked", i);
                box.append(chip);
                if (token.text.includes("↵")) box.append(document.createElement("br"));
            });
            box.scrollTop = scrolled;
        }
    """,
)


def token_view(tokenizer: Tokenizer, tokens: list[Token], n_prompt: int) -> tuple[int, Token] | None:
    """Draws tokens, the first `n_prompt` of them the prompt, and lets the user choose one and replace it.

    Returns the position of a token and its replacement when the user asks for one, else None.
    """
    state = st.session_state
    state.step = min(max(1, state.get("step", n_prompt + 1)), len(tokens))
    draw_chips(tokenizer, tokens, n_prompt)
    if len(tokens) > 1:
        st.slider("Step", 1, len(tokens), key="step", help="Chooses a token, as a click does.")
    position = state.step - 1
    token = tokens[position]
    if token.logprob is None:
        st.caption("Nothing comes before the first token, so the model gives no probabilities for it.")
        return None
    st.altair_chart(candidates_chart(tokenizer, token))
    left, right = st.columns(2)
    left.caption("Entropy (nats)")
    left.altair_chart(curve([t.entropy for t in tokens], position))
    right.caption("Cumulative log-probability (nats)")
    right.altair_chart(curve(list(accumulate(t.logprob or 0.0 for t in tokens)), position))
    replacement = pick_replacement(tokenizer, token, position)
    return (position, replacement) if replacement else None


def draw_chips(tokenizer: Tokenizer, tokens: list[Token], n_prompt: int) -> None:
    """Draws each token as a chip. A click makes it the chosen token: it sets the step, which counts from 1."""
    state = st.session_state
    st.caption("The stronger the colour, the more probable the token. The prompt is underlined. Click a token.")
    chips = [
        {
            "text": legible(tokenizer.decode_bytes([token.id])),
            "p": None if token.logprob is None else math.exp(token.logprob),
        }
        for token in tokens
    ]
    _CHIPS(
        key="chips",
        data={"tokens": chips, "n_prompt": n_prompt, "chosen": state.step - 1},
        on_clicked_change=lambda: state.update(step=state.chips.clicked + 1),
    )


def pick_replacement(tokenizer: Tokenizer, token: Token, position: int) -> Token | None:
    """Offers the other candidates at a token's position. Returns one when the user wants to continue from it."""
    others = {i: logprob for i, logprob in token.candidates if i != token.id}
    with st.form("branch", border=False), st.container(horizontal=True, vertical_alignment="bottom"):
        other = st.selectbox(
            f"Another token at step {position + 1}",
            others,
            format_func=lambda i: f"{legible(tokenizer.decode_bytes([i]))}  {math.exp(others[i]):.1%}",
            key=f"other {position} {token.id}",
        )
        if st.form_submit_button("Continue from here", icon=":material/call_split:") and other is not None:
            return Token(other, others[other], token.candidates, token.entropy)
    return None


def candidates_chart(tokenizer: Tokenizer, token: Token) -> alt.LayerChart:
    """Returns the likeliest candidates at a step as bars, and the token that was chosen among them in colour.

    The token must have a log-probability.
    """
    candidates = dict(token.candidates)
    if token.id not in candidates and token.logprob is not None:
        candidates[token.id] = token.logprob
    names = [f"{legible(tokenizer.decode_bytes([i]))} ({i})" for i in candidates]
    rows = [
        {"token": name, "probability": math.exp(logprob), "chosen": i == token.id}
        for name, (i, logprob) in zip(names, candidates.items(), strict=True)
    ]
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("probability:Q", axis=alt.Axis(format="%"), scale=alt.Scale(domainMin=0)),
        y=alt.Y("token:N", sort=names, title=None, axis=alt.Axis(labelLimit=240)),
    )
    colour = alt.condition("datum.chosen", alt.value(BLUE), alt.value(GREY))
    text = base.mark_text(align="left", dx=4, color=GREY).encode(text=alt.Text("probability:Q", format=".2%"))
    return (base.mark_bar().encode(color=colour) + text).properties(height=24 * len(rows) + 40)
