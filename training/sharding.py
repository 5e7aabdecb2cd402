"""A model sharded over processes (ZeRO, Rajbhandari et al. 2019), by PyTorch's `fully_shard`.

Every micro-batch gathers each layer before its forward and its backward pass. The last one scatters the sums of the
gradients in float32; until then each process adds up gradients of the whole model. Muon needs two all-to-alls for each
shape of matrices. Imported only for `--fsdp`, since its imports take half a second.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from model import GPT, chunk_loss
from system.device import choose_dtype, copied, uses_compile
from system.errors import require
from training.config import TrainerConfig
from training.parallel import Processes
from weights import checkpoint


class Sharding:
    """Shards a model in place; gathers what is saved, and cuts what is loaded.

    Checkpoints hold whole tensors, and optimizer state by the parameter's number, as without sharding. That is why this
    class does not use `torch.distributed.checkpoint.state_dict`, which keys the optimizer state by name.
    """

    def __init__(self, model: GPT, config: TrainerConfig, processes: Processes):
        """Leaves every process a shard of each parameter. A layer is whole only while it computes, then in the dtype of
        the forward pass. Raises UserError for a run that cannot be sharded."""
        self.dtype = choose_dtype(config.dtype, processes.device)
        require(processes.world_size > 1, "--fsdp shards over several processes: start the run with torchrun")
        require(self.dtype != torch.float16, "--fsdp does not train in float16: use --dtype bfloat16 or float32")
        self.mesh = init_device_mesh(processes.device.type, (processes.world_size,))
        # Inputs are not cast: hidden states are in `dtype` already, and rotary angles must stay in float32.
        precision = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        compiled = uses_compile(config.compile, processes.device)
        for part in (*model.h, model):
            if compiled and part is not model:
                part.compile()
            fully_shard(part, mesh=self.mesh, mp_policy=precision)
        if compiled:
            model.compiled = model.hidden, torch.compile(chunk_loss)

    def gathered(self, state: Any, copy: Callable[[Tensor], Tensor] = copied) -> Any:
        """Returns nested dicts and lists with whole tensors on rank 0, each copied by `copy`, and None on other ranks.

        One tensor is whole at a time. All ranks take part.
        """

        def gather(tensor: Tensor) -> Tensor | None:
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            return copy(whole) if dist.get_rank() == 0 else None

        return tree_map_only(Tensor, gather, state)

    def gathered_model(self, model: GPT) -> GPT | None:
        """Returns a whole copy of the model on the device of rank 0, in evaluation mode and the dtype of the forward
        pass; on other ranks None. All ranks take part."""
        packed = self.gathered(checkpoint.pack(model, kind="base"), lambda tensor: tensor.to(self.dtype))
        return checkpoint.build(packed).to(self.mesh.device_type) if dist.get_rank() == 0 else None

    def local(self, tensor: Tensor) -> Tensor:
        """Returns this process's shard of a tensor, as a view."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def map_whole(self, function: Callable[[Tensor], Tensor], shards: Tensor, n_rows: int) -> Tensor:
        """Applies a function to whole matrices of which each process holds a shard: (n, rows of this process, columns).

        Each process collects `ceil(n / world size)` matrices, applies `function` to that batch (k, n_rows, columns),
        and sends the shards of its result back. So the work is divided, and each shard travels twice. Returns the
        shards of the results. Rows and matrices of zeros pad what does not divide evenly.
        """
        world_size, (n, own_rows, columns) = self.mesh.size(), shards.shape
        k, rows = -(-n // world_size), -(-n_rows // world_size)  # `fully_shard` cuts like `torch.chunk`
        sent = F.pad(shards, (0, 0, 0, rows - own_rows, 0, k * world_size - n))  # (ranks * k, rows, columns)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        whole = received.view(world_size, k, rows, columns).transpose(0, 1).reshape(k, -1, columns)
        results = F.pad(function(whole[:, :n_rows]), (0, 0, 0, rows * world_size - n_rows))
        sent = results.view(k, world_size, rows, columns).transpose(0, 1).contiguous()
        dist.all_to_all_single(received, sent.flatten(0, 1))
        return received[:n, :own_rows]

    def whole_norm(self, norm: Tensor) -> Tensor:
        """Returns the gradient norm over all shards, on every rank."""
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def cut(self, state: dict[int, dict[str, Tensor]], optimizer: torch.optim.Optimizer) -> dict[int, Any]:
        """Returns a whole optimizer state, cut into shards like the optimizer's parameters."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def shard(value: Tensor, p: DTensor) -> Tensor:
            is_counter = value.shape != p.shape  # of steps
            return value if is_counter else distribute_tensor(value, p.device_mesh, p.placements)

        return {i: {name: shard(x, parameters[i]) for name, x in values.items()} for i, values in state.items()}
