"""What the tests run in processes of their own, by themselves or by torchrun: `python tests/workers.py NAME …`."""

import dataclasses
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))

from training.slice_writer import SliceWriter

import train
from model import GPT, GPTConfig
from system.device import peak_memory
from training.config import TrainerConfig
from training.distributed import Processes
from training.loader import Windows
from training.memory import fewest_for_slices, fewest_micro_batches
from training.optim import orthogonalize
from training.sharding import Sharding
from training.state import TrainingState
from training.trainer import Trainer
from weights import checkpoint, slices

SHAPE = GPTConfig(block_size=32, vocab_size=448, n_tokens=448, n_layer=2, n_head=2, n_embd=128)


def fit(*megabytes: str) -> None:
    """Gives this process so much more memory, by its rank, and prints into how many micro-batches a batch is split."""
    torch.set_num_threads(1)
    data = Windows([Path("data/toy/train.bin")], 32, 512, 0)
    processes = Processes.join("cpu")
    state = TrainingState.create(GPT(SHAPE), TrainerConfig(batch_size=512, device="cpu"), processes)
    trainer = Trainer(state, data, data)
    status = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
    room = int(megabytes[processes.rank]) << 20
    resource.setrlimit(resource.RLIMIT_DATA, (used + room, resource.RLIM_INFINITY))
    n = fewest_micro_batches(state, data.largest_batch(), trainer.forward_backward)
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert all(p.grad is None for p in state.model.parameters())
    print("micro-batches:", n, flush=True)
    processes.leave()  # waits: gloo's thread of another process may still hold a tensor


def new_trainer(shape: GPTConfig, processes: Processes, fsdp: bool = False, **options: object) -> Trainer:
    """Prepares to train a model of this shape, always from the same weights and on the same data."""
    torch.manual_seed(0)
    model, data = GPT(shape), Windows([Path("data/toy/train.bin")], shape.block_size, 8, 0)
    config = TrainerConfig(**{"batch_size": 8, "grad_accum_steps": 2, "optimizer": "muon", "device": "cpu", **options})
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    sharding = Sharding(model, processes, dtype, compiled=False) if fsdp else None
    return Trainer(TrainingState.create(model, config, processes, sharding), data, data)


def take_step(trainer: Trainer, i: int) -> tuple[float, float]:
    """Takes a step as `Trainer.run` does; returns its loss and the norm of its gradient."""
    batch = trainer.load_batch(i)
    loss = trainer.forward_backward(batch.micro_batches, batch.total_weight)
    norm = trainer.update_weights(1e-2)
    trainer.state.processes.sum_in_place(loss)
    return loss.item(), norm.item()


def fields(variants: str) -> None:
    """Trains models with fields of `GPTConfig` (JSON: {name: fields}) as one process, with DDP and with FSDP.

    Prints for each name, as JSON, the losses and norms of two steps and the sums of the matrices' squares after them.
    """
    torch.set_num_threads(1)
    processes, found = Processes.join("cpu"), {}
    for name, changed in json.loads(variants).items():
        shape = dataclasses.replace(SHAPE, n_layer=3, n_embd=36, **changed)
        found[name] = []
        for group, fsdp in ((Processes(), False), (processes, False), (processes, True)):
            trainer = new_trainer(shape, group, fsdp, grad_clip=0.5, embedding_lr_scale=3.0)
            figures = [figure for i in range(2) for figure in take_step(trainer, i)]
            state = trainer.state
            model = state.sharding.whole_model(state.model) if state.sharding else state.model
            if dist.get_rank() == 0:
                matrices = [p for p in model.parameters() if p.dim() == 2]  # biases of keys have gradients of 0
                found[name].append(figures + [p.square().sum().item() for p in matrices])
    if dist.get_rank() == 0:
        print("found:", json.dumps(found), flush=True)
    processes.leave()


