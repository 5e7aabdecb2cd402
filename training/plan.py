"""`--plan`: what a training run would take, from a few of its real steps. Writes nothing."""

import math
import shutil
import statistics
import time

from system.cli import duration
from system.device import peak_memory, total_memory
from training.loader import StepBatch, micro_batches
from training.optim import learning_rate_at
from training.trainer import Trainer
from weights import checkpoint

COMPUTE_OPTIMAL = 20
"""Training tokens per parameter (Hoffmann et al. 2022)."""

_FEWEST_STEPS, _MOST_STEPS, _MAX_SECONDS = 8, 50, 3.0


def print_plan(trainer: Trainer, kind: str) -> None:
    """Measures steps of a run that has not begun; prints its time, memory, disk space and what would not fit.

    `kind` is that of the checkpoints. The model trains a little meanwhile.
    """
    state, config, data = trainer.state, trainer.config, trainer.train_data
    n_rows, memory = rows_to_measure(trainer)
    seconds, n_measured = measure_steps(trainer, n_rows)
    if state.processes.rank > 0:
        return
    n, tokens_per_step = state.model.n_parameters(), data.n_tokens / data.batches_per_epoch
    tokens, epochs = tokens_per_step * config.max_steps, config.max_steps / data.batches_per_epoch
    memory, limit = max(memory, peak_memory(state.processes.device)), total_memory(state.processes.device)
    n_evaluations = 1 + math.ceil(config.max_steps / config.eval_every)
    share = min(1.0, config.eval_tokens / max(1, trainer.val_data.n_tokens))
    evaluations = n_evaluations * max(1.0, share * trainer.val_data.batches_per_epoch) * seconds / 3  # forward alone
    part = "" if n_rows >= config.batch_size else f" with {n_rows} of {config.batch_size} sequences"
    split = f", in {state.n_micro_batches} micro-batches" if state.n_micro_batches > 1 else ""
    precision = f"{str(state.dtype).removeprefix('torch.')} on {state.processes.device.type}"
    best, last = file_sizes(trainer, kind)
    free = shutil.disk_usage(next(folder for folder in config.out.absolute().parents if folder.is_dir())).free
    n_snapshots = config.max_steps // config.snapshot_every if config.snapshot_every else 0
    disk = best + 2 * last + n_snapshots * best  # a new file is whole before it replaces the old one
    problems = []
    if memory > limit:
        problems.append(f"the memory: {size(memory)} of {size(limit)}; try {config.memory_savers}smaller model")
    if disk > free:
        problems.append(f"the disk space: {size(disk)}, and {size(free)} are free; try another disk with --out")
    rows = {
        "model": f"{n:,} parameters",
        "data": f"{data.n_tokens:,} training tokens; {config.max_steps:,} steps are {epochs:,.2f} epochs",
        "tokens": f"{tokens:,.0f}, {tokens / n:.2g} per parameter; compute-optimal are about {COMPUTE_OPTIMAL} "
        f"(Hoffmann et al. 2022), after {COMPUTE_OPTIMAL * n / tokens_per_step:,.0f} steps",
        "speed": f"{seconds:.3g} s a step, {tokens_per_step / seconds:,.0f} tokens/s: "
        f"{n_measured} steps measured{part}, {precision}{split}",
        "time": f"{duration(seconds * config.max_steps + evaluations)} to the end, {duration(evaluations)} "
        f"of it for {n_evaluations:,} evaluations",
        "memory": f"{size(memory)} at the peak, of {size(limit)}",
        "disk": f"{size(best)} for {config.out} and each of {n_snapshots:,} snapshots, {size(last)} for "
        f"{config.last_path} (for --resume); {size(free)} are free",
        "does not fit" if problems else "fits": "; ".join(problems) or "everything",
    }
    for name, text in rows.items():
        print(f"{name:13} {text}")


def rows_to_measure(trainer: Trainer) -> tuple[int, int]:
    """Returns how many sequences of a batch the measured steps take, and the peak memory to expect, in bytes.

    A GPU takes the whole batch. On the CPU, where a process that takes too much memory is killed, the rows of a
    micro-batch double as long as they are fast enough and fit; the growth of the peak gives the memory of the rest.
    """
    state, rows = trainer.state, trainer.train_data.largest_batch()
    device, processes = state.processes.device, state.processes
    if device.type != "cpu":
        return len(rows), 0
    n_wanted = -(-len(rows) // processes.world_size // state.n_micro_batches)
    fixed = 12 * sum(p.numel() for p in state.trained_parameters)  # gradients and AdamW's two means
    n, growth, before = 1, 0.0, peak_memory(device)
    while True:
        start = time.perf_counter()
        trainer.forward_backward(micro_batches(rows[:n], 1, max_length=state.model.config.block_size), 1, False)
        state.clear_gradients()
        is_slow = 2 * (time.perf_counter() - start) > _MAX_SECONDS
        peak = peak_memory(device)
        growth, before = max(growth, (peak - before) / max(1, n // 2)), peak
        n_next = min(2 * n, n_wanted)
        expected = peak + fixed + growth * (n_next - n)
        if n == n_wanted or processes.any(is_slow or expected > total_memory(device)):  # the same on all ranks
            return len(rows) if n == n_wanted else n, int(peak + fixed + growth * (n_wanted - n))
        n = n_next


def measure_steps(trainer: Trainer, n_rows: int) -> tuple[float, int]:
    """Takes steps with the first `n_rows` sequences of each batch. Returns the median seconds of a step with the whole
    batch, and of how many steps; the first ones, which compile and allocate memory, do not count."""
    state, config = trainer.state, trainer.config
    scale = max(1.0, config.batch_size / n_rows)
    n_warmup = 3 if state.is_compiled else 1
    seconds: list[float] = []
    for step in range(n_warmup + _MOST_STEPS):
        if step >= n_warmup + _FEWEST_STEPS and state.processes.any(sum(seconds) > _MAX_SECONDS):
            break  # all ranks at once
        batch = trainer.load_batch(step)
        if scale > 1:
            rows = trainer.train_data.batch(step)[:n_rows]
            batches = micro_batches(rows, 1, max_length=state.model.config.block_size)
            batch = StepBatch(batches, sum(row.total_weight for row in rows), 0)
        start = time.perf_counter()
        trainer.forward_backward(batch.micro_batches, batch.total_weight).item()  # waits for the device
        between = time.perf_counter()
        trainer.update_weights(learning_rate_at(0, config)).item()  # so small that the model stays as it is
        seconds.append(scale * (between - start) + time.perf_counter() - between)
    return statistics.median(seconds[n_warmup:]), len(seconds) - n_warmup


def file_sizes(trainer: Trainer, kind: str) -> tuple[int, int]:
    """Returns the bytes of a checkpoint's tensors, and of those in the file for `--resume`, after a step."""
    state = trainer.state
    best = sum(4 * tensor.numel() for tensor in checkpoint.pack(state.model, kind=kind)["model"].values())
    kept = [values for optimizer in state.optimizers for values in optimizer.state.values()]
    return best, best + sum(4 * tensor.numel() for values in kept for tensor in values.values())


def size(n_bytes: float) -> str:
    """Returns a number of bytes in MB or GB."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"
