"""Tokens to look at and to choose from: chips shaded by probability, the candidates of a step, curves along a text."""

import math

import altair as alt
import streamlit as st

from generation.text_model import Token
from text.tokenizer import Tokenizer

TOP = 10  # candidates a step
BLUE, GREY = "#3b82f6", "#9ca3af"
SIGNS = {" ": "␣", "\n": "↵", "\t": "⇥"}

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


def legible(token: bytes) -> str:
    """Returns a token so that all of it is seen: signs for white space, escapes for control characters and for bytes
    that are only part of a character."""
    text = token.decode("utf-8", errors="backslashreplace")
    return "".join(SIGNS.get(c, c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def token_view(tokenizer: Tokenizer, tokens: list[Token], n_prompt: int) -> tuple[int, Token] | None:
    """Draws tokens, of which the first `n_prompt` were given, and lets one be chosen and replaced.

    Returns the place of a token and what somebody wants there instead, None where nobody does.
    """
    names = [legible(tokenizer.decode_bytes([token.id])) for token in tokens]
    state = st.session_state
    state.step = min(max(1, state.get("step", n_prompt + 1)), len(tokens))
    st.caption(
        "The fuller the colour, the likelier the model found a token. Underlined is the prompt. Click on a token."
    )
    _CHIPS(
        key="chips",
        data={
            "tokens": [
                {"text": name, "p": None if token.logprob is None else math.exp(token.logprob)}
                for name, token in zip(names, tokens, strict=True)
            ],
            "n_prompt": n_prompt,
            "chosen": state.step - 1,
        },
        on_clicked_change=lambda: state.update(step=state.chips.clicked + 1),
    )
    if len(tokens) > 1:
        st.slider("Step", 1, len(tokens), key="step", help="The same as a click on a token.")
    i = state.step - 1
    token = tokens[i]
    if token.logprob is None:
        st.caption("Nothing comes before the first token: the model has no probabilities for it.")
        return None
    st.altair_chart(candidates_chart(tokenizer, token))
    left, right = st.columns(2)
    left.caption("Entropy, in nats")
    left.altair_chart(curve([t.entropy for t in tokens], i))
    sums, total = [], 0.0
    for t in tokens:
        total += t.logprob or 0.0
        sums.append(total)
    right.caption("Log-probability, summed up")
    right.altair_chart(curve(sums, i))
    others = {other: logprob for other, logprob in token.candidates if other != token.id}
    with st.form("branch", border=False), st.container(horizontal=True, vertical_alignment="bottom"):
        other = st.selectbox(
            f"Another token at step {i + 1}",
            others,
            format_func=lambda other: f"{legible(tokenizer.decode_bytes([other]))}  {math.exp(others[other]):.1%}",
            key=f"other {i} {token.id}",
        )
        if st.form_submit_button("Continue from here", icon=":material/call_split:") and other is not None:
            return i, Token(other, others[other], token.candidates, token.entropy)
    return None


def candidates_chart(tokenizer: Tokenizer, token: Token) -> alt.LayerChart:
    """Returns the likeliest candidates of a step as bars, the one that was taken marked."""
    rows = {legible(tokenizer.decode_bytes([i])) + f" ({i})": (i, p) for i, p in token.candidates}
    if token.id not in dict(token.candidates):
        rows[legible(tokenizer.decode_bytes([token.id])) + f" ({token.id})"] = token.id, token.logprob
    values = [{"token": name, "probability": math.exp(p), "taken": i == token.id} for name, (i, p) in rows.items()]
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("probability:Q", axis=alt.Axis(format="%"), scale=alt.Scale(domainMin=0)),
        y=alt.Y("token:N", sort=list(rows), title=None, axis=alt.Axis(labelLimit=240)),
    )
    colour = alt.condition("datum.taken", alt.value(BLUE), alt.value(GREY))
    text = base.mark_text(align="left", dx=4, color=GREY).encode(text=alt.Text("probability:Q", format=".2%"))
    return (base.mark_bar().encode(color=colour) + text).properties(height=24 * len(rows) + 40)


def curve(values: list[float | None], chosen: int) -> alt.LayerChart:
    """Returns values along the text as a small line chart with a mark at the chosen token."""
    rows = [{"step": i + 1, "value": value} for i, value in enumerate(values) if value is not None]
    line = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(color=BLUE)
        .encode(x=alt.X("step:Q", title="token", axis=alt.Axis(tickMinStep=1)), y=alt.Y("value:Q", title=None))
    )
    mark = alt.Chart(alt.Data(values=[{"step": chosen + 1}])).mark_rule(color="#f59e0b").encode(x="step:Q")
    return (line + mark).properties(height=200)


def loss_chart(entries: list[dict]) -> alt.LayerChart:
    """Returns training and validation loss of a log over steps."""
    layers = []
    for key, name in (("loss", "training"), ("val_loss", "validation")):
        rows = [{"step": entry["step"], "loss": entry[key], "of": name} for entry in entries if key in entry]
        rows = rows[:: max(1, len(rows) // 1000)]
        mark = alt.Chart(alt.Data(values=rows)).mark_line(point=key == "val_loss", opacity=0.8)
        layers.append(
            mark.encode(
                x=alt.X("step:Q", title="optimizer step"),
                y=alt.Y("loss:Q", title="loss (nats)", scale=alt.Scale(zero=False)),
                color=alt.Color("of:N", title=None, scale=alt.Scale(range=[GREY, BLUE])),
            )
        )
    return alt.layer(*layers).properties(height=360)
