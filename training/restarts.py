"""What a run does that `torchrun --max-restarts` has started again."""

from __future__ import annotations

import dataclasses
import os
from typing import TypeVar

import torch.distributed as dist

from training.config import TrainerConfig
from training.distributed import Processes
from training.state import Listener, TrainingState
from weights import slices

_BEGAN = "training began"

Config = TypeVar("Config", bound=TrainerConfig)


def join(config: Config) -> tuple[Processes, Config]:
    """Joins the processes that `torchrun` started; returns them, and the config of `after_restart`. Needed first of
    all, on every rank. Raises UserError as `Processes.join` does."""
    processes = Processes.join(config.device, config.process_timeout)
    return processes, after_restart(config, processes)


def after_restart(config: Config, processes: Processes) -> Config:
    """Returns the config of a run that `torchrun` has restarted: with `--resume` if it has saved, so that the same
    command goes on, otherwise with `--overwrite`. Any other config is returned as it is. Needed on every rank.

    Files that were there before `torchrun` started are not the run's own: a run that was refused because of them, or
    failed before its first step, is refused again.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or config.plan:
        return config
    store = _torchrun_store()
    if store is None or not store.check([_BEGAN]):
        return config
    has_saved = processes.any(
        processes.rank == 0 and (slices.is_slices(config.slices_path) or config.last_path.exists())
    )
    if processes.rank == 0:
        what = "goes on from its last save" if has_saved else "begins again, since it had not saved yet"
        print(f"restarted by torchrun: the run {what}")
    return dataclasses.replace(config, resume=has_saved, overwrite=not has_saved)


class RestartMark(Listener):
    """Notes in `torchrun`'s store that training has begun: from now on the output is this run's own. For rank 0.

    It comes after `Checkpointer`, which removes the resume file of an older run.
    """

    def on_start(self, state: TrainingState) -> None:
        if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and (store := _torchrun_store()):
            store.set(_BEGAN, "")


def _torchrun_store() -> dist.Store | None:
    """Returns the key-value store of rank 0's `torchrun`, which outlives the processes; None if there is none."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store, _, _ = next(dist.rendezvous("env://"))
    return store
