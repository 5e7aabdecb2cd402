"""What the model would say after each layer, on the page: a table of layers and tokens."""

from __future__ import annotations

import math

import streamlit as st

from generation.lens import Trace
from generation.text_model import TextModel
from text.tokenizer import legible

_LAYERS = st.components.v2.component(
    "layers",
    html='<div class="scroll"><table></table></div><div class="details" aria-live="polite"></div>',
    css="""
        :host { color: var(--st-text-color); font-family: var(--st-font); font-size: 0.8rem; }
        .scroll { overflow-x: auto; }
        table { border-collapse: separate; border-spacing: 2px; font-family: var(--st-code-font); }
        th { font-weight: 600; text-align: left; white-space: nowrap; }
        tr > :first-child { position: sticky; left: 0; background: var(--st-background-color); padding-right: 6px; }
        td button { width: 100%; min-width: 2.5rem; font: inherit; color: inherit; text-align: left; cursor: pointer;
                    padding: 2px 4px; border: 1px solid transparent; border-radius: 4px; white-space: pre;
                    background: color-mix(in srgb, #3b82f6 calc(var(--p) * 85%), transparent); }
        td button.chosen { border-color: #f59e0b; }
        .details { margin-top: 0.5rem; max-width: 28rem; }
        .bar { display: grid; grid-template-columns: 8rem 1fr 4.5rem; gap: 6px; align-items: center; }
        .bar div { height: 0.8rem; background: #3b82f6; border-radius: 2px; }
        .bar code { overflow: hidden; text-overflow: ellipsis; white-space: pre; }
    """,
    js="""
        export default function ({ data, parentElement }) {
            const { tokens, cells, at_end } = data;  // cells[layer][position]
            const make = (tag, text) => Object.assign(document.createElement(tag), { textContent: text ?? "" });
            const percent = (p) => (100 * p).toFixed(p < 0.1 ? 1 : 0) + " %";
            let chosen;
            function show(button, layer, i) {
                chosen?.classList.remove("chosen");
                (chosen = button).classList.add("chosen");
                const cell = cells[layer][i];
                const came = i + 1 < tokens.length
                    ? ` The token that came, ${tokens[i + 1]}, has ${percent(cell.came)}.` : "";
                const place = layer ? `After layer ${layer}` : "Before the first layer";
                const bars = cell.candidates.map(([name, p]) => {
                    const bar = make("div"), rule = make("div");
                    bar.className = "bar";
                    rule.style.width = 100 * p + "%";
                    bar.append(make("code", name), rule, make("span", percent(p)));
                    return bar;
                });
                const text = `${place}, at ${tokens[i]}: entropy ${cell.entropy.toFixed(2)} nats.${came}`;
                parentElement.querySelector(".details").replaceChildren(make("p", text), ...bars);
            }
            const head = make("tr");
            head.append(make("th", "layer"), ...tokens.map((token) => make("th", token)));
            const rows = cells.map((row, layer) => {
                const line = make("tr");
                line.append(make("th", layer || "0 (embedding)"));
                line.append(...row.map((cell, i) => {
                    const button = make("button", cell.candidates[0][0]), box = make("td");
                    button.style.setProperty("--p", cell.came ?? 0);
                    button.onclick = () => show(button, layer, i);
                    box.append(button);
                    return box;
                }));
                return line;
            });
            parentElement.querySelector("table").replaceChildren(head, ...rows.reverse());
            const scroll = parentElement.querySelector(".scroll");
            if (at_end || tokens.length > parentElement.n) scroll.scrollLeft = scroll.scrollWidth;  // the newest token
            parentElement.n = tokens.length;
            parentElement.querySelector(".details").replaceChildren();
        }
    """,
)


def layers_view(text_model: TextModel, trace: Trace) -> None:
    """Draws the logit lens of a text: one row for each layer, the last one on top, one column for each token."""
    st.caption(
        "What the model would say next if it stopped after a layer: the likeliest token. The stronger the colour, the "
        "more probable is the token that really came. Click on a cell for ten candidates."
    )
    layers = text_model.predictions_by_layer(trace)
    names = {i: legible(text_model.tokenizer.decode_bytes([i])) for i in layers.candidates.unique().tolist()}
    parts = (layers.candidates, layers.logprobs, layers.entropies, layers.next_logprobs)
    cells = [
        [
            {
                "candidates": [(names[i], math.exp(p)) for i, p in zip(candidates[t], logprobs[t], strict=True)],
                "entropy": entropies[t],
                "came": math.exp(came[t]) if t < len(came) else None,
            }
            for t in range(len(candidates))
        ]
        for candidates, logprobs, entropies, came in zip(*(part.tolist() for part in parts), strict=True)
    ]
    tokens = [legible(text_model.tokenizer.decode_bytes([i])) for i in trace.tokens.tolist()]
    at_end = st.session_state.get("inside_at_end", False)
    _LAYERS(key="layers", data={"tokens": tokens, "cells": cells, "at_end": at_end})
