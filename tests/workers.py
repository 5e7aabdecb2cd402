"""What the tests run in processes of their own, by themselves or by torchrun: `python tests/workers.py NAME …`."""

import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import GPT, GPTConfig
from train import Config
from training import distributed
from training.loader import Windows
from training.trainer import Trainer

SHAPE = GPTConfig(block_size=32, vocab_size=448, n_tokens=448, n_layer=2, n_head=2, n_embd=128)


def fit(*megabytes: str) -> None:
    """Leaves this process so much more memory, by its rank, and says into how many micro-batches a batch is split."""
    torch.set_num_threads(1)
    data = Windows([Path("data/toy/train.bin")], 32, 512, 0)
    trainer = Trainer(GPT(SHAPE).train(), data, data, Config(batch_size=512, block_size=32, device="cpu"), {})
    status = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
    room = int(megabytes[trainer.rank]) << 20
    resource.setrlimit(resource.RLIMIT_DATA, (used + room, resource.RLIM_INFINITY))
    trainer._fit_into_memory()
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert all(p.grad is None for p in trainer.model.parameters())
    print("micro-batches:", trainer.n_micro_batches, flush=True)
    if trainer.world_size > 1:
        dist.barrier()  # gloo's thread may still hold a tensor of the last exchange, and would wait for this one
        dist.destroy_process_group()


def shard() -> None:
    """Shards a model over two processes and puts it together again."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = GPT(SHAPE)
    n, before = model.n_parameters(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    distributed.shard(model, torch.device("cpu"), compiled=False)
    assert sum(p.to_local().numel() for p in model.parameters()) == n / 2 == model.n_parameters() / 2
    whole = distributed.gather(model.state_dict())
    assert all(
        dist.get_rank() and tensor is None or torch.equal(tensor, before[name]) for name, tensor in whole.items()
    )
    print("sharded", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    {"fit": fit, "shard": shard}[sys.argv[1]](*sys.argv[2:])
