"""Plots of a training run, as PNG files, each replaced atomically."""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from system.cli import shorten
from system.files import atomic_write

MAX_LABELS_DRAWN = 40

os.environ["MPLBACKEND"] = "agg"  # plots are files; an unknown backend in the environment would be an error
warnings.filterwarnings("ignore", "Glyph .* missing")  # the font lacks many scripts


def draw_losses(entries: list[dict[str, Any]], title: str, plot_path: Path) -> None:
    """Draws the entries of a log: training and validation loss, in nats, and the learning rate, over the steps."""
    from matplotlib.figure import Figure

    def curve(name: str) -> tuple[list[int], list[float]]:
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        return [step for step, _ in points], [value for _, value in points]

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (
        ("loss", "training", {"lw": 1, "alpha": 0.6}),
        ("val_loss", "validation", {"marker": "o", "ms": 4}),
    ):
        steps, losses = curve(name)
        if losses:
            axes.plot(steps, losses, label=f"{label} (last: {losses[-1]:.3f})", **style)
    axes.set(xlabel="optimizer step", ylabel="loss (nats)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    rates = axes.twinx()
    rates.plot(*curve("learning_rate"), color="gray", lw=1, ls=":")
    rates.set(ylabel="learning rate (dotted)", ylim=(0, None))
    with atomic_write(plot_path) as file:
        figure.savefig(file, format="png")


def draw_confusion_matrix(confusion: list[list[int]], labels: list[str], plot_path: Path) -> None:
    """Draws how often each label, a row of `confusion`, was predicted as each label, a column.

    Of many labels, only those appear that are confused most: the size of the picture grows with the square.
    """
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    counts = np.array(confusion)
    shown = most_confused(counts, MAX_LABELS_DRAWN)
    n = len(shown)
    figure = Figure(figsize=(2.5 + 0.7 * n, 2 + 0.7 * n), layout="constrained")
    axes = figure.subplots()
    names = [shorten(labels[i], 25).replace("$", r"\$") for i in shown]  # between two "$" stands a formula
    display = ConfusionMatrixDisplay(counts[np.ix_(shown, shown)], display_labels=names)
    display.plot(ax=axes, colorbar=False, cmap="Blues", xticks_rotation=45)
    if n < len(labels):
        axes.set_title(f"the {n} of {len(labels):,} labels that are confused most")
    with atomic_write(plot_path) as file:
        figure.savefig(file, format="png")


def most_confused(confusion: np.ndarray, n: int) -> np.ndarray:
    """Returns in ascending order the indices of at most `n` labels that have the most errors in `confusion` (L, L)."""
    n_errors = confusion.sum(axis=0) + confusion.sum(axis=1) - 2 * confusion.diagonal()  # expected, or predicted
    return np.sort(np.argsort(-n_errors, kind="stable")[:n])
