"""Plots of a training run, as PNG files."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from system.background import Background
from system.cli import shorten
from system.files import atomic_write
from system.untrusted import as_utf8
from training.report import before_and_after
from training.run_log import read_log
from training.state import Listener, TrainingState

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Entries = list[dict[str, Any]]
MAX_LABELS_DRAWN = 40

os.environ["MPLBACKEND"] = "agg"  # plots are files; an unknown backend in the environment would be an error
warnings.filterwarnings("ignore", "Glyph .* missing")  # the font lacks many scripts


class LossPlot(Listener):
    """Draws the log whenever the run is saved, in the background."""

    def __init__(self, background: Background):
        self.background = background

    def on_save(self, state: TrainingState) -> None:
        log_path, plot_path = state.config.log_path, state.config.plot_path()
        self.background.start(lambda: draw_losses(log_path, plot_path))


def draw_losses(log_path: Path, plot_path: Path) -> None:
    """Draws a log: training and validation loss and the learning rate, over steps and tokens; below them the examples.

    The file is replaced atomically.
    """
    from matplotlib.figure import Figure

    entries = read_log(log_path)
    with_examples = [entry for entry in entries if "examples" in entry]
    figure = Figure(figsize=(8, 7.7 if with_examples else 4.5), layout="constrained")
    if with_examples:
        axes, below = figure.subplots(2, height_ratios=[4.5, 3.2])
        below.axis("off")
        text = before_and_after(with_examples, width=125)
        below.text(0, 1, text, va="top", fontsize=6.5, family="monospace", parse_math=False)
    else:
        axes = figure.subplots()
    plot_losses(axes, entries)
    plot_learning_rate(axes, entries)
    axes.set_title(as_utf8(log_path.stem))
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


def is_plot(path: Path) -> bool:
    """Whether a file is a PNG that Matplotlib drew."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(256)
    return start.startswith(b"\x89PNG") and b"Matplotlib" in start


def most_confused(confusion: np.ndarray, n: int) -> np.ndarray:
    """Returns in ascending order the indices of at most `n` labels that have the most errors in `confusion` (L, L)."""
    n_errors = confusion.sum(axis=0) + confusion.sum(axis=1) - 2 * confusion.diagonal()  # expected, or predicted
    return np.sort(np.argsort(-n_errors, kind="stable")[:n])


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG, atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with atomic_write(path) as file:
        FigureCanvasAgg(figure).print_png(file)
