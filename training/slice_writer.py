"""Writes what `--resume` reads in slices, one part by each process, by PyTorch's distributed checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from system.device import copy_to_host, queued_work
from system.errors import UserError
from training.config import TrainerConfig
from training.distributed import Processes
from weights import checkpoint, slices
from weights.checkpoint import Checkpoint

BIG = 10**9
"""From so many parameters on, several processes save in slices unless told otherwise."""
MAX_FILE_BYTES = 2**28
"""PyTorch holds the bytes of a file in memory and stops other threads while it copies them, so files are small."""


def slice_writer(config: TrainerConfig, processes: Processes, n_parameters: int) -> SliceWriter | None:
    """Returns the writer for `--sharded-saves`, or None if rank 0 writes one file. Needed on every rank."""
    is_big = n_parameters >= BIG and processes.world_size > 1
    return (
        SliceWriter(processes) if config.sharded_saves == "on" or (config.sharded_saves == "auto" and is_big) else None
    )


class SliceWriter:
    """Copies this process's slices of a checkpoint, and returns the job that writes them. Needed on every rank.

    Of a tensor that FSDP has cut, a process writes its slice. Tensors that are whole everywhere (DDP, or one process)
    are cut the same way, along their first dimension. The processes talk through a gloo group of their own, so that a
    save in the background does not mix with the exchange of gradients.
    """

    def __init__(self, processes: Processes):
        import torch.distributed.checkpoint  # noqa: F401  # takes a second, better now than between two steps

        self.processes = processes
        self.group, self.mesh = None, None
        if processes.world_size > 1:
            from torch.distributed.device_mesh import DeviceMesh

            self.group = dist.new_group(backend="gloo")
            self.mesh = DeviceMesh.from_group(self.group, "cpu")
        else:
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)

    def copy(self, contents: Checkpoint, folder: Path) -> Callable[[], None]:
        """Copies slices to the host without waiting for the device, and returns the job for the background thread.

        `contents` holds tensors under `model` and `optimizer` as in a `.last.pt` file. The job, needed on every rank,
        replaces the checkpoint in `folder` when all processes have written theirs. It raises UserError if one cannot
        write, and then leaves the old checkpoint.
        """
        metadata, tensors = slices.separate(checkpoint.as_stored(contents))
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
        copies = {name: self._own_slice(tensor) for name, tensor in tensors.items()}
        own = {name: copy for name, copy in copies.items() if copy is not None}
        wait_for_copies = queued_work(self.processes.device)

        def write() -> None:
            wait_for_copies()
            self._write(folder, metadata, own, sizes)

        return write

    def _own_slice(self, tensor: Tensor) -> Tensor | None:
        """Returns this process's part of a tensor, copied to the host; None for a number, which rank 0 writes."""
        from torch.distributed.tensor import DTensor, Shard

        if self.mesh is None:
            return copy_to_host(tensor)
        if isinstance(tensor, DTensor):
            part, placements = tensor.to_local(), tensor.placements
        elif tensor.dim() == 0:
            return copy_to_host(tensor) if self.processes.rank == 0 else None
        else:
            parts = tensor.chunk(self.processes.world_size)
            part, placements = (*parts, *[tensor[:0]] * self.processes.world_size)[self.processes.rank], (Shard(0),)
        return DTensor.from_local(
            copy_to_host(part), self.mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )

    def _write(self, folder: Path, metadata: dict[str, Any], own: dict[str, Tensor], sizes: dict[str, int]) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException

        step_folder = folder / f"step_{metadata['step']}"
        own_files = f"shard-{self.processes.rank + 1:05}-*.safetensors"
        try:
            for left_behind in step_folder.glob(own_files):  # of a killed run
                left_behind.unlink()
            writer = dcp.HuggingFaceStorageWriter(str(step_folder), self._file_numbers(sizes), save_distributed=True)
            dcp.save(own, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
            files = self._gather({path.name: slices.file_facts(path) for path in step_folder.glob(own_files)})
            if self.processes.rank == 0:
                slices.write_meta(folder, metadata, step_folder.name, files)  # from here on, it is the new save
        except (OSError, CheckpointException) as error:
            failures = [error] if isinstance(error, OSError) else [failure for failure, _ in error.failures.values()]
            cause = next((failure for failure in failures if isinstance(failure, OSError)), None)
            if cause is None:
                raise
            for path in step_folder.glob(own_files):
                path.unlink(missing_ok=True)
            raise UserError(
                f"cannot write {step_folder}: {cause.strerror or cause}; the older save, if any, is unchanged"
            ) from None
        if self.processes.rank == 0:
            slices.remove_steps(folder, keep=step_folder.name)

    def _file_numbers(self, sizes: dict[str, int]) -> dict[str, int]:
        """Returns for each tensor the number of the file, from 1, that its slices go to."""
        numbers, total = {}, 0
        for name, n_bytes in sizes.items():
            total += n_bytes // self.processes.world_size
            numbers[name] = total // MAX_FILE_BYTES + 1
        return numbers

    def _gather(self, files: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Returns the entries of all processes, on rank 0."""
        if self.group is None:
            return files
        gathered: list[dict[str, dict[str, Any]]] = [{}] * self.processes.world_size
        dist.gather_object(files, gathered if self.processes.rank == 0 else None, group=self.group)
        return {name: facts for entries in gathered for name, facts in entries.items()}
