"""What the tests run in processes of their own, by themselves or by torchrun: `python tests/workers.py NAME …`."""

import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import GPT, GPTConfig
from training.config import TrainerConfig
from training.distributed import Processes
from training.loader import Windows
from training.memory import fewest_micro_batches
from training.sharding import Sharding
from training.slice_writer import SliceWriter
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


def shard() -> None:
    """Shards a model over two processes and puts it together again."""
    processes = Processes.join("cpu")
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
    print("sharded", flush=True)
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


if __name__ == "__main__":
    {"fit": fit, "shard": shard}[sys.argv[1]](*sys.argv[2:])
