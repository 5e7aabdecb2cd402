"""What the tests run in several processes: `python tests/workers.py NAME …`."""

import dataclasses
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import GPT, GPTConfig
from system.device import peak_memory
from training.config import TrainerConfig
from training.loader import Windows
from training.optim import orthogonalize
from training.parallel import Processes
from training.sharding import Sharding
from training.state import TrainingState
from training.trainer import Trainer, fewest_micro_batches

SHAPE = GPTConfig(block_size=32, vocab_size=448, n_tokens=448, n_layer=2, n_head=2, n_embd=128)


def new_trainer(shape: GPTConfig, processes: Processes, fsdp: bool = False, **options: object) -> Trainer:
    """Prepares to train a model of this shape, always from the same weights and on the same data."""
    torch.manual_seed(0)
    model, data = GPT(shape), Windows([Path("data/toy/train.bin")], shape.block_size, 8, 0)
    config = TrainerConfig(**{"batch_size": 8, "grad_accum_steps": 2, "optimizer": "muon", "device": "cpu", **options})
    sharding = Sharding(model, config, processes) if fsdp else None
    return Trainer(TrainingState.create(model, config, processes, sharding), data, data)


def take_step(trainer: Trainer, i: int) -> tuple[float, float]:
    """Takes a step as `Trainer.run` does; returns its loss and the norm of its gradient."""
    batch = trainer.load_batch(i)
    loss = trainer.forward_backward(batch.micro_batches, batch.total_weight)
    norm = trainer.update_weights(1e-2)
    trainer.state.processes.sum_in_place(loss)
    return loss.item(), norm.item()


def fields(processes: Processes, variants: str) -> None:
    """Trains models with fields of `GPTConfig` (JSON: {name: fields}) as one process, with DDP and with FSDP.

    Prints for each name, as JSON, the losses and norms of two steps and the sums of the matrices' squares after them.
    """
    found: dict[str, list[list[float]]] = {}
    for name, changed in json.loads(variants).items():
        shape = dataclasses.replace(SHAPE, n_layer=3, n_embd=36, **changed)
        found[name] = []
        for group, fsdp in ((Processes(), False), (processes, False), (processes, True)):
            trainer = new_trainer(shape, group, fsdp, grad_clip=0.5, embedding_lr_scale=3.0)
            figures = [figure for i in range(2) for figure in take_step(trainer, i)]
            state = trainer.state
            model = state.sharding.gathered_model(state.model) if state.sharding else state.model
            if model and dist.get_rank() == 0:
                matrices = [p for p in model.parameters() if p.dim() == 2]  # biases of keys have gradients of 0
                found[name].append(figures + [p.square().sum().item() for p in matrices])
    if processes.rank == 0:
        print("found:", json.dumps(found), flush=True)


def fit(processes: Processes) -> None:
    """Prints into how many micro-batches a batch is split if each process may take so many more megabytes."""
    data = Windows([Path("data/toy/train.bin")], 32, 128, 0)
    trainer = new_trainer(SHAPE, processes, fsdp=True)
    for megabytes in ((10, 4000), (4000, 4000)):  # first the tight one: the peak of memory never falls
        limit = peak_memory(processes.device) + megabytes[processes.rank] * 2**20
        n = fewest_micro_batches(trainer.state, data.largest_batch(), trainer.forward_backward, limit)
        assert all(p.grad is None for p in trainer.state.model.parameters())
        print(f"{megabytes[0]} MB: {n}\n", end="", flush=True)  # a line in one piece: the other process prints too


def shard(processes: Processes) -> None:
    """Shards a model over the processes and puts it together again."""
    torch.manual_seed(0)
    model = GPT(SHAPE)
    n, before = model.n_parameters(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sharding = Sharding(model, TrainerConfig(device="cpu"), processes)
    assert sum(p.to_local().numel() for p in model.parameters()) == n / 2 == model.n_parameters() / 2
    gathered, copy = sharding.gathered(model.state_dict()), sharding.gathered_model(model)
    if processes.rank == 0:
        assert copy is not None and all(torch.equal(tensor, before[name]) for name, tensor in gathered.items())
        assert all(torch.equal(tensor, before[name]) for name, tensor in copy.state_dict().items())
    for n, rows, columns in ((4, 6, 5), (3, 5, 7), (1, 1, 3)):  # shards of equal size and of others
        matrices = torch.randn(n, rows, columns, generator=torch.Generator().manual_seed(0))
        shards, expected = (
            torch.stack([distribute_tensor(matrix, sharding.mesh, [Shard(0)]).to_local() for matrix in whole])
            for whole in (matrices, orthogonalize(matrices))
        )
        torch.testing.assert_close(sharding.map_whole(orthogonalize, shards, rows), expected)
    trainer, seen = new_trainer(dataclasses.replace(SHAPE, rotary=True), processes, fsdp=True, dtype="bfloat16"), []
    attention = trainer.state.model.h[1].attn
    attention.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0].dtype, inputs[1].dtype)))
    take_step(trainer, 0)
    assert seen == 2 * [(torch.bfloat16, torch.float32)], seen  # the layer is in bfloat16, its rotary angles are not
    print("sharded", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    joined = Processes.join("cpu")
    {"fields": fields, "fit": fit, "shard": shard}[sys.argv[1]](joined, *sys.argv[2:])
    joined.leave()
