"""Checkpoints of a training run: claiming the output, writing while the run goes on, resuming."""

from __future__ import annotations

import dataclasses
import glob
import math
import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from model import GPTConfig
from system.background import Background
from system.cli import command_line, plain
from system.device import copy_to_host, queued_work
from system.errors import UserError, require
from system.locks import hold, locked, output_lock, reading
from system.untrusted import brief, is_integer, is_number
from training.config import TrainerConfig
from training.distributed import Processes
from training.optim import Muon
from training.plots import is_plot
from training.run_log import holds_only_a_beginning
from training.run_report import is_report
from training.state import Listener, StepFigures, StopReason, TrainingState
from weights import checkpoint
from weights.loading import load_checkpoint


def claim_output(
    config: TrainerConfig, processes: Processes, *kinds: str, inputs: Iterable[Path] = ()
) -> dict[str, Any] | None:
    """Locks the output until `main` ends. Needed on every rank, first of all.

    Returns the loaded state to resume from, which must be of one of the `kinds`, or None for a new run. Raises
    UserError if another process writes the output, if a run would overwrite another unasked or one of its `inputs`, or
    if there is nothing to resume. A run that only plans writes nothing, so it claims nothing.
    """
    if config.plan:
        return None
    for path in inputs:
        if any(_is_same_file(path, out) for out in _outputs(config)):
            raise UserError(f"the run would write to {path}, which it reads: choose another --out")
    processes.on_first(lambda: _lock_output(config))
    return load_checkpoint(config.last_path, verify=True, kinds=kinds) if config.resume else None


def _outputs(config: TrainerConfig) -> list[Path]:
    """Returns the files that a run writes, and the snapshots of an older run that it might replace."""
    snapshots = config.out.parent.glob(f"snapshots/{glob.escape(config.out.stem)}_step_*.pt")
    plots = [config.plot_path(what) for what in config.plots]
    return [
        config.out,
        config.last_path,
        config.log_path,
        config.report_path,
        *plots,
        *(snapshots if config.snapshot_every else ()),
    ]


def _is_same_file(a: Path, b: Path) -> bool:
    same_path = os.path.realpath(a) == os.path.realpath(b)  # `Path.resolve` raises for a link to itself
    return same_path or (a.exists() and b.exists() and a.samefile(b))


def claim_data(folder: Path, meta: str, processes: Processes) -> None:
    """Keeps the files that a meta file lists from being prepared anew until `main` ends. Needed on every rank.

    Raises UserError if they are being prepared right now.
    """
    processes.on_first(lambda: hold(reading(folder, meta)))


def _lock_output(config: TrainerConfig) -> None:
    out, last = config.out, config.last_path
    for plot in map(config.plot_path, config.plots):
        require(not plot.is_dir(), f"the plot {plot} is a folder: choose another --out")
        if plot.exists() and not is_plot(plot):
            raise UserError(f"the run would draw its plot into {plot}, which is no plot: choose another --out")
    report = config.report_path
    if report.exists() and not is_report(report):
        raise UserError(f"the run would write its report to {report}, which is no report: move that file")
    refusal, remedy = f"{out} is being written by another run", "wait for it, or choose another --out"
    hold(locked(output_lock(out), refusal, remedy))
    if config.resume:
        if not last.exists():
            raise UserError(f"nothing to resume: {last} is missing; start without --resume")
        return
    existing = [path for path in _outputs(config) if path.exists()]
    if existing and not config.overwrite and not _was_killed_early(config, existing):
        remedies = ["--overwrite to replace it", "or choose another --out"]
        if last.exists():
            remedies.insert(0, "--resume to continue that run")
        raise UserError(f"{existing[0]} exists: add {', '.join(remedies)}")


