"""What the model would say after each layer, on the page: a table of layers and tokens."""

import streamlit as st

from generation.lens import predictions_by_layer, trace_text
from generation.text_model import TextModel
from interface.page import current_page
from interface.tokens import button, draw_buttons, name_of_token


def layers_view(text_model: TextModel, text: str, ids: list[int]) -> None:
    """Draws the logit lens of a text's last tokens, `ids`: a row for each layer, the last one on top, and a column for
    each token."""
    st.caption(
        "What the model would say next if it stopped after a layer: the likeliest token. The stronger the colour, the "
        "more probable is the token that really came. Click on a cell for ten candidates."
    )
    page = current_page()
    layers = page.once("layers", ids, lambda: predictions_by_layer(text_model, trace_text(text_model, text, len(ids))))
    candidates, came = layers.candidates.tolist(), layers.next_logprobs.exp().tolist()
    names = {i: name_of_token(text_model.tokenizer, i) for i in layers.candidates.unique().tolist()}
    tokens = [name_of_token(text_model.tokenizer, i) for i in ids]
    rows = [button(None, ("", name), style="head") for name in tokens]
    rows.insert(0, button(None, ("", "layer"), style="head first"))
    for layer in reversed(range(len(candidates))):
        rows.append(button(None, ("", str(layer or "0 (embedding)")), style="head first"))
        for i, (likeliest, *_) in enumerate(candidates[layer]):
            style = "chosen" if page.inside_cell == (layer, i) else ""
            p = came[layer][i] if i + 1 < len(tokens) else 0.0
            rows.append(button((layer, i), ("", names[likeliest]), style=style, p=p))
    draw_buttons("table", "layers", rows, choose_cell, f"repeat({len(tokens) + 1}, auto)")
    layer, i = page.inside_cell or (0, len(tokens))
    if layer >= len(candidates) or i >= len(tokens):  # none is chosen, or one of another text or model
        return
    text = f"{f'After layer {layer}' if layer else 'Before the first layer'}, at {tokens[i]}: "
    text += f"entropy {layers.entropies[layer, i]:.2f} nats."
    if i + 1 < len(tokens):
        text += f" The token that came, {tokens[i + 1]}, has {came[layer][i]:.1%}."
    st.text(text)
    probabilities = layers.logprobs[layer, i].exp().tolist()
    bars = [
        button(None, ("name", names[token]), ("bar after", "", f"{100 * p}%"), ("percent", f"{p:.1%}"))
        for token, p in zip(candidates[layer][i], probabilities, strict=True)
    ]
    draw_buttons("bars", "layer candidates", bars)


def choose_cell(cell: list[int]) -> None:
    """Shows the candidates at a cell: layer and position."""
    layer, position = cell
    current_page().inside_cell = (layer, position)