class Collectives(TorchDispatchMode):
    """Records every collective: its kind, and the bytes of its larger tensor.

    That tensor holds what all ranks exchange, in an all-to-all only what this rank sends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # it calls again with the plain tensors inside
        kind = function.name().partition("::")[2].partition(".")[0].replace("_", "")
        is_collective = kind.startswith(("allgather", "allreduce", "alltoall", "broadcast", "reduce"))
        if function.namespace in ("c10d", "_c10d_functional") and is_collective:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.seen.append((kind, max(tensor.nbytes for tensor in tensors)))
        return function(*args, **(kwargs or {}))


def collectives(processes: Processes) -> None:
    """Prints the collectives of one step of DDP and of FSDP, each with two micro-batches."""
    for fsdp in (False, True):
        trainer = new_trainer(SHAPE, processes, fsdp, dtype="bfloat16")
        for i in (0, 1):  # DDP arranges its buckets in the first steps
            take_step(trainer, i)
        with Collectives() as log:
            take_step(trainer, 2)
        if dist.get_rank() == 0:
            print("FSDP:" if fsdp else "DDP:", json.dumps(log.seen), flush=True)


def fit_slices(processes: Processes) -> None:
    """Prints into how many micro-batches a batch is split if each process may take so many more megabytes."""
    data = Windows([Path("data/toy/train.bin")], 32, 512, 0)
    trainer = new_trainer(SHAPE, processes, fsdp=True)
    for megabytes in ((30, 4000), (4000, 4000)):
        limit = peak_memory(processes.device) + (megabytes[dist.get_rank()] << 20)
        n = fewest_for_slices(trainer.state, data.largest_batch(), trainer.forward_backward, limit)
        assert all(p.grad is None for p in trainer.state.model.parameters())
        print(f"{megabytes} MB: {n}", flush=True)


def rotate_in_float32(processes: Processes) -> None:
    """Checks that a layer in bfloat16 gets its rotary angles in float32."""
    trainer, seen = new_trainer(dataclasses.replace(SHAPE, rotary=True), processes, fsdp=True, dtype="bfloat16"), []
    attention = trainer.state.model.h[1].attn
    attention.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0].dtype, inputs[2].dtype)))
    take_step(trainer, 0)
    assert seen == 2 * [(torch.bfloat16, torch.float32)], seen


def map_whole(sharding: Sharding) -> None:
    """Compares a function of whole matrices with the same one of matrices in slices, which divide evenly or not."""
    for n, rows, columns in ((4, 6, 5), (3, 5, 7), (1, 1, 3)):
        matrices = torch.randn(n, rows, columns, generator=torch.Generator().manual_seed(0))
        slices = torch.stack([distribute_tensor(m, sharding.mesh, [Shard(0)]).to_local() for m in matrices])
        expected = [distribute_tensor(m, sharding.mesh, [Shard(0)]).to_local() for m in orthogonalize(matrices)]
        torch.testing.assert_close(sharding.map_whole(orthogonalize, slices, rows), torch.stack(expected))


def shard() -> None:
    """Shards a model over two processes and puts it together again."""
    torch.set_num_threads(1)
    processes = Processes.join("cpu")
    fit_slices(processes)  # first: the peak of memory never falls
    torch.manual_seed(0)
    model = GPT(SHAPE)
    n, before = model.n_parameters(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sharding = Sharding(model, processes, torch.float32, compiled=False)
    assert sum(p.to_local().numel() for p in model.parameters()) == n / 2 == model.n_parameters() / 2
    whole = sharding.whole(model.state_dict())
    assert all(
        dist.get_rank() and tensor is None or torch.equal(tensor, before[name]) for name, tensor in whole.items()
    )
    save_slices(processes, sharding, model, before)
    copy = sharding.whole_model(model)
    assert dist.get_rank() or all(torch.equal(copy.state_dict()[name], before[name]) for name in before)
    map_whole(sharding)
    rotate_in_float32(processes)
    print("sharded", flush=True)
    collectives(processes)
    processes.leave()


def save_slices(processes: Processes, sharding: Sharding, model: GPT, before: dict[str, torch.Tensor]) -> None:
    """Saves a sharded model, and tensors that each process holds whole; compares what rank 0 reads with them."""
    whole = {"rows": torch.arange(15.0).view(5, 3), "one row": torch.ones(1, 3), "number": torch.tensor(3.0)}
    optimizer = {"state": {0: whole}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    contents = checkpoint.pack(model, kind="base", step=7, optimizer=[optimizer])
    folder = Path(f"checkpoints/worker{processes.world_size}.last")
    SliceWriter(processes).copy(contents, folder)()
    assert len(list(folder.glob("step_7/*"))) == processes.world_size
    dist.barrier()
    if processes.rank == 0:
        read = slices.read_contents(folder, verify=True)
        before.pop("lm_head.weight")
        assert read["model"].keys() == before.keys() and read["optimizer"][0]["state"][0].keys() == whole.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in read["model"].items())
        assert all(torch.equal(tensor, whole[name]) for name, tensor in read["optimizer"][0]["state"][0].items())
        sizes = [path.stat().st_size for path in folder.glob("step_7/*")]
        assert max(sizes) < 1.1 * min(sizes)


def die() -> None:
    """Kills rank 1 while rank 0 does something of its own, beside which torchrun's SIGTERM has no effect."""
    processes = Processes.join("cpu")
    if processes.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(20)
    print("still alone", flush=True)


def lag(seconds: str) -> None:
    """Trains with train.py; each forward pass of rank 1 takes so many seconds more."""

    def wait(module: torch.nn.Module, arguments: tuple) -> None:
        if isinstance(module, GPT):
            time.sleep(float(seconds))

    if os.environ["RANK"] == "1":
        torch.nn.modules.module.register_module_forward_pre_hook(wait)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "batch_size": 4, "device": "cpu"}
    steps = {"max_steps": 16, "log_every": 4, "eval_every": 100, "eval_tokens": 1000, "warmup_steps": 2}
    train.main(train.Config(data=Path("data/toy"), out=Path("checkpoints/lags.pt"), **shape, **steps))


if __name__ == "__main__":
    {"fit": fit, "fields": fields, "shard": shard, "die": die, "lag": lag}[sys.argv[1]](*sys.argv[2:])