def _was_killed_early(config: TrainerConfig, existing: list[Path]) -> bool:
    """Whether files are what a run leaves that was killed before its first save: the weights of step 0, and a log
    without an evaluation after step 0."""
    if not {config.out, config.log_path}.issuperset(existing):
        return False
    if config.log_path.exists() and not holds_only_a_beginning(config.log_path):
        return False
    if not config.out.exists():
        return True
    try:
        contents = checkpoint.read_contents(config.out)
    except UserError:
        return False
    return "train_config" in contents and is_integer(contents.get("step"), 0, 0)


class Checkpointer(Listener):
    """Writes a run's weights to `--out`, its resume file and its snapshots. Needed on every rank.

    Training waits only while tensors are copied. `background` writes the files, in the order of the calls: before the
    resume file of a step, `--out` is complete. A file that cannot be written raises UserError at the next step, or at
    the end.
    """

    def __init__(self, metadata: dict[str, Any], background: Background):
        """`metadata` is stored in each file: kind, tokenizer, template and the like."""
        self.metadata, self.background = metadata, background
        self.last_write = -1
        """the step of the files that were written last"""

    def on_start(self, state: TrainingState) -> None:
        if state.step == 0 and state.processes.rank == 0:
            state.config.last_path.unlink(missing_ok=True)  # of an older run that nobody should resume by mistake

    def on_step(self, state: TrainingState, figures: StepFigures, loss: float) -> None:
        self.background.check()

    def on_evaluation(self, state: TrainingState, entry: dict[str, Any], is_best: bool) -> None:
        if is_best or state.config.keep == "last":
            self.write(state, state.config.out)

    def on_snapshot(self, state: TrainingState) -> None:
        out = state.config.out
        self.write(state, out.parent / "snapshots" / f"{out.stem}_step_{state.step}.pt")

    def on_save(self, state: TrainingState) -> None:
        config = state.config
        progress = {
            "optimizer": [optimizer.state_dict() for optimizer in state.optimizers],
            "scaler": state.scaler.state_dict(),
            "bad_evaluations": state.evaluations_since_best,
            "recent_losses": state.recent_losses,
        }
        self.write(state, config.last_path, **progress)

    def close(self) -> None:
        self.background.close()  # comes before `on_end`, which says where the files are

    def on_end(self, state: TrainingState, reason: StopReason) -> None:
        if reason is StopReason.INTERRUPTED and state.processes.rank == 0:
            print(f"continue with:\n  {command_line('--resume', drop=('--overwrite',))}")

    def write(self, state: TrainingState, path: Path, **more: Any) -> None:
        """Copies the weights, the progress and `more`; the background thread writes them to a file, atomically."""
        packed = self.pack(state, **more)
        if state.sharding:
            copied = state.sharding.whole(packed)  # all ranks take part
        elif state.processes.rank == 0:
            copied = tree_map_only(torch.Tensor, copy_to_host, packed)
        if state.processes.rank > 0:
            return
        wait_for_copies = queued_work(state.processes.device)

        def write_file() -> None:
            wait_for_copies()
            checkpoint.save(path, copied)

        self.background.start(write_file)

    def pack(self, state: TrainingState, **more: Any) -> checkpoint.Checkpoint:
        """Returns the weights, the progress and `more`, to be copied before training goes on.

        Waits first until the files of earlier steps are written: memory holds the copies of one step only.
        """
        if self.last_write != state.step:
            self.background.wait()
            self.last_write = state.step
        return checkpoint.pack(
            state.model,
            **self.metadata,
            step=state.step,
            tokens=state.tokens,
            best_val_loss=state.best_val_loss,
            train_config=plain(state.config),
            history=state.history,
            **more,
        )


_SHAPE = tuple(field.name for field in dataclasses.fields(GPTConfig) if field.name not in ("dropout", "vocab_size"))
_FIXED_OPTIONS = (*_SHAPE, "optimizer", "embedding_lr_scale", "lora_rank", "lora_alpha", "train_layers")
_FREE_OPTIONS = ("preset", "data", "out", "resume", "overwrite")  # the data is compared by its content


