"""A look inside the model on the page: tokens, attention, what each layer would say, and the embeddings."""

from __future__ import annotations

import altair as alt
import numpy as np
import streamlit as st

from generation.lens import embedding_map, nearest_tokens, position_similarities
from generation.text_model import TextModel
from interface.attention_view import attention_view
from interface.curves import BLUE
from interface.layers_view import layers_view
from interface.live_text import live_text
from text.tokenizer import Tokenizer, gpt2, legible, merges

MAX_TOKENS = 128
"""tokens of a text that Attention and Layer by layer show: its last ones"""
EXAMPLE = "The cat sat on the mat because the mat was warm. The cat"
PARTS = ("Tokens", "Attention", "Layer by layer", "Embeddings")


def inside_view(text_model: TextModel, prompts: list[str]) -> None:
    """Draws a field for a text, and the chosen look at what the model makes of it. The first text is one of `prompts`,
    texts like those that the model was trained on."""
    text = live_text("inside", "Any text", max(prompts, key=len, default=EXAMPLE))
    st.session_state.setdefault("inside_part", PARTS[0])
    part = st.segmented_control("Look at", PARTS, required=True, key="inside_part", label_visibility="collapsed")
    ids = text_model.tokenizer.encode(text)
    if part == "Tokens":
        tokens_view(text_model.tokenizer, text, ids)
    elif part == "Embeddings":
        embeddings_view(text_model, ids)
    elif not ids:
        st.info("Type a text.")
    else:
        limit = min(MAX_TOKENS, text_model.model.config.block_size)
        if len(ids) > limit:
            st.caption(f"The text has {len(ids):,} tokens. You see the last {limit}.")
        trace = text_model.trace(text, limit)
        if part == "Attention":
            attention_view(text_model.tokenizer, trace)
        else:
            layers_view(text_model, trace)


def tokens_view(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    """Draws the text cut into its tokens, beside GPT-2's if the model has a tokenizer of its own, and their counts."""
    st.caption("Each colour is one token, and below it stands its id. Spaces are shown as ␣.")
    shown = ids[:1000]
    _draw_pieces(tokenizer, shown)
    _draw_counts(text, ids)
    if tokenizer.spec != "gpt2":
        st.subheader("GPT-2's tokenizer")
        theirs = gpt2().encode(text)
        _draw_pieces(gpt2(), theirs[:1000])
        _draw_counts(text, theirs)
    tokens = list(dict.fromkeys(shown))
    if not tokens:
        return
    st.subheader("How a token is built")
    longest = max(range(len(tokens)), key=lambda i: len(tokenizer.decode_bytes([tokens[i]])))
    token = st.selectbox("Token", tokens, index=longest, format_func=lambda i: f"{_name(tokenizer, i)} ({i})")
    piece = tokenizer.decode_bytes([token])
    st.caption(f"Id {token}, bytes {piece.hex(' ')}. Each line merges the pair that the tokenizer learned first.")
    st.code("\n".join("   ".join(map(legible, parts)) for parts in merges(piece, tokenizer.mergeable_ranks)), None)


def _draw_pieces(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Draws tokens in four colours in turn, each with its id."""
    pieces = [{"text": _name(tokenizer, i), "id": i, "bytes": tokenizer.decode_bytes([i]).hex(" ")} for i in ids]
    _PIECES(key=f"pieces {tokenizer.name}", data={"pieces": pieces})


def _draw_counts(text: str, ids: list[int]) -> None:
    n_bytes = len(text.encode(errors="replace"))
    columns = st.columns(4)
    columns[0].metric("tokens", f"{len(ids):,}")
    columns[1].metric("characters", f"{len(text):,}")
    columns[2].metric("bytes", f"{n_bytes:,}")
    columns[3].metric("bytes per token", f"{n_bytes / len(ids):.2f}" if ids else "–")


def embeddings_view(text_model: TextModel, ids: list[int]) -> None:
    """Draws the nearest neighbours of a token of the text, a map of common tokens, and the positions' similarities."""
    model, tokenizer = text_model.model, text_model.tokenizer
    tokens = [i for i in dict.fromkeys(ids[:1000]) if i < model.config.n_tokens]
    if tokens:
        st.subheader("Nearest neighbours")
        token = st.selectbox("Token", tokens, format_func=lambda i: f"{_name(tokenizer, i)} ({i})", key="inside_token")
        neighbours = [(f"{_name(tokenizer, i)} ({i})", similarity) for i, similarity in nearest_tokens(model, token)]
        rows = [{"token": name, "similarity": similarity} for name, similarity in neighbours]
        chart = alt.Chart(alt.Data(values=rows)).mark_bar(color=BLUE)
        st.altair_chart(
            chart.encode(
                x=alt.X("similarity:Q", title="cosine similarity of the embeddings"),
                y=alt.Y("token:N", sort=[name for name, _ in neighbours], title=None),
            ).properties(height=24 * len(rows) + 40)
        )
    st.subheader("A map of common tokens")
    st.caption(
        "The two directions in which the embeddings differ most (PCA). Tokens with low ids are common. Turn the wheel "
        "to spread crowded tokens, and drag the map to move it."
    )
    common = [i for i in range(256, tokenizer.end_of_text) if tokenizer.decode([i]).strip().isalpha()][:200]
    if len(common) >= 2:
        points = embedding_map(model, common).tolist()
        rows = [{"token": _name(tokenizer, i), "x": x, "y": y} for i, (x, y) in zip(common, points, strict=True)]
        base = alt.Chart(alt.Data(values=rows)).encode(
            x=alt.X("x:Q", title=None, axis=None), y=alt.Y("y:Q", title=None, axis=None), tooltip="token:N"
        )
        labels = base.mark_text(fontSize=11, color=BLUE).encode(text="token:N")
        st.altair_chart(labels.properties(height=480).interactive())
    similarities = position_similarities(model)
    st.subheader("Positions")
    if similarities is None:
        st.caption("This model turns queries and keys by their position (rotary), so it learns no embedding of it.")
    else:
        st.caption(
            "Cosine similarity of the learned positions: dark is alike. Each position is most like its neighbours."
        )
        grey = 255 - 255 * similarities.clamp(0, 1).cpu().numpy()
        st.image(grey.astype(np.uint8), width="stretch")


def _name(tokenizer: Tokenizer, token: int) -> str:
    return legible(tokenizer.decode_bytes([token]))


_PIECES = st.components.v2.component(
    "token_pieces",
    html='<div class="pieces"></div>',
    css="""
        .pieces { line-height: 1.2; font-family: var(--st-code-font); font-size: 0.875rem; color: var(--st-text-color);
                  max-height: 20rem; overflow-y: auto; overflow-wrap: anywhere; }
        .piece { display: inline-block; margin: 1px; padding: 2px 4px; border-radius: 4px; white-space: pre-wrap;
                 text-align: center; background: color-mix(in srgb, var(--color) 35%, transparent); }
        .piece small { display: block; font-size: 0.65rem; opacity: 0.7; }
    """,
    js="""
        const COLORS = ["#3b82f6", "#f59e0b", "#10b981", "#ec4899"];
        export default function ({ data, parentElement }) {
            const pieces = data.pieces.map((piece, i) => {
                const span = document.createElement("span"), id = document.createElement("small");
                span.className = "piece";
                span.style.setProperty("--color", COLORS[i % COLORS.length]);
                span.title = "bytes " + piece.bytes;
                id.textContent = piece.id;
                span.append(piece.text, id);
                return span;
            });
            parentElement.querySelector(".pieces").replaceChildren(...pieces);
        }
    """,
)
