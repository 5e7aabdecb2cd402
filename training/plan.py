"""`--plan`: what a training run would take, from a few of its real steps. Writes nothing."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from system.cli import duration
from system.device import peak_memory, total_memory
from training.loader import Batch, StepBatch, Windows, micro_batches
from training.optim import learning_rate_at
from training.report import MANY_EPOCHS
from training.trainer import Trainer
from weights import checkpoint

COMPUTE_OPTIMAL = 20
"""Training tokens per parameter (Hoffmann et al. 2022)."""

_MAX_STEPS, _MIN_STEPS = 50, 3
_SECONDS = 20.0
"""After this time, no further step is measured."""


@dataclass(frozen=True)
class Measured:
    """What the steps of a run take."""

    n_steps: int
    """steps that were measured, after those that compile or allocate memory"""
    seconds: float
    """of one step, with the whole batch"""
    evaluation_seconds: float
    """of one evaluation"""
    peak_memory: int
    """bytes, with the whole batch"""


def print_plan(trainer: Trainer, kind: str) -> None:
    """Measures steps of a run that has not begun; prints its time, memory, disk space and what would not fit.

    `kind` is that of the checkpoints. The model trains a little meanwhile.
    """
    state, config, data, device = trainer.state, trainer.config, trainer.train_data, trainer.state.processes.device
    needed, limit = cpu_memory_needed(trainer) if device.type == "cpu" else 0, total_memory(device)
    n_rows = rows_to_measure(trainer, needed, limit)
    measured = measure(trainer, n_rows, needed)
    if state.processes.rank > 0:
        return
    n, tokens_per_step = state.model.n_parameters(), data.n_tokens / data.batches_per_epoch
    tokens, epochs = tokens_per_step * config.max_steps, config.max_steps / data.batches_per_epoch
    optimal_steps = COMPUTE_OPTIMAL * n / tokens_per_step
    n_evaluations = 1 + math.ceil(config.max_steps / config.eval_every)
    all_steps, evaluations = measured.seconds * config.max_steps, measured.evaluation_seconds * n_evaluations
    part = "" if n_rows >= config.batch_size else f" with {n_rows} of {config.batch_size} sequences"
    split = f", in {state.n_micro_batches} micro-batches" if state.n_micro_batches > 1 else ""
    compiled = ", compiled" if state.is_compiled else ""
    precision = str(state.dtype).removeprefix("torch.")
    best, last, free, problems = *file_sizes(trainer, kind), free_space(config.out), []
    memorizes = ", which end in memorizing it" if epochs > MANY_EPOCHS and isinstance(data, Windows) else ""
    n_snapshots = config.max_steps // config.snapshot_every if config.snapshot_every else 0
    disk = best + last + max(best, last) + n_snapshots * best  # a new file is whole before it replaces the old one
    if measured.peak_memory > limit:
        problems.append(
            f"the memory: {size(measured.peak_memory)} of {size(limit)}; try {config.memory_savers}smaller model"
        )
    if disk > free:
        problems.append(f"the disk space: {size(disk)}, and {size(free)} are free; try another disk with --out")
    rows = {
        "model": f"{n:,} parameters",
        "data": f"{data.n_tokens:,} training tokens; {config.max_steps:,} steps are {epochs:,.2f} epochs{memorizes}",
        "tokens": f"{tokens:,.0f}, {tokens / n:.2g} per parameter; compute-optimal are about {COMPUTE_OPTIMAL} "
        f"(Hoffmann et al. 2022), after {optimal_steps:,.0f} steps",
        "speed": f"{measured.seconds:.3g} s a step, {tokens_per_step / measured.seconds:,.0f} tokens/s: "
        f"{measured.n_steps} steps measured{part}, {precision} on {device.type}{compiled}{split}",
        "time": f"{duration(all_steps + evaluations)} to the end, {duration(evaluations)} of it for {n_evaluations:,} "
        "evaluations",
        "memory": f"{size(measured.peak_memory)} at the peak, of {size(limit)}",
        "disk": f"{size(best)} for {config.out}, {size(last)} for {config.last_path} (for --resume)"
        + (f", {size(best)} for each of {n_snapshots:,} snapshots" if n_snapshots else "")
        + f"; {size(free)} are free",
        "does not fit" if problems else "fits": "; ".join(problems) or "everything",
    }
    for name, text in rows.items():
        print(f"{name:13} {text}")


def rows_to_measure(trainer: Trainer, needed: int, limit: int) -> int:
    """Returns how many sequences of a batch the measured steps take: all, or on the CPU as many as the memory holds and
    a few seconds suffice for."""
    batch_size = trainer.config.batch_size
    if not needed:
        return batch_size
    start = time.perf_counter()
    forward_backward(trainer, trainer.train_data.largest_batch()[:1])
    total = torch.tensor(time.perf_counter() - start)
    trainer.state.processes.sum_in_place(total)  # all ranks take as many sequences, so that collective calls match
    seconds = total.item() / trainer.state.processes.world_size
    n = min(batch_size, max(1, int(_SECONDS / _MIN_STEPS / seconds)))
    return n if needed < limit else min(n, max(1, batch_size * limit // needed // 4))


def measure(trainer: Trainer, n_rows: int, needed: int) -> Measured:
    """Takes steps with the first `n_rows` sequences of each batch, and evaluates a few windows."""
    state, config = trainer.state, trainer.config
    scale = max(1.0, config.batch_size / n_rows)

    def load(step: int) -> StepBatch:
        if scale == 1:
            return trainer.load_batch(step)
        rows = trainer.train_data.batch(step)[:n_rows]
        batches = micro_batches(rows, 1, max_length=state.model.config.block_size)
        return StepBatch(batches, sum(row.total_weight for row in rows), sum(row.tokens.numel() for row in rows))

    n_warmup, seconds = 3 if state.is_compiled else 1, []
    begin = time.perf_counter()
    with ThreadPoolExecutor(1) as prefetcher:
        upcoming = prefetcher.submit(load, 0)
        for step in range(_MAX_STEPS):
            if step == n_warmup:
                begin = time.perf_counter()
            start = time.perf_counter()
            batch = upcoming.result()
            upcoming = prefetcher.submit(load, step + 1)
            trainer.forward_backward(batch.micro_batches, batch.total_weight).item()  # waits for the device
            between = time.perf_counter()
            trainer.update_weights(learning_rate_at(0, config)).item()  # so small that the model stays as it is
            seconds.append(scale * (between - start) + time.perf_counter() - between)
            is_over = time.perf_counter() - begin > _SECONDS
            if state.processes.any(is_over and len(seconds) >= _MIN_STEPS + n_warmup):
                break
    timed = seconds[n_warmup:]
    step_seconds = statistics.median(timed)
    val_data = trainer.val_data
    rows_per_token = val_data.batches_per_epoch * config.batch_size / max(1, val_data.n_tokens)
    n_batches = max(1.0, min(config.eval_tokens, val_data.n_tokens) * rows_per_token / config.batch_size)
    batch_seconds = step_seconds / 3  # the forward pass alone
    if scale == 1:
        for _ in range(2):  # the first one compiles
            start = time.perf_counter()
            trainer.validation_loss(n_batches=state.n_micro_batches)
            batch_seconds = time.perf_counter() - start
    peak = peak_memory(state.processes.device) if scale == 1 else max(needed, peak_memory(state.processes.device))
    return Measured(len(timed), step_seconds, batch_seconds * n_batches, peak)


def cpu_memory_needed(trainer: Trainer) -> int:
    """Returns about how many bytes a step takes on the CPU, where a process that takes too much is killed.

    Counts what autograd keeps for the backward pass, of one sequence and of two, and extrapolates to a micro-batch.
    """
    state, rows = trainer.state, trainer.train_data.largest_batch()
    before = peak_memory(state.processes.device)
    one, two = saved_bytes(trainer, rows[:1]), saved_bytes(trainer, [rows[0], rows[0]])
    n_rows = -(-len(rows) // state.processes.world_size // state.n_micro_batches)
    gradients_and_means = 12 * sum(p.numel() for p in state.trained_parameters)
    return before + gradients_and_means + one + (n_rows - 1) * max(0, two - one)


def saved_bytes(trainer: Trainer, rows: list[Batch]) -> int:
    """Returns the bytes of the tensors that autograd keeps for the backward pass of a micro-batch, weights apart."""
    sharding, parameters = trainer.state.sharding, trainer.state.model.parameters()
    stored = [sharding.local(p) for p in parameters] if sharding else parameters
    weights = {p.untyped_storage().data_ptr() for p in stored}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward_backward(trainer, rows)
    return sum(kept.values())


def forward_backward(trainer: Trainer, rows: list[Batch]) -> None:
    """Computes the gradients of a few sequences, and drops them."""
    trainer.forward_backward(micro_batches(rows, 1, max_length=trainer.state.model.config.block_size), 1, False)
    for optimizer in trainer.state.optimizers:
        optimizer.zero_grad(set_to_none=True)


def file_sizes(trainer: Trainer, kind: str) -> tuple[int, int]:
    """Returns the bytes of a checkpoint's tensors, and of those in the file for `--resume`, after a step."""
    state = trainer.state
    best = sum(4 * tensor.numel() for tensor in checkpoint.pack(state.model, kind=kind)["model"].values())
    moments = [
        tensor for optimizer in state.optimizers for kept in optimizer.state.values() for tensor in kept.values()
    ]
    return best, best + sum(tensor.numel() * tensor.element_size() for tensor in moments if isinstance(tensor, Tensor))


def free_space(path: Path) -> int:
    """Returns the free bytes on the disk of a file that need not exist."""
    return shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.is_dir())).free


def size(n_bytes: float) -> str:
    """Returns a number of bytes in MB or GB."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"