def changed_options(config: TrainerConfig, resumed: dict[str, Any], data: list[str]) -> list[str]:
    """Returns the options in which a run differs from the one that it resumes, as texts such as "--seed 2 (was 1)".

    `data` holds the fingerprints of the training and validation data. Raises UserError if the data is not that of the
    run, or if an option differs that a resumed run cannot change.
    """
    new, old = plain(config), resumed.get("train_config", {})
    names = [name for name in new if name in old and new[name] != old[name] and name not in _FREE_OPTIONS]
    changes = {name: f"--{name.replace('_', '-')} {_shown(new[name])} (was {_shown(old[name])})" for name in names}
    if fixed := [changes[name] for name in _FIXED_OPTIONS if name in changes]:
        raise UserError(f"a resumed run cannot change {', '.join(fixed)}: resume with the flags of that run")
    if resumed.get("data", data) != data:
        because = f" (changed: {', '.join(changes.values())})" if changes else ""
        raise UserError(
            f"the data is not what {config.last_path} was trained on{because}: resume with the data and the flags of "
            "that run, or start a new run"
        )
    return list(changes.values())


def _shown(value: object) -> str:
    text = str(value)
    return shlex.quote(text) if text.isprintable() and len(text) <= 100 else brief(value)


def restore(state: TrainingState, resumed: dict[str, Any]) -> None:
    """Continues from a loaded resume file, whose weights the model already has.

    Raises UserError if the file belongs to a run with another optimizer, or is damaged.
    """
    path = state.config.last_path
    progress = {"step", "tokens", "history", "best_val_loss", "bad_evaluations", "recent_losses", "scaler"}
    if not progress <= resumed.keys():
        raise UserError(f"{path} is damaged: the progress of its run is incomplete; restore the file from a copy")
    try:
        for optimizer, saved in zip(state.optimizers, resumed["optimizer"], strict=True):
            fitting = _fitting(saved, optimizer)
            optimizer.load_state_dict(state.sharding.cut(fitting, optimizer) if state.sharding else fitting)
        if resumed["scaler"]:  # empty unless the run was in float16
            state.scaler.load_state_dict(resumed["scaler"])
    except (KeyError, ValueError, TypeError, AttributeError):
        raise UserError(f"{path} does not fit this run: resume with the --optimizer of that run") from None
    state.step, state.tokens, state.history = resumed["step"], resumed["tokens"], resumed["history"]
    state.best_val_loss, state.evaluations_since_best = resumed["best_val_loss"], resumed["bad_evaluations"]
    state.recent_losses = resumed["recent_losses"]


def _fitting(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns an optimizer's saved state: its tensors and its numbers; other options stay those of the optimizer.

    Raises KeyError, TypeError, AttributeError or ValueError if the state does not fit the optimizer.
    """
    groups = []
    for group, own in zip(saved["param_groups"], optimizer.state_dict()["param_groups"], strict=True):
        numbers = {name: group[name] for name in ("lr", "weight_decay", "momentum", "eps", "betas") if name in own}
        betas = numbers.get("betas", (0, 0))
        if group["params"] != own["params"] or not isinstance(betas, list | tuple) or len(betas) != 2:
            raise ValueError
        all_numbers = [*betas, *(number for name, number in numbers.items() if name != "betas")]
        if not all(is_number(number) and math.isfinite(number) for number in all_numbers):
            raise ValueError
        groups.append({**own, **numbers})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = {"momentum"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}
    for i, tensors in saved["state"].items():
        if not is_integer(i, 0, len(parameters) - 1) or tensors.keys() != names:
            raise ValueError
        shapes = {name: () if name == "step" else parameters[i].shape for name in names}
        if not all(tensors[name].shape == shape for name, shape in shapes.items()):
            raise ValueError
    return {"state": saved["state"], "param_groups": groups}
