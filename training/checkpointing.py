"""Checkpoints of a training run: claiming the output, writing while the run goes on, resuming."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from system.cli import command_line, plain
from system.errors import UserError, require
from system.files import remove_temporaries
from system.locks import hold, locked, reading
from training.config import TrainerConfig
from training.distributed import Processes
from training.state import Listener, StopReason, TrainingState
from weights import checkpoint
from weights.loading import load_checkpoint


def claim_output(config: TrainerConfig, processes: Processes, *kinds: str) -> dict[str, Any] | None:
    """Locks the output until `main` ends. Needed on every rank, first of all.

    Returns the loaded state to resume from, which must be of one of the `kinds`, or None for a new run. Raises
    UserError if another process writes the output, if a run would overwrite another unasked, or if there is nothing to
    resume.
    """
    processes.on_first(lambda: _lock_output(config))
    return load_checkpoint(config.last_path, verify=True, kinds=kinds) if config.resume else None


def claim_data(folder: Path, meta: str, processes: Processes) -> None:
    """Keeps the files that a meta file lists from being prepared anew until `main` ends. Needed on every rank.

    Raises UserError if they are being prepared right now.
    """
    processes.on_first(lambda: hold(reading(folder, meta)))


def _lock_output(config: TrainerConfig) -> None:
    out, last, plot = config.out, config.last_path, config.plot_path()
    require(not plot.is_dir(), f"the plot {plot} is a folder: choose another --out")
    lock = out.with_name(f".{out.name}.lock")
    refusal, remedy = f"{out} is being written by another run", "wait for it, or choose another --out"
    if hold(locked(lock, refusal, remedy)):  # so whoever left temporary files there was killed
        for path in (out, last, config.log_path):
            remove_temporaries(path.parent, glob.escape(path.name))
        remove_temporaries(out.parent / "snapshots", f"{glob.escape(out.stem)}_step_*.pt")
    if config.resume:
        if not last.exists():
            raise UserError(f"nothing to resume: {last} is missing; start without --resume")
        return
    existing = [path for path in (out, last, config.log_path) if path.exists()]
    if existing and not config.overwrite:
        remedies = ["--overwrite to replace it", "or choose another --out"]
        if last.exists():
            remedies.insert(0, "--resume to continue that run")
        raise UserError(f"{existing[0]} exists: add {', '.join(remedies)}")


class Checkpointer(Listener):
    """Writes a run's weights to `--out`, its resume file and its snapshots. Needed on every rank."""

    def __init__(self, metadata: dict[str, Any]):
        """`metadata` is stored in each file: kind, tokenizer, template and the like."""
        self.metadata = metadata

    def on_start(self, state: TrainingState) -> None:
        if state.step == 0 and state.processes.rank == 0:
            state.config.last_path.unlink(missing_ok=True)  # of an older run that nobody should resume by mistake

    def on_evaluation(self, state: TrainingState, entry: dict[str, Any], is_best: bool) -> None:
        if is_best or state.config.keep == "last":
            self.write(state, state.config.out)

    def on_snapshot(self, state: TrainingState) -> None:
        out = state.config.out
        self.write(state, out.parent / "snapshots" / f"{out.stem}_step_{state.step}.pt")

    def on_save(self, state: TrainingState) -> None:
        self.write(
            state,
            state.config.last_path,
            optimizer=[optimizer.state_dict() for optimizer in state.optimizers],
            scaler=state.scaler.state_dict(),
            bad_evaluations=state.evaluations_since_best,
            recent_losses=state.recent_losses,
        )

    def on_end(self, state: TrainingState, reason: StopReason) -> None:
        if reason is StopReason.INTERRUPTED and state.processes.rank == 0:
            print(f"continue with:\n  {command_line('--resume', drop=('--overwrite',))}")

    def write(self, state: TrainingState, path: Path, **more: Any) -> None:
        """Writes the weights, the progress and `more` to a file, atomically."""
        packed = checkpoint.pack(
            state.model,
            **self.metadata,
            step=state.step,
            tokens=state.tokens,
            best_val_loss=state.best_val_loss,
            train_config=plain(state.config),
            history=state.history,
            **more,
        )
        if state.sharding:
            packed = state.sharding.whole(packed)
        if state.processes.rank == 0:
            checkpoint.save(path, packed)


def restore(state: TrainingState, resumed: dict[str, Any]) -> None:
    """Continues from a loaded resume file, whose weights the model already has.

    Raises UserError if the file belongs to a run with another optimizer.
    """
    try:
        for optimizer, saved in zip(state.optimizers, resumed["optimizer"], strict=True):
            optimizer.load_state_dict(state.sharding.cut(saved, optimizer) if state.sharding else saved)
        if resumed["scaler"]:  # empty unless the run was in float16
            state.scaler.load_state_dict(resumed["scaler"])
        state.step, state.tokens, state.history = resumed["step"], resumed["tokens"], resumed["history"]
        state.best_val_loss, state.evaluations_since_best = resumed["best_val_loss"], resumed["bad_evaluations"]
        state.recent_losses = resumed["recent_losses"]
    except (KeyError, ValueError):
        raise UserError(
            f"{state.config.last_path} does not fit this run: resume with the --optimizer of that run"
        ) from None
