"""A model in slices, one on each process (ZeRO, Rajbhandari et al. 2019), by PyTorch's `fully_shard`.

Imported only for `--fsdp`, since its imports take half a second.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from model import GPT, chunk_loss
from system.device import choose_dtype, copy_to_host, uses_compile
from system.errors import UserError
from training.config import TrainerConfig
from training.distributed import Processes


class Sharding:
    """Shards a model in place; makes whole what is saved, and cuts what is loaded.

    Checkpoints hold whole tensors, and optimizer state by the parameter's number, as without sharding. That is why
    `full_tensor` and `distribute_tensor` are used here and not `torch.distributed.checkpoint.state_dict`, which keys
    the optimizer state by name: files would have a second format.
    """

    def __init__(self, model: GPT, processes: Processes, dtype: torch.dtype, compiled: bool):
        """Leaves every process a slice of each parameter. A layer is whole only while it computes, then in `dtype`;
        gradients are added over processes in float32."""
        mesh = init_device_mesh(processes.device.type, (processes.world_size,))
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for part in (*model.h, model):
            if compiled and part is not model:
                part.compile()
            fully_shard(part, mesh=mesh, mp_policy=precision)
        if compiled:
            model.compiled = model.hidden, torch.compile(chunk_loss)

    def whole(self, state: Any) -> Any:
        """Returns a copy of nested dicts and lists with whole tensors, on the host of rank 0; see `copy_to_host`.

        Other ranks get None for each tensor.
        """

        def gather(tensor: Tensor) -> Tensor | None:
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            return copy_to_host(full) if dist.get_rank() == 0 else None

        return tree_map_only(Tensor, gather, state)

    def whole_norm(self, norm: Tensor) -> Tensor:
        """Returns the gradient norm over all slices, on every rank."""
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def cut(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Returns a whole optimizer state, cut into slices like the optimizer's parameters."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def slice_like(value: Tensor, parameter: DTensor) -> Tensor:
            if value.shape != parameter.shape:  # a step counter
                return value
            return distribute_tensor(value, parameter.device_mesh, parameter.placements)

        sliced = {
            i: {name: slice_like(value, parameters[i]) for name, value in values.items()}
            for i, values in state["state"].items()
        }
        return {**state, "state": sliced}


def shard(model: GPT, config: TrainerConfig, processes: Processes) -> Sharding:
    """Shards a model in place for `--fsdp`. Raises UserError for a run that cannot be sharded."""
    dtype = choose_dtype(config.dtype, processes.device)
    is_possible = config.grad_accum_steps != "auto" and config.optimizer == "adamw"
    if processes.world_size == 1 or dtype == torch.float16 or not is_possible:
        raise UserError("--fsdp needs torchrun, a number of --grad-accum-steps, AdamW, and bfloat16 or float32")
    return Sharding(model, processes, dtype, uses_compile(config.compile, processes.device))
