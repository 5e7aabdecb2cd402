"""A whole training run: the state, the loop, and everything that listens to it. Every training script calls `train`."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal

from model import GPT
from system.background import Background
from system.cli import command_line
from system.device import multiplies_faster_in_bfloat16
from system.errors import UserError
from system.interrupts import outlive_output
from text.tokenizer import from_spec
from training.checkpointing import Checkpointer, changed_options, restore
from training.config import TrainerConfig
from training.distributed import Processes
from training.loader import Sequences, Windows
from training.plan import print_plan
from training.plots import LossPlot
from training.prompts import prompts
from training.report import Examples, ProgressBar, Report, Samples, Summary
from training.run_log import RunLog
from training.run_report import RunReport
from training.state import Listener, StopReason, TrainingState
from training.trainer import Trainer

if TYPE_CHECKING:
    from training.sharding import Sharding  # half a second to import, needed for --fsdp only


def train(
    model: GPT,
    train_data: Windows | Sequences,
    val_data: Windows | Sequences,
    config: TrainerConfig,
    processes: Processes,
    metadata: dict[str, Any],
    *,
    resumed: dict[str, Any] | None = None,
    sharding: Sharding | None = None,
    samples: Samples | None = None,
    examples: Examples | None = None,
    has_random_weights: bool = False,
) -> StopReason:
    """Trains a model, and writes `--out`, the resume file, the log, the plot and the report. `--plan` measures only.

    `metadata` (kind, tokenizer, template and the like) is stored in the checkpoints. `resumed` is a loaded resume file,
    whose weights `model` has. `has_random_weights` says that the first loss is known. Raises UserError for data that
    cannot be used, and for a loss that is not finite. On the CPU, resuming changes no bit of the result.
    """
    if config.patience:  # needs an evaluation in each epoch
        config = dataclasses.replace(config, eval_every=min(config.eval_every, math.ceil(train_data.batches_per_epoch)))
    if config.dtype == "auto" and processes.device.type == "cpu" and not sharding:
        config = dataclasses.replace(config, dtype=cpu_precision(model, processes, resumed))
    metadata = {**metadata, "data": [train_data.fingerprint(), val_data.fingerprint()]}
    metadata["prompts"] = prompts(train_data, val_data, from_spec(metadata["tokenizer"]))
    if resumed:
        print_changes(config, resumed, metadata["data"], processes)
    state = TrainingState.create(model, config, processes, sharding)
    if resumed:
        restore(state, resumed)
        resumed.clear()  # the caller's reference would keep its tensors in memory
    trainer = Trainer(state, train_data, val_data)
    if config.plan:
        print_plan(trainer, metadata["kind"])
        processes.leave()
        return StopReason.DONE
    background = Background()
    checkpointer = Checkpointer(metadata, background)
    if processes.rank > 0:
        return trainer.run([samples, checkpointer] if sharding and samples else [checkpointer])
    log = RunLog()
    listeners: list[Listener | None] = [
        # The order matters: the bar goes before anything is printed, examples belong in the log and in the checkpoint,
        # and a checkpoint is written before its plot.
        ProgressBar(),
        examples,
        log,
        Report(train_data, math.log(model.config.vocab_size) if has_random_weights else None),
        samples,
        Summary(log, metadata, val_data.bytes_per_token),
        checkpointer,
        LossPlot(background),
        RunReport(log, train_data, val_data, metadata, samples),
    ]
    return run_and_outlive_output(trainer, [listener for listener in listeners if listener])


def run_and_outlive_output(trainer: Trainer, listeners: list[Listener]) -> StopReason:
    """Runs the training loop. If nobody reads the output any more, saves and raises UserError."""
    with outlive_output() as broken:
        reason = trainer.run(listeners)
    if broken and reason is StopReason.INTERRUPTED:
        command = command_line("--resume", drop=("--overwrite",))
        raise UserError(f"{broken[0]}; the run is saved at step {trainer.state.step:,}: continue with {command}")
    return reason


def print_changes(config: TrainerConfig, resumed: dict[str, Any], data: list[Any], processes: Processes) -> None:
    """Says at which step a run goes on, and with which other options. Raises UserError if its data is another."""
    changes = changed_options(config, resumed, data)
    if processes.rank == 0:
        options = f" with other options than before: {', '.join(changes)}" if changes else ""
        print(f"resuming at step {resumed['step']:,}{options}")


def cpu_precision(model: GPT, processes: Processes, resumed: dict[str, Any] | None) -> Literal["float32", "bfloat16"]:
    """Returns the precision of the run to resume, or for a new run bfloat16 if it is faster on every process.

    A run of a version that did not choose was in float32.
    """
    if resumed:
        return "bfloat16" if resumed.get("train_config", {}).get("dtype") == "bfloat16" else "float32"
    is_slower = processes.any(not multiplies_faster_in_bfloat16(model.config.n_embd))
    if not is_slower and processes.rank == 0:
        print(
            "training in bfloat16: this processor multiplies matrices faster in it than in float32 "
            "(--dtype float32 chooses that)"
        )
    return "float32" if is_slower else "bfloat16"
