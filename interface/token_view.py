"""The tokens of a text on the page: chips shaded by probability, the candidates at one step, curves along the text."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import streamlit as st
from torch import Tensor

from generation.text_model import TextModel, Token, sampling_probabilities
from interface.curves import curve
from text.tokenizer import Tokenizer, legible

N_BARS = 10  # candidates shown at each step

_CHIPS = st.components.v2.component(
    "token_chips",
    html='<div class="chips" role="list"></div>',
    css="""
        .chips { line-height: 2; font-family: var(--st-code-font); font-size: 0.875rem; color: var(--st-text-color);
                 max-height: 21rem; overflow-y: auto; overflow-wrap: anywhere; }  /* 12 lines */
        button { font: inherit; line-height: 1.5; color: inherit; margin: 0 1px; padding: 0 3px; border-radius: 4px;
                 border: 1px solid transparent; cursor: pointer; white-space: pre-wrap; text-align: left;
                 background: color-mix(in srgb, #3b82f6 calc(var(--p) * 75%), transparent); }
        button:hover { border-color: var(--st-text-color); }
        button.prompt { border-bottom: 1px dashed #9ca3af; }
        button:disabled { cursor: default; border-color: transparent; }
        button.prompt:disabled { border-bottom-color: #9ca3af; }
        button.chosen { outline: 2px solid #f59e0b; }
        button.marked { outline: 2px solid #ef4444; }
        .sign { opacity: 0.4; }
    """,
    js="""
        export default function ({ data, parentElement, setTriggerValue }) {
            const box = parentElement.querySelector(".chips");
            const scrolled = box.scrollTop;
            box.replaceChildren();
            data.tokens.forEach((token, i) => {
                const chip = document.createElement("button");
                chip.className = (i < data.n_prompt ? "prompt" : "") + (i === data.chosen ? " chosen" : "")
                    + (i === data.mark ? " marked" : "");
                chip.disabled = !data.clickable;
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

_BARS = st.components.v2.component(
    "token_bars",
    html='<div class="bars"></div>',
    css="""
        .bars { font-size: 0.875rem; color: var(--st-text-color); }
        button { font: inherit; color: inherit; background: none; text-align: left; width: 100%; padding: 2px 6px;
                 border: 1px solid transparent; border-radius: 4px; display: grid; align-items: center; gap: 0 8px;
                 grid-template-columns: minmax(4rem, 9rem) 1fr 4.2rem; }
        button:enabled { cursor: pointer; }
        button:enabled:hover { border-color: var(--st-text-color); }
        button.chosen { outline: 2px solid #f59e0b; outline-offset: -2px; }
        .name { font-family: var(--st-code-font); grid-row: span 2; overflow: hidden; text-overflow: ellipsis;
                white-space: pre; }
        .bar { height: 9px; border-radius: 2px; min-width: 1px; }
        .before { background: #9ca3af; }
        .after { background: #3b82f6; }
        .percent { font-size: 0.75rem; line-height: 1.2; text-align: right; font-variant-numeric: tabular-nums; }
    """,
    js="""
        export default function ({ data, parentElement, setTriggerValue }) {
            const box = parentElement.querySelector(".bars");
            box.replaceChildren();
            for (const row of data.rows) {
                const button = document.createElement("button");
                const add = (className, text) => {
                    const part = document.createElement("span");
                    part.className = className;
                    part.textContent = text;
                    button.append(part);
                    return part;
                };
                button.className = row.chosen ? "chosen" : "";
                button.disabled = !data.clickable;
                button.title = row.name + " (" + row.id + ")";
                add("name", row.name);
                for (const kind of ["before", "after"]) {
                    const bar = add("bar " + kind, "");
                    bar.style.width = 100 * row[kind] / data.largest + "%";
                    add("percent", row[kind] > 0 ? (100 * row[kind]).toFixed(2) + " %" : "never");
                }
                button.onclick = () => setTriggerValue("clicked", row.id);
                box.append(button);
            }
        }
    """,
)


def draw_chips(
    tokenizer: Tokenizer,
    tokens: list[Token],
    n_prompt: int,
    chosen: int | None,
    key: str,
    on_click: Callable[[int], Any] | None = None,
    mark: int | None = None,
) -> None:
    """Draws tokens as chips, the first `n_prompt` of them as the prompt, and marks the one at the position `mark`.
    `on_click` gets the position of a token."""
    chips = [
        {
            "text": legible(tokenizer.decode_bytes([token.id])),
            "p": None if token.logprob is None else math.exp(token.logprob),
        }
        for token in tokens
    ]
    _CHIPS(
        key=key,
        data={"tokens": chips, "n_prompt": n_prompt, "chosen": chosen, "mark": mark, "clickable": bool(on_click)},
        on_clicked_change=lambda: on_click(st.session_state[key].clicked) if on_click else None,
    )


def draw_bars(
    text_model: TextModel, ids: list[int], token: Token, key: str, on_click: Callable[[int], Any] | None = None
) -> None:
    """Draws the likeliest candidates for a token that follows `ids`: the model's probabilities, and those after the
    sampling controls. `on_click` gets the id of a candidate."""
    state = st.session_state
    logits = logits_behind(text_model, ids, token.n_context)
    sampled = sampling_probabilities(logits, ids, state.sampling)
    state["drawn for"] = state.sampling  # other values draw the page again
    rows = bar_rows(text_model.tokenizer, token.id, logits, sampled)
    _BARS(
        key=key,
        data={"rows": rows, "largest": max(max(r["before"], r["after"]) for r in rows), "clickable": bool(on_click)},
        on_clicked_change=lambda: on_click(state[key].clicked) if on_click else None,
    )
    kept = sampled > 0
    st.caption(
        f"Grey: the model's probability. Blue: the probability after the sampling controls, which keep {kept.sum():,} "
        f"of {len(kept):,} tokens ({logits.softmax(dim=-1)[kept].sum():.1%} of the probability)."
    )


def bar_rows(tokenizer: Tokenizer, chosen: int, logits: Tensor, sampled: Tensor) -> list[dict[str, Any]]:
    """Returns the likeliest ids, before or after the sampling controls, and the chosen one, each with its two
    probabilities. `logits` and the probabilities `sampled` are (n_tokens,)."""
    probabilities = logits.softmax(dim=-1)
    n = min(N_BARS, len(logits))
    ids = dict.fromkeys([*probabilities.topk(n).indices.tolist(), chosen])
    missing = [i for i in sampled.topk(n).indices.tolist() if i not in ids and sampled[i] > 0]  # a penalty lifts them
    return [
        {
            "id": i,
            "name": legible(tokenizer.decode_bytes([i])),
            "before": probabilities[i].item(),
            "after": sampled[i].item(),
            "chosen": i == chosen,
        }
        for i in [*ids, *missing]
    ]


def logits_behind(text_model: TextModel, ids: list[int], n_context: int) -> Tensor:
    """Returns the logits (n_tokens,) behind the last `n_context` ids. Those of the last call are kept, so a slider that
    moves costs no forward pass."""
    context = ids[-n_context:]
    if (kept := st.session_state.get("logits")) is None or kept[0] is not text_model or kept[1] != context:
        kept = st.session_state.logits = (text_model, context, text_model.next_logits(context))
    return kept[2]


def token_view(
    text_model: TextModel,
    tokens: list[Token],
    n_prompt: int,
    on_branch: Callable[[int, int], Any],
    on_look: Callable[[int], Any],
) -> None:
    """Draws tokens, the first `n_prompt` of them the prompt, and one of them with its candidates.

    `on_branch` gets a position and the id of the candidate that the user wants to continue from. `on_look` gets the
    position of the token that the user wants to see in the mode Inside.
    """
    state = st.session_state
    state.step = min(max(1, state.get("step", n_prompt + 1)), len(tokens))
    st.caption("The stronger the colour, the more probable the token. The prompt is underlined. Click a token.")
    draw_chips(text_model.tokenizer, tokens, n_prompt, state.step - 1, "chips", lambda i: state.update(step=i + 1))
    if len(tokens) > 1:
        st.slider("Step", 1, len(tokens), key="step", help="Chooses a token, as a click does.")
    position = state.step - 1
    token = tokens[position]
    st.button(
        "Look inside",
        icon=":material/search:",
        on_click=on_look,
        args=(position,),
        help="Shows what the model makes of the text up to the chosen token, layer by layer.",
    )
    if token.logprob is None:
        st.caption("Nothing comes before the first token, so the model gives no probabilities for it.")
        return
    st.markdown("**Click a bar to continue from there**")
    draw_bars(text_model, [t.id for t in tokens[:position]], token, "bars", lambda i: on_branch(position, i))
    left, right = st.columns(2)
    left.caption("Entropy (nats)")
    left.altair_chart(curve([t.entropy for t in tokens], position))
    right.caption("Cumulative log-probability (nats)")
    right.altair_chart(curve(list(accumulate(t.logprob or 0.0 for t in tokens)), position))
