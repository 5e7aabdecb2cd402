"""A model in slices, one on each process (ZeRO, Rajbhandari et al. 2019), by PyTorch's `fully_shard`."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from model import GPT


def shard(model: GPT, device: torch.device, compiled: bool) -> None:
    """Leaves each process a slice of every parameter, on the device: a layer is whole only while it computes."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (*model.h, model):
        if compiled and part is not model:
            part.compile()
        fully_shard(part, mesh=mesh)


def shard_state(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """Returns the state of an optimizer, saved whole, cut as the optimizer's parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def cut(value, parameter):
        is_like_it = value.shape == parameter.shape
        return distribute_tensor(value, parameter.device_mesh, parameter.placements) if is_like_it else value

    cut_state = {i: {k: cut(v, parameters[i]) for k, v in values.items()} for i, values in state["state"].items()}
    return {**state, "state": cut_state}


def gather(state: dict) -> dict:
    """Returns a checkpoint with its sharded tensors whole, on the CPU of process 0; the others get None for them."""

    def whole(tensor):
        tensor = tensor.full_tensor()
        return tensor.cpu() if dist.get_rank() == 0 else None

    return tree_map_only(DTensor, whole, state)
