"""What a training run says of itself: the log on disk, its curves, and the tables at its start and end."""

import contextlib
import json
import math
import time
import warnings
from pathlib import Path

from model import GPT
from system.cli import plain
from system.errors import UserError
from system.files import atomic_write
from training.config import TrainerConfig


class RunLog:
    """The log of a run: one JSON object a line, each with the `seconds` since the run began; TensorBoard and Weights &
    Biases get the same numbers where they are asked for."""

    def __init__(self, path: Path, step: int, config: TrainerConfig):
        """Goes on after `step`: what a killed run logged later is dropped. Raises UserError for a missing library."""
        kept = [entry for entry in read_log(path) if entry["step"] <= step] if step else []
        self.before = max((entry["seconds"] for entry in kept), default=0.0)
        self.start = time.perf_counter()
        self.sinks = []
        if config.tensorboard:
            self.sinks.append(_tensorboard(path))
        if config.wandb:
            self.sinks.append(_wandb(path, config))
        with atomic_write(path, "w") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in kept)
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    @property
    def seconds(self) -> float:
        """Time since the run began, interruptions left out."""
        return self.before + time.perf_counter() - self.start

    def write(self, entry: dict) -> None:
        """Adds one entry: `step`, numbers, and perhaps `examples`."""
        self.file.write(json.dumps({**entry, "seconds": round(self.seconds, 3)}) + "\n")
        for add in self.sinks:
            add({name: value for name, value in entry.items() if name != "examples"})

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


def _tensorboard(path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package: pip install tensorboard") from None
    writer = SummaryWriter(str(path.with_suffix("")) + "_tensorboard")

    def add(entry):
        for name, value in entry.items():
            if name != "step":
                writer.add_scalar(name, value, entry["step"])
        writer.flush()

    return add


def _wandb(path, config):
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the package: pip install wandb") from None
    try:
        run = wandb.init(project="gpt2", name=path.stem, config=plain(config))
    except wandb.Error as error:
        raise UserError(f"--wandb: {error}") from None
    return lambda entry: run.log({name: value for name, value in entry.items() if name != "step"}, step=entry["step"])


def read_log(path: Path) -> list[dict]:
    """Reads a log; a last line that a kill cut short is passed over, and so is what is no entry."""
    entries = []
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict) and "step" in entry]


def draw_losses(log_path: Path, plot_path: Path) -> None:
    """Draws a log into a PNG, atomically: training and validation loss and the learning rate, over steps and tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    entries = read_log(log_path)
    examined = [entry for entry in entries if "examples" in entry]
    figure = Figure(figsize=(8, 4.5 + 3.2 * bool(examined)), layout="constrained")
    ratios = [4.5, 3.2] if examined else [1]
    axes, *below = figure.subplots(len(ratios), height_ratios=ratios, squeeze=False)[:, 0]
    for key, label, style in (
        ("loss", "training", {"lw": 1, "alpha": 0.6}),
        ("val_loss", "validation", {"marker": "o", "ms": 4}),
    ):
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=f"{label} (last: {points[-1][1]:.3f})", **style)
    axes.set(xlabel="optimizer step", ylabel="loss (nats)", title=log_path.stem)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    steps = [entry for entry in entries if "learning_rate" in entry]
    if steps:
        rates = axes.twinx()
        rates.plot([e["step"] for e in steps], [e["learning_rate"] for e in steps], color="gray", lw=1, ls=":")
        rates.set(ylabel="learning rate (dotted)", ylim=(0, None))
        tokens_per_step = steps[-1]["tokens"] / steps[-1]["step"]
        tokens = axes.secondary_xaxis("top", (lambda x: x * tokens_per_step, lambda x: x / tokens_per_step))
        tokens.xaxis.set_major_formatter(EngFormatter())
        tokens.set_xlabel("tokens")
    if examined:
        below[0].axis("off")
        text = before_and_after(examined, width=125)
        below[0].text(0, 1, text, va="top", fontsize=6.5, family="monospace", parse_math=False)
    with warnings.catch_warnings(), atomic_write(plot_path) as file:
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of scripts that the font lacks
        FigureCanvasAgg(figure).print_png(file)


def parameter_table(model: GPT) -> str:
    """Returns how many parameters each part of a model has, as a table."""
    parts = {
        "LoRA": ("lora_", "role_rows"),
        "token embedding": ("wte",),
        "position embedding": ("wpe",),
        f"attention, {model.config.n_layer} layers": (".attn.",),
        f"MLP, {model.config.n_layer} layers": (".mlp.",),
        "LayerNorms": ("ln_",),
        "head": ("lm_head",),
    }
    counts = dict.fromkeys(parts, 0)
    for name, parameter in model.named_parameters():  # names a tied head once, as the embedding
        counts[next(part for part, marks in parts.items() if any(mark in name for mark in marks))] += parameter.numel()
    counts["in all"] = model.n_parameters()
    return "\n".join(f"{part:22}{n:>15,}" for part, n in counts.items() if n)


def before_and_after(history: list[dict], width: int = 160) -> str:
    """Returns the held-out loss and the examples before training and of the weights that were kept, as text."""
    before, after = (entries := [entry for entry in history if "examples" in entry])[0], entries[-1]
    lines = [
        f"held-out loss {before['val_loss']:.4f} before, {after['val_loss']:.4f} after (step {after['step']:,}); "
        "on held-out inputs, greedily:"
    ]
    for old, new in zip(before["examples"], after["examples"], strict=True):
        lines.append(f"> {shortened(new['input'], width)}")
        for label, text in (("before", old["output"]), ("after", new["output"]), ("wanted", new["expected"])):
            lines.append(f"  {label:7} {shortened(text, width)}")
    return "\n".join(lines)


def shortened(text: str, longest: int) -> str:
    """Returns a text in one line of at most so many characters."""
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def summary(
    best_val_loss: float, bytes_per_token: float | None, tokens: int, model: GPT, seconds: float, is_text: bool
) -> str:
    """Returns what a run came to: its best validation loss in every unit, tokens beside parameters, time and speed."""
    parts = []
    if math.isfinite(best_val_loss):
        parts.append(f"best validation loss {best_val_loss:.4f}")
    if math.isfinite(best_val_loss) and is_text:
        parts[-1] += f", perplexity {math.exp(min(best_val_loss, 700)):,.2f}"
    if math.isfinite(best_val_loss) and bytes_per_token:
        parts[-1] += f", {best_val_loss / math.log(2) / bytes_per_token:.3f} bits per byte"
    per_parameter = tokens / model.n_parameters()
    parts.append(
        f"{tokens:,} tokens, {per_parameter:.2g} per parameter (compute-optimal: about 20, Hoffmann et al. 2022)"
    )
    parts.append(f"{seconds:,.0f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s")
    return "\n".join(parts)
