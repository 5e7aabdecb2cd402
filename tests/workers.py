"""What the tests run in processes of their own, by themselves or by torchrun: `python tests/workers.py NAME …`."""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from model import GPT, GPTConfig
from training.config import TrainerConfig
from training.distributed import Processes
from training.loader import Windows
from training.memory import fewest_micro_batches
from training.sharding import Sharding
from training.state import TrainingState
from training.trainer import Trainer

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
    print("sharded", flush=True)
    processes.leave()


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
    {"fit": fit, "shard": shard, "die": die, "lag": lag}[sys.argv[1]](*sys.argv[2:])
