"""The processes that train one model: their ranks, their sums, and copies of the model that stay equal (DDP).

`torchrun` starts the processes, and starts them again if one dies. `training/sharding.py` shards a model (FSDP).

DDP adds up the gradients with the last micro-batch, in float32, while the backward pass goes on.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from system.cli import shorten
from system.device import choose_device
from system.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process, and how many others train with it; by default it is alone."""

    device: torch.device = torch.device("cpu")
    rank: int = 0
    world_size: int = 1

    @classmethod
    def join(cls, device_name: str) -> Processes:
        """Joins the processes that `torchrun` started, if it did, each with a GPU of its own.

        Raises UserError if there is no such device, or if the processes cannot meet.
        """
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        if world_size == 1:
            return cls(choose_device(device_name))
        if device_name in ("auto", "cuda") and torch.cuda.is_available():
            device_name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        device = choose_device("cpu" if device_name == "auto" else device_name)  # gloo knows no other device
        gpu = device if device.type == "cuda" else None
        try:
            dist.init_process_group("nccl" if gpu else "gloo", device_id=gpu)
        except (ValueError, RuntimeError) as error:  # such as a wrong MASTER_ADDR, or another process that is missing
            problem = f"the {world_size} processes cannot meet ({shorten(str(error), 200)})"
            raise UserError(f"{problem}: start the run with torchrun, or unset RANK and WORLD_SIZE") from None
        return cls(device, dist.get_rank(), world_size)

    def leave(self) -> None:
        """Waits for all ranks, and destroys the process group."""
        if self.world_size > 1:
            dist.barrier()
            dist.destroy_process_group()

    def print(self, text: str) -> None:
        """Prints a text on rank 0."""
        if self.rank == 0:
            print(text)

    def on_first(self, action: Callable[[], object]) -> None:
        """Runs an action on rank 0 while the others wait. If it raises UserError, the others exit with status 1."""
        try:
            if self.rank == 0:
                action()
        except UserError:
            self.any(True)
            self.leave()
            raise
        if self.any(False):
            self.leave()
            sys.exit(1)

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


def replicate(model: nn.Module, processes: Processes) -> nn.Module:
    """Returns the module to call in training: the model itself, or DDP around it, which averages gradients."""
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
