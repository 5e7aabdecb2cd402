"""The formulas of `benchmarks.scaling` beside a measurement: two gloo processes on the loopback, one core each."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.scaling_steps import BFLOAT16, FLOAT32, Sizes, ddp_bytes, fsdp_bytes
from model import GPT, GPTConfig
from system.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
N_PROCESSES = 2


@dataclass(frozen=True)
class Setup:
    """What is simulated."""

    shape: dict[str, Any]
    """fields of GPTConfig, all of them numbers"""
    sequences: int
    """of each process, per step"""
    dtype: Literal["float32", "bfloat16"]
    rounds: int


@dataclass(frozen=True)
class Measured:
    """Medians of one run of `scaling_worker`, by variant: `alone`, `gradients`, `update`, `all_reduce`, `ddp`, `fsdp`.

    `alone` is a step while the other process waits; `gradients` and `update` are its two parts while both compute.
    """

    seconds: dict[str, float]
    sent: dict[str, float]
    """bytes that a process sent"""


@dataclass(frozen=True)
class Comparison:
    """One figure, predicted and measured."""

    name: str
    unit: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured in units of the prediction."""
        return self.measured / self.predicted


def measure(setup: Setup) -> Measured:
    """Starts the two processes and returns what they measured. Raises UserError if they fail."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(N_PROCESSES)]
    process = subprocess.Popen(
        [sys.executable, *launcher, "-m", "benchmarks.scaling_worker", json.dumps(dataclasses.asdict(setup))],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        stdout, stderr = process.communicate()
    finally:
        process.terminate()  # after Ctrl-C: torchrun then ends the two; a kill would leave them
        process.wait()
    if process.returncode:
        errors = [line for line in stderr.splitlines() if "Error: " in line]
        raise UserError(f"the two processes failed: {(errors or ['no message'])[0].strip()[-300:]}")
    return Measured(**json.loads(stdout.splitlines()[-1]))


def compare(setup: Setup, measured: Measured) -> list[Comparison]:
    """Returns predicted and measured bytes and seconds of a step of DDP and of FSDP.

    A step takes its computing, measured without any exchange while both processes compute, and its bytes at the rate of
    a plain all-reduce. With FSDP, each process updates its slice of the weights only.
    """
    with torch.device("meta"):
        sizes = Sizes.of(GPT(GPTConfig(**setup.shape, n_tokens=setup.shape["vocab_size"])))
    n, seconds, sent = N_PROCESSES, measured.seconds, measured.sent
    parameter = BFLOAT16 if setup.dtype == "bfloat16" else FLOAT32
    rate = ddp_bytes(sizes, n) / seconds["all_reduce"]
    predicted_bytes = {
        "ddp": ddp_bytes(sizes, n),
        "fsdp": fsdp_bytes(sizes, n, parameter=parameter, reduce_as_all_reduce=True),
    }
    computing = {
        "ddp": seconds["gradients"] + seconds["update"],
        "fsdp": seconds["gradients"] + seconds["update"] / n,
    }
    rows = []
    for name, n_bytes in predicted_bytes.items():
        exchange, mode = n_bytes / rate, name.upper()
        hidden = max(computing[name], exchange)
        rows += [
            Comparison(f"{mode}, sent per step and process", "MB", n_bytes / 1e6, sent[name] / 1e6),
            Comparison(
                f"{mode}, a step, nothing hidden", "ms", 1e3 * (computing[name] + exchange), 1e3 * seconds[name]
            ),
            Comparison(f"{mode}, a step, everything hidden", "ms", 1e3 * hidden, 1e3 * seconds[name]),
        ]
    return rows
