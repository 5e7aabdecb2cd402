"""A look inside the model on the page: tokens, attention, what each layer would say, and the embeddings."""

import altair as alt
import numpy as np
import streamlit as st

from generation.lens import embedding_map, nearest_tokens, position_similarities, trace_text
from generation.text_model import TextModel
from interface.attention_view import attention_view
from interface.layers_view import layers_view
from interface.page import current_page
from interface.tokens import BLUE, ORANGE, button, draw_buttons, name_of_token
from text.tokenizer import Tokenizer, gpt2, legible, merges

MAX_TOKENS = 128
"""tokens of a text that Attention and Layer by layer show: its last ones"""
MAX_PIECES = 1000
"""tokens that Tokens shows: the first ones"""
EXAMPLE = "The cat sat on the mat because the mat was warm. The cat"
COLORS = (BLUE, ORANGE, "#10b981", "#ec4899")
PARTS = ("Tokens", "Attention", "Layer by layer", "Embeddings")

# A text field whose text arrives while the user types; Streamlit's own sends it when the user leaves the field.
_FIELD = st.components.v2.component(
    "live_text",
    html='<label><span></span><textarea rows="3"></textarea></label>',
    css="""
        label { font-family: var(--st-font); font-size: 0.875rem; color: var(--st-text-color); }
        textarea { box-sizing: border-box; width: 100%; margin-top: 0.25rem; padding: 0.5rem; font: inherit;
                   font-size: 1rem; color: inherit; background: var(--st-secondary-background-color);
                   border: 1px solid var(--st-border-color); border-radius: 0.5rem; resize: vertical; }
    """,
    js="""
        export default function ({ data, parentElement, setStateValue }) {
            const field = parentElement.querySelector("textarea");
            parentElement.querySelector("span").textContent = data.label;
            if (field.dataset.seen !== data.text && field.getRootNode().activeElement !== field) {
                field.value = data.text;  // not while the user types: the answer may be older than the field
            }
            field.dataset.seen = data.text;
            field.oninput = () => {
                clearTimeout(field.timer);
                field.timer = setTimeout(() => setStateValue("text", field.value), 150);
            };
        }
    """,
)


def inside_view(text_model: TextModel, prompts: list[str]) -> None:
    """Draws a field for a text, and the chosen look at what the model makes of it. The first text is one of `prompts`,
    texts like those that the model was trained on."""
    text = live_text("Any text", max(prompts, key=len, default=EXAMPLE))
    st.session_state.setdefault("part", PARTS[0])
    part = st.segmented_control("Look at", PARTS, required=True, key="part", label_visibility="collapsed")
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
        if part == "Attention":
            trace = current_page().once("trace", text, lambda: trace_text(text_model, text, limit))
            attention_view(text_model.tokenizer, trace)
        else:
            layers_view(text_model, text, ids[-limit:])


def live_text(label: str, example: str) -> str:
    """Draws the field, and returns its text: that of the page's state, at first `example`."""
    page = current_page()
    text = example if page.inside_text is None else page.inside_text

    def store() -> None:
        page.inside_text = st.session_state.inside_field.text or ""

    _FIELD(key="inside_field", data={"text": text, "label": label}, on_text_change=store)
    return text


def tokens_view(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    """Draws the text cut into its tokens, beside GPT-2's if the model has a tokenizer of its own, and how the tokenizer
    built one of them."""
    st.caption("Each colour is one token, and below it stands its id. Spaces are shown as ␣.")
    draw_pieces(tokenizer, text, ids)
    if tokenizer.spec != "gpt2":
        st.subheader("GPT-2's tokenizer")
        draw_pieces(gpt2(), text, gpt2().encode(text))
    tokens = list(dict.fromkeys(ids[:MAX_PIECES]))
    if not tokens:
        return
    st.subheader("How a token is built")
    longest = max(range(len(tokens)), key=lambda i: len(tokenizer.decode_bytes([tokens[i]])))
    token = st.selectbox("Token", tokens, index=longest, format_func=lambda i: f"{name_of_token(tokenizer, i)} ({i})")
    piece = tokenizer.decode_bytes([token])
    st.caption(f"Id {token}, bytes {piece.hex(' ')}. Each line merges the pair that the tokenizer learned first.")
    st.code("\n".join("   ".join(map(legible, parts)) for parts in merges(piece, tokenizer.mergeable_ranks)), None)


def draw_pieces(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    """Draws the tokens of a text in four colours in turn, each with its id, and their counts."""
    pieces = []
    for i, token in enumerate(ids[:MAX_PIECES]):
        title = f"bytes {tokenizer.decode_bytes([token]).hex(' ')}"
        parts = (("", name_of_token(tokenizer, token)), ("id", str(token)))
        pieces.append(button(None, *parts, title=title, p=0.5, color=COLORS[i % len(COLORS)]))
    draw_buttons("chips", f"pieces {tokenizer.name}", pieces)
    n_bytes = len(text.encode(errors="replace"))
    counts = f"{len(ids):,} tokens · {len(text):,} characters · {n_bytes:,} bytes"
    st.text(f"{counts} · {n_bytes / len(ids):.2f} bytes per token" if ids else counts)


def embeddings_view(text_model: TextModel, ids: list[int]) -> None:
    """Draws the nearest neighbours of a token of the text, a map of common tokens, and the positions' similarities."""
    model, tokenizer = text_model.model, text_model.tokenizer

    def name(token: int) -> str:
        return f"{name_of_token(tokenizer, token)} ({token})"

    tokens = [i for i in dict.fromkeys(ids[:MAX_PIECES]) if i < model.config.n_tokens]
    if tokens:
        st.subheader("Nearest neighbours")
        token = st.selectbox("Token", tokens, format_func=name, key="inside_token")
        rows = [{"token": name(i), "cosine similarity": cosine} for i, cosine in nearest_tokens(model, token)]
        st.bar_chart(rows, x="token", y="cosine similarity", horizontal=True, sort=False)
    st.subheader("A map of common tokens")
    st.caption(
        "The two directions in which the embeddings differ most (PCA). Tokens with low ids are common. Turn the wheel "
        "to spread crowded tokens, and drag the map to move it."
    )
    common = [i for i in range(256, tokenizer.end_of_text) if tokenizer.decode([i]).strip().isalpha()][:200]
    if len(common) >= 2:
        points = embedding_map(model, common).tolist()
        rows = [
            {"token": name_of_token(tokenizer, i), "x": x, "y": y} for i, (x, y) in zip(common, points, strict=True)
        ]
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
