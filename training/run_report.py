"""The report of a training run for people: `checkpoints/NAME.md`, in Markdown, beside the checkpoint."""

from __future__ import annotations

import os
import re
import shlex
import time
from pathlib import Path
from typing import Any

from system.cli import command_line, plain
from system.device import machine, peak_memory
from system.files import atomic_write, read_utf8
from system.untrusted import as_utf8, printable
from text.token_files import read_token_meta
from training.config import TrainerConfig
from training.evaluation import bits_per_byte, perplexity
from training.loader import Epochs, Windows
from training.report import Samples
from training.run_log import RunLog
from training.state import Listener, StopReason, TrainingState
from weights.describe import data_of, loss_name, parent_of
from weights.huggingface import inexpressible_fields

MARK = "<!-- the report of a training run: a later run with the same --out replaces it -->\n"
_ROW = re.compile(r"\| (\d[\d,]{,25}) \| .* \|")
_MAX_SAMPLE = 300  # characters
_USE = {
    "base": "generate.py --model {out}",
    "sft": "generate.py --model {out} --chat",
    "lora": "generate.py --model {out} --chat",
    "classifier": "classify.py --model {out} 'a text'",
}
_REASONS = {
    None: "not finished yet",
    StopReason.DONE: "done",
    StopReason.TARGET_LOSS: "reached the target loss",
    StopReason.PATIENCE: "stopped, since the validation loss no longer improved",
    StopReason.INTERRUPTED: "interrupted; `--resume` continues the run",
}


