"""What a model would say after each layer, as a table in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator

from generation.text_model import TextModel
from text.tokenizer import legible

CELL = 12  # characters


def lens_table(text_model: TextModel, text: str, width: int) -> Iterator[str]:
    """Yields the lines of a table of at most `width` characters: one row for each token of the text, one column for the
    embedding and each layer. A cell holds the likeliest next token and its probability.

    Layers in the middle are left out if the table is too wide, and a last line says so. Raises UserError if the text is
    empty.
    """
    trace = text_model.trace(text)
    predictions = text_model.predictions_by_layer(trace, k=1)
    candidates, logprobs = predictions.candidates[..., 0].tolist(), predictions.logprobs[..., 0].tolist()
    n_layers = len(candidates) - 1
    columns = min(n_layers + 1, max(2, (width - CELL) // (CELL + 5)))
    layers = [round(i * n_layers / (columns - 1)) for i in range(columns)]

    def cell(token: int) -> str:
        text = legible(text_model.tokenizer.decode_bytes([token]))
        return f"{text[: CELL - 1]}…" if len(text) > CELL else f"{text:{CELL}}"

    heads = ("embedding" if layer == 0 else f"layer {layer}" for layer in layers)
    yield f"{'token':{CELL}}" + "".join(f" {head:{CELL + 4}}" for head in heads)
    for i, token in enumerate(trace.tokens.tolist()):
        yield cell(token) + "".join(f" {cell(candidates[j][i])}{math.exp(logprobs[j][i]):4.0%}" for j in layers)
    if columns <= n_layers:
        yield f"({n_layers + 1 - columns} of {n_layers} layers left out: a wider terminal shows them)"
