"""Measures training steps in this process, one of two that torchrun started; the argument is the setup as JSON, and so
is the output of the first process."""

from __future__ import annotations

import json
import os
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.scaling_simulation import Measured, Setup
from model import GPT, GPTConfig
from training.config import TrainerConfig
from training.distributed import Processes
from training.loader import Windows
from training.sharding import Sharding
from training.state import TrainingState
from training.trainer import Trainer

TCP_BYTES_ACKED = 120
"""Offset in Linux's `struct tcp_info` of the bytes that the other side has received (tcpi_bytes_acked, uint64)."""
TINY_RATE = 1e-9
"""Learning rate. The weights hardly change, and no step differs from another."""


class Steps:
    """Training steps of one variant on random tokens, timed."""

    def __init__(self, setup: Setup, processes: Processes, data: Windows, is_sharded: bool = False):
        """`processes` are those that exchange gradients; each takes `setup.sequences` sequences a step."""
        torch.manual_seed(0)
        model = GPT(GPTConfig(**setup.shape, n_tokens=setup.shape["vocab_size"]))
        config = TrainerConfig(
            batch_size=data.batch_size, device="cpu", dtype=setup.dtype, grad_accum_steps=1, learning_rate=TINY_RATE
        )
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[setup.dtype]
        sharding = Sharding(model, processes, dtype, compiled=False) if is_sharded else None
        self.trainer = Trainer(TrainingState.create(model, config, processes, sharding), data, data)
        self.batch = self.trainer.load_batch(0)

    def gradients(self) -> None:
        """Runs forward and backward pass, and what exchange belongs to them."""
        self.trainer.forward_backward(self.batch.micro_batches, self.batch.total_weight)

    def update(self) -> None:
        """Clips the gradients and takes an optimizer step."""
        self.trainer.update_weights(TINY_RATE)

    def run(self) -> None:
        """Takes a whole step."""
        self.gradients()
        self.update()


def measure(setup: Setup, folder: Path) -> Measured:
    """Measures every variant in turn, `setup.rounds` times after a round that is not counted; returns medians.

    A round's time is that of the slower process, except for `alone`, in which the other process waits.
    """
    torch.set_num_threads(1)
    processes = Processes.join("cpu")
    data, all_data = (random_windows(setup, folder / f"{processes.rank}.bin", n) for n in (1, processes.world_size))
    local = Steps(setup, Processes(), data)
    ddp, fsdp = Steps(setup, processes, all_data), Steps(setup, processes, all_data, is_sharded=True)
    gradients = torch.zeros(local.trainer.state.model.n_parameters())
    variants: dict[str, Callable[[], None]] = {
        "alone": lambda: local.run() if processes.rank == 0 else None,
        "gradients": local.gradients,
        "update": local.update,
        "all_reduce": lambda: processes.sum_in_place(gradients),
        "ddp": ddp.run,
        "fsdp": fsdp.run,
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    sent: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(1 + setup.rounds):
        for name, variant in variants.items():
            dist.barrier()
            before, start = bytes_sent(), time.perf_counter()
            variant()
            taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.barrier()  # all that was sent has arrived
            sent[name].append(bytes_sent() - before)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            seconds[name].append(taken.item())
    processes.leave()
    return Measured(
        {name: statistics.median(values[1:]) for name, values in seconds.items()},
        {name: statistics.median(values[1:]) for name, values in sent.items()},
    )


def random_windows(setup: Setup, path: Path, n_processes: int) -> Windows:
    """Writes random tokens to a file; returns windows that give each process `setup.sequences` sequences a step."""
    block_size, vocab_size = setup.shape["block_size"], setup.shape["vocab_size"]
    np.random.default_rng(0).integers(vocab_size, size=64 * block_size).astype("<u2").tofile(path)
    return Windows([path], block_size, setup.sequences * n_processes, seed=0)


def bytes_sent() -> int:
    """Returns the bytes that the other side of this process's TCP connections has received so far.

    Only these are of this process: /proc/net/dev counts what all programs of the machine send.
    """
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    if connection.type == socket.SOCK_STREAM and connection.family != socket.AF_UNIX:
                        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                        total += struct.unpack_from("=Q", info, TCP_BYTES_ACKED)[0]
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return total


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        measured = measure(Setup(**json.loads(sys.argv[1])), Path(temporary))
    if int(os.environ["RANK"]) == 0:
        print(json.dumps({"seconds": measured.seconds, "sent": measured.sent}))