def is_report(path: Path) -> bool:
    """Whether a file is the report of a run, which another run may replace."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(MARK)) == MARK.encode()


class RunReport(Listener):
    """Writes the report whenever the run is saved, and at the end. It keeps the samples of the run that it resumes."""

    def __init__(
        self,
        log: RunLog,
        train_data: Windows | Epochs,
        val_data: Windows | Epochs,
        metadata: dict[str, Any],
        samples: Samples | None,
    ):
        """`metadata` is that of the checkpoints. Without `samples`, the first example of an evaluation is shown."""
        self.log, self.train_data, self.val_data = log, train_data, val_data
        self.kind, self.loss_name = metadata["kind"], loss_name(metadata)
        self.samples, self.rows = samples, list[str]()

    def on_start(self, state: TrainingState) -> None:
        if state.step and is_report(state.config.report_path):
            lines = read_utf8(state.config.report_path).splitlines()
            matches = [match for match in map(_ROW.fullmatch, lines) if match]
            self.rows = [match[0] for match in matches if int(match[1].replace(",", "")) <= state.step]

    def on_evaluation(self, state: TrainingState, entry: dict[str, Any], is_best: bool) -> None:
        if self.samples:
            text = self.samples.sample(state)
        elif entry.get("examples"):
            text = entry["examples"][0]["output"]
        else:
            return
        self.rows.append(f"| {state.step:,} | {entry['val_loss']:.4f} | {_cell(text, _MAX_SAMPLE)} |")

    def on_save(self, state: TrainingState) -> None:
        self.write(state, None)

    def on_end(self, state: TrainingState, reason: StopReason) -> None:
        self.write(state, reason)

    def write(self, state: TrainingState, reason: StopReason | None) -> None:
        """Writes the report, atomically. `reason` is why the run ended, if it did."""
        config = state.config
        out = shlex.quote(as_utf8(config.out))
        plot = Path(os.path.relpath(config.plot_path(), config.report_path.parent)).as_posix()
        facts = "\n".join(f"| {name} | {_cell(text)} |" for name, text in self.facts(state).items())
        samples = ""
        if self.rows:
            examples = state.history[0].get("examples") if state.history else None
            prompt = self.samples.prompt if self.samples else (examples or [{"input": ""}])[0]["input"]
            after = f"After “{_cell(prompt, _MAX_SAMPLE)}”:\n\n" if prompt else ""
            table = "\n".join(self.rows)
            samples = (
                f"## Samples over time\n\n{after}| step | validation loss | text |\n| --- | --- | --- |\n{table}\n\n"
            )
        command = as_utf8(command_line())
        export = (
            "" if inexpressible_fields(state.model.config) else f"    python export.py --model {out} --out exported\n"
        )
        with atomic_write(config.report_path, "w") as file:
            file.write(
                f"{MARK}\n# {_cell(config.out)}\n\n{_REASONS[reason].capitalize()}: step {state.step:,} of "
                f"{config.max_steps:,}, {time.strftime('%Y-%m-%d %H:%M')}.\n\n    {printable(command)}\n\n"
                f"| | |\n| --- | --- |\n{facts}\n\n## Curve\n\n![losses over the steps](<{as_utf8(plot)}>)\n\n{samples}"
                f"## Use\n\n    python {_USE[self.kind].format(out=out)}\n"
                f"{export}"
            )

    def facts(self, state: TrainingState) -> dict[str, str]:
        """Returns what the run read, trained, reached and took, each under a name."""
        config, model, shape = state.config, state.model, state.model.config
        options, n = plain(config), model.n_parameters()
        n_trained, seconds = sum(p.numel() for p in state.trained_parameters), self.log.seconds
        of_which = f", {n_trained:,} of them trained" if n_trained < n else ""
        return {
            "started from": parent_of(options) or "random weights",
            "data": f"{data_of(options)}: {self.describe_data()}",
            "model": f"{shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide, context of "
            f"{shape.block_size:,} tokens, vocabulary of {shape.n_tokens:,}; {n:,} parameters{of_which}",
            "training": f"{state.step:,} steps of {config.batch_size} sequences; {state.tokens:,} tokens, "
            f"{state.tokens / n:.2g} per parameter; {str(state.dtype).removeprefix('torch.')}",
            "evaluation": self.describe_loss(state),
            "time": f"{seconds:,.0f} s, {state.tokens / max(seconds, 1e-9):,.0f} tokens/s",
            "peak memory": f"{peak_memory(state.processes.device) / 1e6:,.0f} MB",
            "machine": machine(state.processes.device)
            + (f"; {state.processes.world_size} processes" if state.processes.world_size > 1 else ""),
        }

    def describe_data(self) -> str:
        """Returns the size of the data."""
        train_data, tokens = self.train_data, f"{self.train_data.n_tokens:,} training tokens"
        if isinstance(train_data, Windows):
            counts = read_token_meta(train_data.paths[0].parent)["splits"].get("train", {})
            n, what = counts.get("documents"), "documents"
        else:
            n, what = len(train_data), "texts" if self.kind == "classifier" else "conversations"
        return f"{tokens}{f' of {n:,} {what}' if n else ''}, {self.val_data.n_tokens:,} validation tokens"

    def describe_loss(self, state: TrainingState) -> str:
        """Returns the validation loss of the weights in `--out`: the best ones, or the last ones."""
        if not state.history:
            return "none yet"
        is_best = state.config.keep == "best"
        kept = min(state.history, key=lambda entry: entry["val_loss"]) if is_best else state.history[-1]
        loss = kept["val_loss"]
        text = f"{self.loss_name} {loss:.4f} at step {kept['step']:,}"
        if self.kind != "classifier":
            text += f", perplexity {perplexity(loss):,.2f}"
        if self.val_data.bytes_per_token:
            text += f", {bits_per_byte(loss, self.val_data.bytes_per_token):.3f} bits per byte"
        return text


def add_test(config: TrainerConfig, accuracy: float, balanced_accuracy: float, n: int) -> None:
    """Adds the test of a classifier to the report of its run."""
    plot = Path(os.path.relpath(config.plot_path("confusion"), config.report_path.parent)).as_posix()
    report = read_utf8(config.report_path)
    with atomic_write(config.report_path, "w") as file:
        file.write(
            f"{report}\n## Test\n\nAccuracy {accuracy:.4f}, balanced accuracy {balanced_accuracy:.4f} on {n:,} texts, "
            "which were used neither for training nor for choosing the weights.\n\n"
            f"![confusion matrix](<{as_utf8(plot)}>)\n"
        )


def _cell(value: object, max_length: int | None = None) -> str:
    """Returns a text for one cell of a table in Markdown, which shows it as it is."""
    text = " ".join(printable(as_utf8(value)).split())
    if max_length and len(text) > max_length:
        text = text[: max_length - 1] + "…"
    return re.sub(r"([\\`*_\[\]<|])", r"\\\1", text)
