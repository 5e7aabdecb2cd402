"""Draws the pictures of docs/how-it-works.md from the demo's model: tokens, attention, logit lens and loss.

make demo && .venv/bin/python -m benchmarks.pictures
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from generation.lens import Trace
from generation.text_model import TextModel
from system.cli import run
from system.files import atomic_write
from text.tokenizer import legible
from training.plots import save_figure

COLORS = ["#bfdbfe", "#fde68a", "#a7f3d0", "#fbcfe8"]


@dataclass(frozen=True)
class Config:
    model: Path = Path("checkpoints/demo/pretrained.pt")
    """checkpoint of a language model"""
    plot: Path = Path("plots/demo/pretrained_loss.png")
    """the loss curve of its training"""
    out: Path = Path("docs/pictures")
    """folder for the pictures"""
    text: str = "Return a copy of the string with leading and trailing whitespace removed."
    """the text to look into"""


def main(config: Config) -> None:
    """Draws four pictures, and names the head whose attention is drawn."""
    text_model = TextModel.load(config.model, "cpu", "float32")
    text_trace = text_model.trace(config.text)
    tokens = [legible(text_model.tokenizer.decode_bytes([i])) for i in text_trace.tokens.tolist()]
    to_previous = text_trace.attention.diagonal(-1, 2, 3).mean(dim=-1)  # (n_layer, nh)
    layer, head = divmod(int(to_previous.argmax()), to_previous.size(1))
    title = f"layer {layer + 1}, head {head + 1}"
    print(
        f"{title} gives {to_previous.max():.0%} of its attention to the token before; all heads together "
        f"{to_previous.mean():.0%}"
    )
    draw("tokens", (9, 0.8), config, lambda axes: draw_tokens(axes, tokens, text_trace.tokens.tolist()))
    title = f"layer {layer + 1}, head {head + 1}"
    draw(
        "attention", (6, 6), config, lambda axes: draw_attention(axes, text_trace.attention[layer, head], tokens, title)
    )
    draw("layers", (13, 2.4), config, lambda axes: draw_layers(axes, text_model, text_trace, tokens))
    with atomic_write(config.out / "loss.png") as file:
        file.write(config.plot.read_bytes())


def draw(name: str, size: tuple[float, float], config: Config, fill: Callable[[Axes], None]) -> None:
    """Saves one picture."""
    figure = Figure(figsize=size, layout="constrained")
    fill(figure.subplots())
    save_figure(figure, config.out / f"{name}.png")


def draw_tokens(axes: Axes, tokens: list[str], ids: list[int]) -> None:
    """Draws the tokens of a text in four colours in turn, each with its id."""
    left = 0.0
    for i, (token, number) in enumerate(zip(tokens, ids, strict=True)):
        width = max(len(token), len(str(number)) * 0.7) + 0.8
        axes.barh(0, width - 0.1, left=left, color=COLORS[i % len(COLORS)])
        axes.text(left + width / 2, 0.12, token, ha="center", va="center", family="monospace")
        axes.text(left + width / 2, -0.25, str(number), ha="center", va="center", fontsize=7, color="0.4")
        left += width
    axes.set_xlim(0, left)
    axes.axis("off")


def draw_attention(axes: Axes, weights: torch.Tensor, tokens: list[str], title: str) -> None:
    """Draws the attention weights (T, T) of one head."""
    axes.imshow(weights, cmap="Blues", vmin=0, vmax=1)
    positions = range(len(tokens))
    axes.set_xticks(positions, tokens, rotation=90, family="monospace")
    axes.set_yticks(positions, tokens, family="monospace")
    axes.set(title=title, xlabel="looks at", ylabel="token")


def draw_layers(axes: Axes, text_model: TextModel, text_trace: Trace, tokens: list[str]) -> None:
    """Draws the likeliest next token after each layer; the colour is the probability of the token that came."""
    layers = text_model.predictions_by_layer(text_trace, k=1)
    axes.imshow(layers.next_logprobs.exp(), cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
    for layer, row in enumerate(layers.candidates[:, :-1, 0].tolist()):
        for position, token in enumerate(row):
            name = legible(text_model.tokenizer.decode_bytes([token]))
            is_dark = layers.next_logprobs[layer, position] > math.log(0.6)
            color = "white" if is_dark else "black"
            axes.text(position, layer, name, ha="center", va="center", fontsize=8, family="monospace", color=color)
    axes.set_xticks(range(len(tokens) - 1), tokens[:-1], family="monospace", fontsize=8)
    axes.set_yticks(
        range(len(layers.candidates)), ["embedding", *(f"layer {i + 1}" for i in range(len(text_model.model.h)))]
    )


if __name__ == "__main__":
    run(main, Config)
