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


def shard_state(optimizer: torch.optim.Optimizer) -> None:
    """Cuts the state of an optimizer, loaded whole, as its parameters are."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape:
                state[name] = distribute_tensor(value, parameter.device_mesh, parameter.placements)


def gather(state: dict) -> dict:
    """Returns a checkpoint with its sharded tensors whole, on the CPU of process 0; the others get None for them."""

    def whole(tensor):
        tensor = tensor.full_tensor()
        return tensor.cpu() if dist.get_rank() == 0 else None

    return tree_map_only(DTensor, whole, state)
