"""Checkpoints of a training run: claiming the output, writing while the run goes on, resuming."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from gpt_config import Shape
from system.cli import command_line, plain
from system.device import copied
from system.errors import UserError
from system.files import locked
from training.config import TrainerConfig
from training.parallel import Processes
from training.state import Callback, Entry, StopReason, TrainingState
from weights import checkpoint
from weights.loading import load_checkpoint

ORDER = "shuffled epochs"
"""How batches follow from the data and the seed. Versions before 0.3 drew windows with replacement."""


@contextlib.contextmanager
def claim_output(
    config: TrainerConfig, processes: Processes, *kinds: str, inputs: Iterable[Path] = ()
) -> Iterator[checkpoint.Checkpoint | None]:
    """Keeps other runs from writing the output until the block ends. Needed on every rank, first of all.

    Yields the loaded state to resume from, which must be of one of the `kinds`, or None for a new run. Raises UserError
    if another process writes the output, or if a run would overwrite another unasked, or one of its `inputs`. A run
    that only plans writes nothing, so it claims nothing.
    """
    if config.plan:
        yield None
        return
    outputs = [config.out, config.last_path, config.log_path, config.report_path, *map(config.plot_path, config.plots)]

    def claim() -> None:
        for path in inputs:
            if path.resolve() in [output.resolve() for output in outputs]:
                raise UserError(f"the run would write to {path}, which it reads: choose another --out")
        stack.enter_context(locked(config.out))
        existing = [path for path in outputs if path.exists()]
        if existing and not (config.overwrite or config.resume):
            resume = "--resume to continue that run, " if config.last_path.exists() else ""
            raise UserError(f"{existing[0]} exists: add {resume}--overwrite to replace it, or choose another --out")

    with contextlib.ExitStack() as stack:
        processes.on_first(claim)
        is_resumed = processes.any(processes.rank == 0 and config.resume and config.last_path.exists())
        yield load_checkpoint(config.last_path, verify=True, kinds=kinds) if is_resumed else None


class Checkpointer(Callback):
    """Writes a run's weights to `--out`, its resume file and its snapshots. With `--fsdp` needed on every rank.

    Training waits only while tensors are copied. A thread writes the files, in the order of the calls: before the
    resume file of a step, `--out` is complete. After a file that cannot be written no other is, and the next step, or
    the end, raises OSError.
    """

    def __init__(self, metadata: dict[str, Any]):
        """`metadata` is stored in each file: kind, tokenizer, template and the like."""
        self.metadata = metadata
        self.writer = ThreadPoolExecutor(1)
        self.jobs: list[Future[None]] = []
        self.last_step = -1  # of the files that were written last

    def on_start(self, state: TrainingState) -> None:
        if state.step == 0 and state.processes.rank == 0:
            state.config.last_path.unlink(missing_ok=True)  # of an older run that nobody should resume by mistake

    def on_step(self, state: TrainingState, entry: Entry) -> None:
        for job in self.jobs:
            if job.done():
                job.result()

    def on_evaluation(self, state: TrainingState, entry: Entry, is_best: bool) -> None:
        if is_best or (state.step and state.config.keep == "last"):
            self.write(state, state.config.out)

    def on_save(self, state: TrainingState) -> None:
        out = state.config.out
        if state.is_due(state.config.snapshot_every):
            self.write(state, out.parent / "snapshots" / f"{out.stem}_step_{state.step}.pt")
        optimizers, scaler = [optimizer.state_dict() for optimizer in state.optimizers], state.scaler.state_dict()
        progress = {"bad_evaluations": state.evaluations_since_best, "recent_losses": state.recent_losses}
        self.write(state, state.config.last_path, optimizer=optimizers, scaler=scaler, **progress)

    def close(self) -> None:  # comes before `on_end`, which says where the files are
        self.writer.shutdown()
        self.wait()

    def on_end(self, state: TrainingState, reason: StopReason) -> None:
        if reason is StopReason.INTERRUPTED and state.processes.rank == 0:
            command = command_line("--resume", drop=("--overwrite",))
            starter = "torchrun OPTIONS" if state.processes.world_size > 1 else "python"
            print(f"continue with:\n  {command.replace('python', starter, 1)}")

    def wait(self) -> None:
        """Waits until all files are written. Raises OSError if one was not."""
        for job in self.jobs:
            job.result()
        self.jobs.clear()

    def write(self, state: TrainingState, path: Path, **more: Any) -> None:
        """Copies the weights, the progress and `more`; the thread writes them to a file, atomically."""
        if self.last_step != state.step:  # memory holds the copies of one step only
            self.wait()
            self.last_step = state.step
        progress = {name: getattr(state, name) for name in ("step", "tokens", "best_val_loss")}
        history, options = list(state.history), plain(state.config)
        metadata = {**self.metadata, **progress, "train_config": options, "history": history}
        packed = checkpoint.pack(state.model, **metadata, **more)
        gather = state.sharding.gathered if state.sharding else partial(tree_map_only, torch.Tensor, copied)
        on_host = gather(packed)  # all ranks of a sharded model take part
        earlier = list(self.jobs)

        def write_file() -> None:
            for job in earlier:
                job.result()  # no file is written after one that failed
            checkpoint.save(path, on_host)

        if state.processes.rank == 0:
            self.jobs.append(self.writer.submit(write_file))


_FIXED = {field.name for field in dataclasses.fields(Shape)} - {"dropout"}
_FIXED |= {"optimizer", "embedding_lr_scale", "lora_rank", "lora_alpha", "train_layers"}
_FREE = {"preset", "data", "out", "resume", "overwrite"}  # the data is compared by its content


def changed_options(config: TrainerConfig, resumed: dict[str, Any], data: list[str]) -> list[str]:
    """Returns the options in which a run differs from the one that it resumes, as texts such as "--seed 2 (was 1)".

    `data` holds the fingerprints of the training and validation data. Raises UserError if the data is not that of the
    run, or if an option differs that a resumed run cannot change.
    """
    new, old = plain(config), resumed.get("train_config", {})
    names = [name for name in new if name in old and new[name] not in (None, old[name]) and name not in _FREE]
    changes = {name: f"--{name.replace('_', '-')} {new[name]} (was {old[name]})" for name in names}
    if fixed := [change for name, change in changes.items() if name in _FIXED]:
        raise UserError(f"a resumed run cannot change {', '.join(fixed)}: resume with the flags of that run")
    if resumed.get("data", data) != data:
        because = f" (changed: {', '.join(changes.values())})" if changes else ""
        raise UserError(f"the data is not what {config.last_path} was trained on{because}: resume with that data")
    return list(changes.values())


def restore(state: TrainingState, resumed: dict[str, Any]) -> None:
    """Continues from a loaded resume file, whose weights the model already has. Options such as `--weight-decay` stay
    those of this run. Raises UserError if the file belongs to a run with another optimizer, or is damaged."""
    try:
        for optimizer, saved in zip(state.optimizers, resumed["optimizer"], strict=True):
            own = optimizer.state_dict()["param_groups"]
            if [group["params"] for group in own] != [group["params"] for group in saved["param_groups"]]:
                raise ValueError
            tensors = state.sharding.cut(saved["state"], optimizer) if state.sharding else saved["state"]
            optimizer.load_state_dict({"state": tensors, "param_groups": own})
        if resumed["scaler"]:  # empty unless the run was in float16
            state.scaler.load_state_dict(resumed["scaler"])
        state.step, state.tokens, state.history = resumed["step"], resumed["tokens"], resumed["history"]
        state.best_val_loss, state.evaluations_since_best = resumed["best_val_loss"], resumed["bad_evaluations"]
        state.recent_losses = resumed["recent_losses"]
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError):
        problem = f"{state.config.last_path} does not fit this run, or is damaged"
        raise UserError(f"{problem}: resume with the --optimizer of that run") from None
