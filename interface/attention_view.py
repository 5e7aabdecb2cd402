"""Attention on the page: every head of every layer as a small picture, and the chosen one in full."""

from __future__ import annotations

import base64

import streamlit as st

from generation.lens import Trace
from text.tokenizer import Tokenizer, legible

_ATTENTION = st.components.v2.component(
    "attention",
    html="""
        <div class="grid" role="listbox" aria-label="heads"></div>
        <p class="name"></p>
        <div class="text"></div>
        <div class="frame"><div class="keys"></div><div class="queries"></div><canvas class="map"></canvas></div>
    """,
    css="""
        :host { color: var(--st-text-color); font-family: var(--st-font); font-size: 0.875rem; }
        .grid { display: grid; gap: 3px; justify-content: start; overflow-x: auto; padding-bottom: 4px; }
        .grid span { font-size: 0.7rem; opacity: 0.7; align-self: center; white-space: nowrap; padding-right: 4px; }
        .grid button { padding: 0; border: 2px solid transparent; background: none; line-height: 0; cursor: pointer; }
        .grid button.chosen { border-color: #f59e0b; }
        .grid canvas { width: 100%; min-width: 18px; aspect-ratio: 1; image-rendering: pixelated; }
        canvas { background: color-mix(in srgb, var(--st-text-color) 5%, transparent); }
        .text { line-height: 1.9; font-family: var(--st-code-font); overflow-wrap: anywhere; }
        .text button { font: inherit; color: inherit; border: 1px solid transparent; border-radius: 4px; padding: 0 2px;
                       margin: 0 1px; cursor: pointer; white-space: pre-wrap;
                       background: color-mix(in srgb, #3b82f6 calc(var(--w) * 90%), transparent); }
        .text button.query { border-color: #f59e0b; }
        .frame { display: grid; grid-template-columns: auto minmax(0, 32rem); justify-content: start; gap: 2px;
                 margin-top: 0.5rem; font-family: var(--st-code-font); font-size: 0.65rem; line-height: 1; }
        .keys { grid-column: 2; display: flex; }
        .keys span { flex: 1 1 0; min-width: 0; writing-mode: vertical-rl; transform: rotate(180deg); }
        .queries { display: flex; flex-direction: column; text-align: right; }
        .queries span { flex: 1 1 0; min-height: 0; align-content: center; }
        .frame span { max-width: 6rem; max-height: 6rem; overflow: hidden; white-space: nowrap; }
        .frame span.query { color: #f59e0b; font-weight: 600; }
        .map { grid-column: 2; width: 100%; aspect-ratio: 1; image-rendering: pixelated; touch-action: pan-y; }
    """,
    js="""
        const MAX_LABELS = 40;  // tokens along the edges of the map; more cannot be read

        export default function ({ data, parentElement }) {
            const find = (selector) => parentElement.querySelector(selector);
            const { layers, heads, tokens } = data, T = tokens.length;
            const weights = Uint8Array.from(atob(data.weights), (c) => c.charCodeAt(0));  // layer, head, query, key
            let head = Math.min(parentElement.head ?? 0, layers * heads - 1), query = T - 1;

            function draw(canvas, h) {
                canvas.width = canvas.height = T;
                const context = canvas.getContext("2d"), image = context.createImageData(T, T);
                for (let i = 0; i < T * T; i++) image.data.set([59, 130, 246, weights[h * T * T + i]], 4 * i);
                context.putImageData(image, 0, 0);
            }
            function shade() {
                const row = weights.subarray((head * T + query) * T, (head * T + query + 1) * T);
                [...find(".text").children].forEach((chip, i) => {
                    chip.style.setProperty("--w", row[i] / 255);
                    chip.className = i === query ? "query" : "";
                    chip.title = Math.round(row[i] / 2.55) + " %";
                });
                [...find(".queries").children].forEach((label, i) => label.className = i === query ? "query" : "");
            }
            function choose(h) {
                parentElement.head = head = h;
                find(".name").textContent = `Layer ${Math.floor(h / heads) + 1}, head ${(h % heads) + 1}. Point at a `
                    + "token or at a row of the map: the shading shows which tokens this head looks at from there.";
                [...find(".grid").querySelectorAll("button")].forEach((button, i) => {
                    button.className = i === h ? "chosen" : "";
                    button.setAttribute("aria-selected", i === h);
                });
                draw(find(".map"), h);
                shade();
            }
            const label = (text) => Object.assign(document.createElement("span"), { textContent: text });
            const cells = [label("")];
            for (let i = 0; i < heads; i++) cells.push(label(i + 1));
            for (let layer = 0; layer < layers; layer++) {
                cells.push(label(layer + 1));
                for (let i = 0; i < heads; i++) {
                    const button = document.createElement("button"), canvas = document.createElement("canvas");
                    const h = layer * heads + i;
                    draw(canvas, h);
                    button.append(canvas);
                    button.setAttribute("role", "option");
                    button.title = button.ariaLabel = `layer ${layer + 1}, head ${i + 1}`;
                    button.onclick = () => choose(h);
                    cells.push(button);
                }
            }
            find(".grid").style.gridTemplateColumns = `auto repeat(${heads}, minmax(18px, ${heads > 4 ? 64 : 112}px))`;
            find(".grid").replaceChildren(...cells);
            find(".text").replaceChildren(...tokens.map((token, i) => {
                const chip = document.createElement("button");
                chip.textContent = token;
                chip.onpointerenter = chip.onfocus = chip.onclick = () => { query = i; shade(); };
                return chip;
            }));
            for (const edge of [".keys", ".queries"]) {
                find(edge).replaceChildren(...(T > MAX_LABELS ? [] : tokens).map(label));
            }
            find(".map").onpointermove = find(".map").onpointerdown = (event) => {
                query = Math.min(T - 1, Math.max(0, Math.floor(event.offsetY / event.target.clientHeight * T)));
                shade();
            };
            choose(head);
        }
    """,
)


def attention_view(tokenizer: Tokenizer, trace: Trace) -> None:
    """Draws the attention weights of a text: rows are the layers, columns the heads; a click shows one in full."""
    n_layer, n_head = trace.attention.shape[:2]
    st.caption(
        "Each picture is a head: its rows are the tokens that look, its columns the tokens that they look at. "
        "Rows below each other are layers. Click on a picture."
    )
    weights = (255 * trace.attention).round().byte().cpu().numpy()
    _ATTENTION(
        key="attention",
        data={
            "layers": n_layer,
            "heads": n_head,
            "tokens": [legible(tokenizer.decode_bytes([i])) for i in trace.tokens.tolist()],
            "weights": base64.b64encode(weights.tobytes()).decode(),
        },
    )
