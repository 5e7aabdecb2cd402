"""Attention on the page: every head of every layer as a small picture, and the chosen one in full."""

import base64
import io
import json

import altair as alt
import numpy as np
import streamlit as st
from PIL import Image
from torch import Tensor

from generation.lens import Trace
from interface.page import current_page
from interface.tokens import BLUE, button, draw_buttons, name_of_token
from text.tokenizer import Tokenizer

MAX_LABELS = 40  # tokens along the edges of the map; more cannot be read


def attention_view(tokenizer: Tokenizer, trace: Trace) -> None:
    """Draws the attention weights of a text: rows are the layers, columns the heads; a click shows one in full."""
    page, (n_layer, n_head, n, _) = current_page(), trace.attention.shape
    st.caption(
        "Each picture is a head: its rows are the tokens that look, its columns the tokens that they look at. "
        "Rows below each other are layers. Click on a picture."
    )
    head = min(page.inside_head, n_layer * n_head - 1)
    rows = [button(None, ("", name), style="head") for name in ("", *map(str, range(1, n_head + 1)))]
    for i in range(n_layer * n_head):
        layer, j = divmod(i, n_head)
        if j == 0:
            rows.append(button(None, ("", str(layer + 1)), style="head first"))
        style = "picture chosen" if i == head else "picture"
        title = f"layer {layer + 1}, head {j + 1}"
        rows.append(button(i, title=title, style=style, image=picture(trace.attention[layer, j])))
    columns = f"auto repeat({n_head}, minmax(18px, {64 if n_head > 4 else 112}px))"
    draw_buttons("table", "heads", rows, lambda i: setattr(page, "inside_head", i), columns)

    layer, j = divmod(head, n_head)
    weights = trace.attention[layer, j].tolist()  # (T, T)
    query = n - 1 if page.inside_query is None else min(page.inside_query, n - 1)
    names = [name_of_token(tokenizer, i) for i in trace.tokens.tolist()]
    st.text(f"Layer {layer + 1}, head {j + 1}")
    st.caption("Click a token: the colour shows which tokens this head looks at from there.")
    chips = [
        button(i, ("", name), title=f"{p:.1%}", style="chosen" if i == query else "", p=p)
        for i, (name, p) in enumerate(zip(names, weights[query], strict=True))
    ]
    draw_buttons("chips", "queries", chips, lambda i: setattr(page, "inside_query", i))
    st.altair_chart(attention_map(names, weights))


def picture(weights: Tensor) -> str:
    """Returns attention weights (T, T) as the URL of a picture with one pixel for each."""
    pixels = np.full((*weights.shape, 4), (59, 130, 246, 0), np.uint8)  # BLUE, RGBA
    pixels[..., 3] = (255 * weights).round().cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def attention_map(names: list[str], weights: list[list[float]]) -> alt.Chart:
    """Returns attention weights (T, T) as a chart: the tokens that look from top to bottom, and what they look at."""
    rows = [
        {"token": i, "looks at": j, "from": names[i], "to": names[j], "weight": round(p, 4)}
        for i, row in enumerate(weights)
        for j, p in enumerate(row[: i + 1])
    ]
    name = f"{json.dumps(names)}[datum.value]"  # an expression of Vega
    labels = alt.Axis(labels=len(names) <= MAX_LABELS, ticks=False, labelExpr=name, labelOverlap=False)
    return (
        alt.Chart(alt.Data(values=rows), width=520, height=520)
        .mark_rect()
        .encode(
            x=alt.X("looks at:O", axis=labels),
            y=alt.Y("token:O", axis=labels),
            color=alt.Color("weight:Q", scale=alt.Scale(domain=[0, 1], range=["transparent", BLUE]), legend=None),
            tooltip=["from:N", "to:N", "weight:Q"],
        )
    )
