"""Plots of a training run, as PNG files."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from system.cli import shorten
from system.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Entries = list[dict[str, Any]]
MAX_LABELS_DRAWN = 40

os.environ["MPLBACKEND"] = "agg"  # plots are files; an unknown backend in the environment would be an error
warnings.filterwarnings("ignore", "Glyph .* missing")  # the font lacks many scripts


def draw_losses(entries: Entries, title: str, plot_path: Path) -> None:
    """Draws the entries of a log: training and validation loss and the learning rate, over steps and tokens.

    The file is replaced atomically.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    plot_losses(axes, entries)
    plot_learning_rate(axes, entries)
    axes.set_title(title)
    save_figure(figure, plot_path)


def plot_losses(axes: Axes, entries: Entries) -> None:
    """Draws training and validation loss over steps."""
    losses = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    val_losses = [(entry["step"], entry["val_loss"]) for entry in entries if "val_loss" in entry]
    if losses:
        axes.plot(*zip(*losses, strict=True), lw=1, alpha=0.6, label=f"training (last: {losses[-1][1]:.3f})")
    if val_losses:
        label = f"validation (last: {val_losses[-1][1]:.3f})"
        axes.plot(*zip(*val_losses, strict=True), marker="o", ms=4, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")


def plot_learning_rate(axes: Axes, entries: Entries) -> None:
    """Adds the learning rate on the right, and tokens at the top."""
    from matplotlib.ticker import EngFormatter

    steps = [entry for entry in entries if entry["step"] and entry.keys() >= {"learning_rate", "tokens"}]
    if not steps:
        return
    rates = axes.twinx()
    rates.plot([e["step"] for e in steps], [e["learning_rate"] for e in steps], color="gray", lw=1, ls=":")
    rates.set(ylabel="learning rate (dotted)", ylim=(0, None))
    tokens_per_step = steps[-1]["tokens"] / steps[-1]["step"]
    tokens = axes.secondary_xaxis("top", (lambda x: x * tokens_per_step, lambda x: x / tokens_per_step))
    tokens.xaxis.set_major_formatter(EngFormatter())
    tokens.set_xlabel("tokens")


def draw_confusion_matrix(confusion: list[list[int]], labels: list[str], plot_path: Path) -> None:
    """Draws how often each label, a row of `confusion`, was predicted as each label, a column.

    Of many labels, only those appear that are confused most: the size of the picture grows with the square.
    """
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from sklearn.metrics import ConfusionMatrixDisplay

    counts = np.array(confusion)
    shown = most_confused(counts, MAX_LABELS_DRAWN)
    n = len(shown)
    figure = Figure(figsize=(2.5 + 0.7 * n, 2 + 0.7 * n), layout="constrained")
    axes = figure.add_subplot()
    names = [shorten(labels[i], 25) for i in shown]
    ConfusionMatrixDisplay(counts[np.ix_(shown, shown)], display_labels=names).plot(
        ax=axes, colorbar=False, cmap="Blues", xticks_rotation=45
    )
    if n < len(labels):
        axes.set_title(f"the {n} of {len(labels):,} labels that are confused most")
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a label may look like a formula
    save_figure(figure, plot_path)


def most_confused(confusion: np.ndarray, n: int) -> np.ndarray:
    """Returns in ascending order the indices of at most `n` labels that have the most errors in `confusion` (L, L)."""
    n_errors = confusion.sum(axis=0) + confusion.sum(axis=1) - 2 * confusion.diagonal()  # expected, or predicted
    return np.sort(np.argsort(-n_errors, kind="stable")[:n])


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG, atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with atomic_write(path) as file:
        FigureCanvasAgg(figure).print_png(file)
