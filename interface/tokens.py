"""Tokens on the page, as buttons: chips shaded by probability, bars of candidates, tables. And curves along a text."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import altair as alt
import streamlit as st
from torch import Tensor

from generation.text_model import TextModel, Token, sampling_probabilities
from interface.page import PageState, Text, current_page
from text.tokenizer import Tokenizer, legible
from weights.files import CheckpointFile

BLUE, GREY, ORANGE = "#3b82f6", "#9ca3af", "#f59e0b"
N_BARS = 10  # candidates shown at each step

_BUTTONS = st.components.v2.component(
    "token_buttons",
    html="<section></section>",
    css="""
        section { font-family: var(--st-code-font); font-size: 0.875rem; color: var(--st-text-color); }
        button { font: inherit; color: inherit; line-height: 1.5; padding: 0 3px; text-align: left;
                 white-space: pre-wrap; border: 1px solid transparent; border-radius: 4px;
                 background: color-mix(in srgb, var(--color) calc(var(--p) * 75%), transparent); }
        button:enabled { cursor: pointer; }
        button:enabled:hover { border-color: var(--st-text-color); }
        button.prompt { border-bottom: 1px dashed #9ca3af; }
        button.chosen, button.marked { outline: 2px solid #f59e0b; outline-offset: -2px; }
        button.marked { outline-color: #ef4444; }
        .sign { opacity: 0.4; }
        .chips { line-height: 2; max-height: 21rem; overflow-y: auto; overflow-wrap: anywhere; }
        .chips button { margin: 0 1px; }
        .id { display: block; font-size: 0.65rem; opacity: 0.7; text-align: center; }
        .bars button { display: grid; width: 100%; padding: 2px 6px; align-items: center; gap: 0 8px;
                       grid-template-columns: minmax(4rem, 9rem) 1fr 4.2rem; }
        .name { grid-row: span 2; overflow: hidden; text-overflow: ellipsis; white-space: pre; }
        .bar { height: 9px; border-radius: 2px; min-width: 1px; background: #9ca3af; }
        .bar.after { background: #3b82f6; }
        .percent { font-size: 0.75rem; line-height: 1.2; text-align: right; font-variant-numeric: tabular-nums; }
        .table { display: grid; justify-content: start; gap: 3px; padding: 3px 0; overflow-x: auto; font-size: 0.8rem; }
        .table button { white-space: pre; }
        .table .head { background: var(--st-background-color); font-weight: 600; }
        .table .first { position: sticky; left: 0; }
        .picture { aspect-ratio: 1; background-origin: border-box; background-size: 100% 100%;
                   image-rendering: pixelated; }
        button.picture { border-color: color-mix(in srgb, var(--st-text-color) 15%, transparent); }
    """,
    js="""
        export default function ({ data, parentElement, setTriggerValue }) {
            const box = parentElement.querySelector("section"), { scrollTop, scrollLeft } = box;
            box.className = data.kind;
            box.style.gridTemplateColumns = data.columns;
            box.replaceChildren(...data.items.map((item) => {
                if (item === null) return document.createElement("br");
                const button = document.createElement("button");
                button.className = item.class;
                button.title = item.title;
                button.disabled = item.key === null || !data.clickable;
                button.style.setProperty("--p", item.p);
                button.style.setProperty("--color", item.color);
                if (item.image) button.style.backgroundImage = `url(${item.image})`;
                button.append(...item.parts.map(([className, text, width]) => {
                    const part = document.createElement("span");
                    part.className = className;
                    part.textContent = text;
                    part.style.width = width;
                    return part;
                }));
                button.onclick = () => setTriggerValue("clicked", item.key);
                return button;
            }));
            box.scrollTop = scrollTop;  // and a table that has grown shows its newest column
            box.scrollLeft = data.items.length === box.n ? scrollLeft : box.scrollWidth;
            box.n = data.items.length;
        }
    """,
)


def button(
    key: Any,
    *parts: Sequence[str],
    title: str = "",
    style: str = "",
    p: float = 0.0,
    color: str = BLUE,
    image: str = "",
) -> dict[str, Any]:
    """Returns a button for `draw_buttons`. A part is a class, a text and perhaps a width; `p`, from 0 to 1, is the
    strength of the colour, `image` a URL. A button whose key is None cannot be clicked."""
    return {"key": key, "parts": parts, "title": title, "class": style, "p": p, "color": color, "image": image}


def draw_buttons(
    kind: str,
    key: str,
    buttons: Sequence[dict[str, Any] | None],
    on_click: Callable[[Any], Any] | None = None,
    columns: str = "",
) -> None:
    """Draws buttons as "chips", "bars" or a "table" with these CSS columns; None breaks a line. `on_click` gets the key
    of a button."""
    _BUTTONS(
        key=key,
        data={"kind": kind, "items": buttons, "columns": columns, "clickable": bool(on_click)},
        on_clicked_change=lambda: on_click(st.session_state[key].clicked) if on_click else None,
    )


def name_of_token(tokenizer: Tokenizer, token: int) -> str:
    """Returns a token with every byte visible."""
    return legible(tokenizer.decode_bytes([token]))


def begin(text_model: TextModel, file: CheckpointFile, ids: list[int], name: str) -> Text:
    """Returns a text that holds only its prompt, cut to the last tokens that fit the context."""
    block_size = text_model.model.config.block_size
    tokens = [Token(i) for i in ids[-block_size:]]
    return Text(name, file, text_model.tokenizer, block_size, tokens, len(tokens), len(ids))


def draw_chips(
    text: Text,
    key: str,
    start: int = 0,
    *,
    chosen: int | None = None,
    mark: int | None = None,
    on_click: Callable[[int], Any] | None = None,
) -> None:
    """Draws the tokens of a text from `start` on as chips: the one at the position `chosen` with an outline, the one at
    `mark` with a red one. `on_click` gets the position of a token."""
    buttons: list[dict[str, Any] | None] = []
    for i, token in enumerate(text.tokens[start:], start):
        name, p = name_of_token(text.tokenizer, token.id), math.exp(token.logprob) if token.logprob is not None else 0.0
        classes = {"prompt": i < text.n_prompt, "chosen": i == chosen, "marked": i == mark}
        style = " ".join(name for name, applies in classes.items() if applies)
        title = "the first token" if token.logprob is None else f"{p:.3%}"
        parts = [("sign" if part in "␣↵⇥" else "", part) for part in re.split("([␣↵⇥])", name) if part]
        buttons.append(button(i, *parts, title=title, style=style, p=p))
        if "↵" in name:
            buttons.append(None)
    draw_buttons("chips", key, buttons, on_click)


def draw_bars(
    text_model: TextModel, text: Text, position: int, key: str, on_click: Callable[[int], Any] | None = None
) -> None:
    """Draws the likeliest candidates for the token at a position, before or after the sampling controls, and the token
    itself, each with its two probabilities. `on_click` gets the id of a candidate."""
    page, chosen = current_page(), text.tokens[position].id
    logits = logits_before(page, text_model, text, position)
    probabilities = logits.softmax(dim=-1)
    sampled = sampling_probabilities(logits, text.ids[:position], page.sampling)
    page.bars_for = page.sampling  # other values draw the page again
    n = min(N_BARS, len(logits))
    ids = [*probabilities.topk(n).indices.tolist(), chosen]
    ids += [i for i in sampled.topk(n).indices.tolist() if sampled[i] > 0]  # a penalty may lift other tokens
    rows = [(i, probabilities[i].item(), sampled[i].item()) for i in dict.fromkeys(ids)]
    largest = max(max(before, after) for _, before, after in rows)
    buttons = []
    for i, *pair in rows:
        name, parts = name_of_token(text.tokenizer, i), []
        for kind, p in zip(("before", "after"), pair, strict=True):
            parts += [(f"bar {kind}", "", f"{100 * p / largest}%"), ("percent", f"{p:.2%}" if p else "never")]
        style = "chosen" if i == chosen else ""
        buttons.append(button(i, ("name", name), *parts, title=f"{name} ({i})", style=style))
    draw_buttons("bars", key, buttons, on_click)
    kept = sampled > 0
    st.caption(
        f"Grey: the model's probability. Blue: the probability after the sampling controls, which keep {kept.sum():,} "
        f"of {len(kept):,} tokens ({probabilities[kept].sum():.1%} of the probability)."
    )


def logits_before(page: PageState, text_model: TextModel, text: Text, position: int) -> Tensor:
    """Returns the logits (n_tokens,) from which the token at a position was drawn."""
    context = text.ids[:position][-text.tokens[position].n_context :]
    return page.once("logits", context, lambda: text_model.next_logits(context))


def curve(values: Sequence[float | None], chosen: int) -> alt.LayerChart:
    """Returns values along a text, one for each token, as a small chart with a mark at the chosen token."""
    rows = [{"step": i + 1, "value": value} for i, value in enumerate(values) if value is not None]
    x = alt.X("step:Q", title="token", axis=alt.Axis(tickMinStep=1))
    line = alt.Chart(alt.Data(values=rows)).mark_line(color=BLUE).encode(x=x, y=alt.Y("value:Q", title=None))
    mark = alt.Chart(alt.Data(values=[{"step": chosen + 1}])).mark_rule(color=ORANGE).encode(x="step:Q")
    return (line + mark).properties(height=200)
