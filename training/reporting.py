"""What a training run shows: on the console, in its log, and in the report beside the checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model import GPT
from system.cli import command_line, duration, plain, printable, progress, shorten
from system.device import machine, peak_flops, peak_memory
from system.errors import UserError
from system.files import atomic_write
from training.config import TrainerConfig
from training.examples import before_and_after
from training.loader import Sequences, Windows
from training.plots import draw_losses
from training.state import Callback, Entry, StopReason, TrainingState
from weights import checkpoint
from weights.describe import evaluation, facts, markdown_table

SECONDS_BETWEEN_LINES = 30

Sink = Callable[[int, dict[str, float]], None]
"""Receives the numbers of a step."""


class Console(Callback):
    """Prints the model, a progress bar, a line per evaluation, and what the run came to."""

    def __init__(self, log: Log, train_data: Windows | Sequences, metadata: dict[str, Any]):
        self.log, self.train_data, self.metadata = log, train_data, metadata

    def on_start(self, state: TrainingState) -> None:
        config, data, model = state.config, self.train_data, state.model
        if not state.step:
            print(parameter_table(model))
        n, n_trained = model.n_parameters(), sum(p.numel() for p in state.trained_parameters)
        if n_trained < n:
            print(f"{n_trained:,} of {n:,} parameters train ({n_trained / n:.2%})")
        n_epochs = config.max_steps / data.batches_per_epoch
        flops = model.flops_per_token() * data.n_tokens / data.batches_per_epoch
        print(
            f"{data.n_tokens:,} training tokens, {data.batches_per_epoch:,.0f} steps of {config.batch_size} sequences "
            f"an epoch; {config.max_steps:,} steps are {n_epochs:,.1f} epochs, at {flops / 1e12:.3g} TFLOP a step"
        )
        if n_epochs > 10 and isinstance(data, Windows) and not model.config.dropout:
            print(f"warning: in {n_epochs:,.0f} passes over so little text a model memorizes it: try fewer --max-steps")
        if state.n_micro_batches > 1:
            print(f"each step adds up the gradients of {state.n_micro_batches} micro-batches")
        self.peak_flops = (peak_flops(state.processes.device) or 0.0) * state.processes.world_size
        self.bar = progress(total=config.max_steps, initial=state.step, unit="step")
        self.start, self.tokens_before = time.perf_counter(), state.tokens
        self.next_line = self.start + SECONDS_BETWEEN_LINES

    def on_step(self, state: TrainingState, entry: Entry) -> None:
        rate = (entry["tokens"] - self.tokens_before) / (time.perf_counter() - self.start)
        text = f"loss {entry['loss']:.3f}, {rate:,.0f} tokens/s"
        if self.peak_flops:
            text += f", MFU {rate * state.model.flops_per_token() / self.peak_flops:.0%}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if self.bar.disable and time.perf_counter() >= self.next_line:  # no terminal: plain lines
            print(f"step {entry['step']:,} of {state.config.max_steps:,}: {text}", file=sys.stderr)
            self.next_line += SECONDS_BETWEEN_LINES

    def on_evaluation(self, state: TrainingState, entry: Entry, is_best: bool) -> None:
        self.bar.clear()
        text = f"step {state.step:,}: validation loss {entry['val_loss']:.4f}"
        if "bits_per_byte" in entry:
            text += f", {entry['bits_per_byte']:.3f} bits per byte"
        print(text + (" (the best so far)" if is_best and state.config.keep == "best" else ""))
        for example in entry.get("examples", []):
            if example["input"] and not example["expected"]:  # the user's --sample-prompt
                print(printable(f"  {example['input']!r} → {shorten(example['output'], 300)!r}"))

    def close(self) -> None:
        self.bar.close()

    def on_end(self, state: TrainingState, reason: StopReason) -> None:
        config, kind, memory = state.config, self.metadata["kind"], peak_memory(state.processes.device) / 1e6
        print(f"{reason.value} at step {state.step:,}; curves in {config.plot_path()}")
        print(f"{state.tokens:,} tokens in {speed(state, self.log.seconds)}, peak memory {memory:,.0f} MB")
        kept = kept_evaluation(state)
        if kept is None:
            print(f"no evaluation after training began yet, so {config.out} is not written")
            return
        figures = ", ".join(f"{name} {value}" for name, value in evaluation(self.metadata, kept).items())
        print(f"model in {config.out}, of step {kept['step']:,}: {figures}")
        before = state.history[0]
        if before["step"] == 0 and before["val_loss"] <= kept["val_loss"]:
            print(
                f"it was better before, with a validation loss of {before['val_loss']:.4f}: try a lower --learning-rate"
            )
        elif kind == "base" and state.step == state.history[-1]["step"] and kept["step"] < 0.7 * state.step:
            print(f"after step {kept['step']:,} it only memorized: --max-steps {kept['step']} gives a better model")
        elif kind == "base":
            per_parameter = state.tokens / state.model.n_parameters()
            print(f"{per_parameter:.2g} tokens per parameter; compute-optimal are about 20 (Hoffmann et al. 2022)")
        text = before_and_after(state.history[0], kept)
        if kind == "base" and (examples := kept.get("examples")):
            text = f"it writes, for example:\n  {shorten(examples[0]['output'], 300)!r}"
        if text:
            print(printable(text))
        if reason is not StopReason.INTERRUPTED and kind != "classifier":
            chat = "" if kind == "base" else " --chat"
            print(f"now try: python generate.py --model {shlex.quote(str(config.out))}{chat}")


def kept_evaluation(state: TrainingState) -> Entry | None:
    """Returns the evaluation of the weights in `--out`: the best after step 0, or the last; None if there is none."""
    later = [entry for entry in state.history if entry["step"]]
    if state.config.keep == "last":
        return later[-1] if later else None
    return min(later, key=lambda entry: entry["val_loss"], default=None)


def speed(state: TrainingState, seconds: float) -> str:
    """Returns the time that a run took, and its tokens in a second, as text."""
    return f"{duration(seconds)}: {state.tokens / max(seconds, 1e-9):,.0f} tokens/s"


def parameter_table(model: GPT) -> str:
    """Returns the number of parameters of each part of a model, as a table."""
    counts = dict.fromkeys(PARTS.values(), 0)
    for name, parameter in model.named_parameters():  # lists a tied head once, as the embedding
        counts[next(part for mark, part in PARTS.items() if mark in name)] += parameter.numel()
    counts["in all"] = model.n_parameters()
    return "\n".join(f"{part:22}{n:>15,}" for part, n in counts.items() if n)


PARTS = {
    "lora_": "LoRA",
    "role_rows": "LoRA",
    "wte": "token embedding",
    "wpe": "position embedding",
    ".attn.": "attention",
    ".mlp.": "MLP",
    "ln_": "LayerNorms",
    "lm_head": "head",
}
"""A part of a model by what its parameters have in their names; the first that fits counts."""


class Log(Callback):
    """Writes the log: one JSON object per line. Each gets the `seconds` since the run began, without interruptions, and
    `max_steps`. TensorBoard and Weights & Biases get the same numbers."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.sinks: list[Sink] = []

    @property
    def seconds(self) -> float:
        """Time since the run began, without interruptions."""
        return time.perf_counter() - self.start

    def on_start(self, state: TrainingState) -> None:
        """Drops what a killed run logged after the current step. Raises UserError for a missing library."""
        config = state.config
        if config.tensorboard:
            self.sinks.append(tensorboard_sink(config))
        if config.wandb:
            self.sinks.append(wandb_sink(config))
        kept = [entry for entry in read_log(config.log_path) if entry["step"] <= state.step] if state.step else []
        with atomic_write(config.log_path, "w") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in kept)
        self.start = time.perf_counter() - max((entry.get("seconds", 0.0) for entry in kept), default=0.0)

    def on_log(self, state: TrainingState, entry: Entry) -> None:
        line = {**entry, "seconds": round(self.seconds, 3), "max_steps": state.config.max_steps}
        with open(state.config.log_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for sink in self.sinks:
            sink(entry["step"], {name: value for name, value in entry.items() if name not in ("step", "examples")})

    def on_evaluation(self, state: TrainingState, entry: Entry, is_best: bool) -> None:
        self.on_log(state, entry)


def read_log(path: Path) -> list[Entry]:
    """Returns the entries of a log, none if there is no such file. Skips a last line that a kill cut short."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def tensorboard_sink(config: TrainerConfig) -> Sink:
    """Returns a sink that writes event files beside the log. Raises UserError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package: pip install tensorboard") from None
    writer = SummaryWriter(f"{config.out.with_suffix('')}_tensorboard")

    def add(step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return add


def wandb_sink(config: TrainerConfig) -> Sink:
    """Returns a sink that sends entries to Weights & Biases. Raises UserError if that fails."""
    try:
        import wandb

        run = wandb.init(project="gpt2", name=config.out.stem, config=plain(config))
    except ImportError:
        raise UserError("--wandb needs the package: pip install wandb") from None
    except wandb.Error as error:  # such as a missing API key
        raise UserError(f"--wandb: {error}") from None
    return lambda step, figures: run.log(figures, step=step)


class Report(Callback):
    """Draws the plot and writes `checkpoints/NAME.md`, a page in Markdown, whenever the run is saved."""

    def __init__(self, log: Log, metadata: dict[str, Any]):
        self.log, self.metadata = log, metadata

    def on_save(self, state: TrainingState) -> None:
        self.write(state, "not finished yet")

    def on_end(self, state: TrainingState, reason: StopReason) -> None:
        self.write(state, reason.value)

    def write(self, state: TrainingState, status: str) -> None:
        """Draws the plot and writes the page."""
        config = state.config
        try:
            draw_losses(read_log(config.log_path), config.out.stem, config.plot_path())
            with atomic_write(config.report_path, "w") as file:
                file.write(self.page(state, status))
        except Exception as error:  # a missing font or a full disk must not end a run
            print(f"warning: no plot or report of {config.out}: {error}")

    def page(self, state: TrainingState, status: str) -> str:
        """Returns the report."""
        config, processes, kept = state.config, state.processes, kept_evaluation(state)
        plot = Path(os.path.relpath(config.plot_path(), config.report_path.parent)).as_posix()
        packed = checkpoint.pack(state.model, **self.metadata, step=state.step, tokens=state.tokens)
        known = facts({**packed, "train_config": plain(config), "history": [kept] if kept else []})
        known["time"] = speed(state, self.log.seconds)
        known["machine"] = machine(processes.device)
        known["processes"] = str(processes.world_size)
        examples = [
            (f"{entry['step']:,}", f"{entry['val_loss']:.4f}", example["input"], example["output"])
            for entry in state.history
            for example in entry.get("examples", [])[:1]
        ]
        parts = (
            f"# {config.out}",
            f"{status.capitalize()}, {time.strftime('%Y-%m-%d %H:%M')}.",
            f"    {printable(command_line())}",
            markdown_table(["", ""], known.items()),
            f"![losses over the steps](<{plot}>)",
            markdown_table(["step", "validation loss", "input", "output"], examples),
        )
        return "\n\n".join(parts) + "\n"
