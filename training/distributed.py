"""The processes that train one model: their ranks, their sums, and copies of the model that stay equal (DDP).

`torchrun` starts the processes. This file joins and leaves their group, and is the only one that talks to the others,
except for `training/sharding.py`, which cuts a model into slices (FSDP).

What one step of DDP exchanges: with the last micro-batch an all-reduce of the gradients in float32, 4 bytes for each
parameter, in buckets of 25 MB while the backward pass goes on; then one of the loss, 4 bytes. Every `--log-every` steps
the ranks ask each other for stop signals, 4 bytes.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from system.device import choose_device
from system.errors import UserError
from system.launch import UNSET_OR_LAUNCH, Launch
from system.locks import hold
from training.faults import Heartbeats, named_faults


@dataclass(frozen=True)
class Processes:
    """This process, and how many others train with it; by default it is alone."""

    device: torch.device = torch.device("cpu")
    rank: int = 0
    world_size: int = 1
    heartbeats: Heartbeats | None = None

    @classmethod
    def join(cls, device_name: str, timeout: float = 600.0) -> Processes:
        """Joins the processes that `torchrun` started, if it did, each with a GPU of its own.

        From now until `main` ends, a rank that does not answer for `timeout` seconds ends the run, which names it.
        Raises UserError if there is no such device, or if the environment variables of `torchrun` are wrong.
        """
        launch = Launch.from_environment(("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))
        rank, local_rank, world_size = launch.rank, launch.local_rank, launch.world_size
        if world_size == 1:
            return cls(choose_device(device_name))
        if device_name in ("auto", "cuda") and torch.cuda.is_available():
            device_name = f"cuda:{local_rank}"
        device = choose_device(device_name)
        gpu = device if device.type == "cuda" else None
        try:
            heartbeats = _meet(rank, world_size, gpu, timeout)
        except (ValueError, RuntimeError) as error:  # such as a wrong MASTER_ADDR, or another process that is missing
            raise UserError(
                f"the {world_size} processes cannot meet ({str(error).partition(chr(10))[0][:200]}): {UNSET_OR_LAUNCH}"
            ) from None
        return cls(device, rank, world_size, heartbeats)

    def leave(self) -> None:
        """Ends the group, after all processes have arrived here."""
        if self.world_size > 1:
            dist.barrier()
            if self.heartbeats:
                self.heartbeats.leave()
            dist.destroy_process_group()

    def on_first(self, action: Callable[[], object]) -> None:
        """Runs an action on rank 0 while the other ranks wait.

        If the action raises UserError, rank 0 raises it, and the other ranks exit with status 1 and without a message.
        """
        error = None
        if self.rank == 0:
            try:
                action()
            except UserError as refusal:
                error = refusal
        if self.any(error is not None):
            self.leave()
            if error:
                raise error
            sys.exit(1)

    def require_divisible(self, batch_size: int) -> None:
        """Raises UserError if the sequences of a batch do not divide evenly among the processes."""
        if batch_size % self.world_size:
            raise UserError(f"--batch-size {batch_size} does not divide among {self.world_size} processes")

    def sum_in_place(self, tensor: Tensor) -> None:
        """Replaces a tensor by its sum over the processes."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        if self.world_size == 1:
            return flag
        total = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(total, dist.ReduceOp.MAX)
        return bool(total.item())

    def gather(self, *numbers: float) -> list[list[float]]:
        """Returns the numbers of each rank. Waits for the device."""
        table = torch.zeros(self.world_size, len(numbers), device=self.device)
        table[self.rank] = torch.tensor(numbers)
        self.sum_in_place(table)
        return table.tolist()


def _meet(rank: int, world_size: int, gpu: torch.device | None, timeout: float) -> Heartbeats:
    """Creates the process group, in which a collective call fails after `timeout` seconds, and starts the heartbeats.

    Raises ValueError or RuntimeError if the processes cannot meet.
    """
    limit = timedelta(seconds=timeout)
    store, _, _ = next(dist.rendezvous("env://", timeout=limit))
    # A restarted run finds the same store, with the addresses of dead processes.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    connection = store.clone()  # type: ignore[attr-defined]  # its stubs lack it
    heartbeats = Heartbeats(connection, rank, world_size, timeout)
    dist.init_process_group(
        "nccl" if gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=limit, device_id=gpu
    )
    heartbeats.start()
    hold(named_faults(heartbeats))
    return heartbeats


def replicate(model: nn.Module, processes: Processes) -> nn.Module:
    """Returns the module to call in training: the model itself, or DDP around it, which averages gradients.

    The model has no buffers to broadcast, and every parameter gets a gradient, so DDP has nothing else to do.
    """
    if processes.world_size == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)  # no second copy of the gradients


def local_gradients(module: nn.Module, on: bool) -> contextlib.AbstractContextManager[None]:
    """Returns the context for a backward pass; if `on`, DDP and FSDP do not exchange their gradients yet."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync() if on else contextlib.nullcontext()
    if set_exchange := getattr(module, "set_requires_gradient_sync", None):  # FSDP
        set_exchange(not on)
    return contextlib.nullcontext()
