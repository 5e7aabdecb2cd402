"""What a few real steps tell about a run: `--plan`, what it would take; `--minutes`, what fits into some minutes."""

import copy
import dataclasses
import math
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from model import GPT
from system.cli import duration
from system.device import multiplies_faster_in_bfloat16, peak_memory, total_memory
from training.config import TrainerConfig
from training.loader import StepBatch, Windows, micro_batches
from training.optim import learning_rate_at
from training.parallel import Processes
from training.state import TrainingState
from training.trainer import Trainer
from weights import checkpoint

C = TypeVar("C", bound=TrainerConfig)

COMPUTE_OPTIMAL = 20
"""Training tokens per parameter (Hoffmann et al. 2022)."""

SIZES = ((4, 128), (3, 192), (4, 256), (6, 384), (8, 512), (12, 768))
"""Layers and widths that `--minutes` chooses from, the fastest first. Heads are 64 wide."""
N_EVALUATIONS = 5
MAX_EPOCHS = 40
"""More passes over a text teach nothing (Muennighoff et al. 2023)."""
DROPOUT, MEMORIZING = 0.2, 40
"""Dropout of a run whose epochs, times parameters per token of text, are more than MEMORIZING (docs/log.md)."""

_CHOSEN = {"n_layer", "n_embd", "n_head", "dropout", "learning_rate", "max_steps", "max_epochs", "patience"}
_CHOSEN |= {"eval_every", "save_every"}
_FEWEST_STEPS, _MOST_STEPS, _MAX_SECONDS = 8, 50, 3.0


def fit_into_minutes(
    config: Any,
    build: Callable[[Any], GPT],
    data: Sequence[Windows],
    processes: Processes,
    started: float,
    start: dict[str, Any] | None = None,
    sizes: Sequence[tuple[int, int]] = SIZES,
) -> Any:
    """Returns the config of `train.py` with as many steps as fit into its minutes, which began at `started`
    (`time.monotonic`), and with as large a model.

    A new model that has the first of the `sizes` may grow: steps of each are measured, and the one with the lowest
    `expected_loss` is taken. Wider models learn more slowly, as the root of their width, and a text that repeats calls
    for dropout. `start` is the checkpoint to go on from: a run that resumes keeps its choice.
    """
    if start and "optimizer" in start:
        return dataclasses.replace(config, **{name: start["train_config"][name] for name in _CHOSEN})
    config = with_cpu_precision(config, config.n_embd, processes, None)
    grows = not start and (config.n_layer, config.n_embd) == sizes[0]
    n_text, per_epoch = data[0].n_tokens, data[0].batches_per_epoch
    chosen, least, choice = config, math.inf, ""
    for n_layer, n_embd in sizes if grows else [(config.n_layer, config.n_embd)]:
        shape = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_embd // 64} if grows else {}
        rate = config.learning_rate * math.sqrt(config.n_embd / n_embd)
        for dropout in (config.dropout, max(config.dropout, DROPOUT)):  # which takes time too
            tried = dataclasses.replace(config, **shape, learning_rate=rate, dropout=dropout)
            trainer = Trainer(TrainingState.create(copy.deepcopy(build(tried)), tried, processes), data[0], data[1])
            seconds = torch.tensor(measure_steps(trainer, rows_to_measure(trainer)[0], max_seconds=2.0)[0])
            seconds = seconds.to(processes.device)  # NCCL sums nothing on the host
            processes.sum_in_place(seconds)
            step, left = float(seconds) / processes.world_size, 60 * config.minutes - (time.monotonic() - started)
            n_fitting = int(0.9 * left / step - evaluation_steps(trainer, 1 + N_EVALUATIONS))
            n_steps = max(20, min(n_fitting, math.ceil(MAX_EPOCHS * per_epoch)))
            epochs, every, model = n_steps / per_epoch, -(-n_steps // N_EVALUATIONS), trainer.state.model
            if epochs * model.n_parameters() / n_text <= MEMORIZING:
                break
        loss = expected_loss(model.n_parameters(), epochs * n_text, n_text)
        if loss >= least:
            break
        steps = {"max_steps": n_steps, "max_epochs": 0.0, "eval_every": every, "save_every": every, "patience": 0}
        chosen, least = dataclasses.replace(tried, **steps), loss
        choice = f"in {config.minutes:g} minutes: {model.config.n_layer} layers of width {model.config.n_embd}, "
        choice += f"{n_steps:,} steps of {step:.2g} s, {epochs:.2g} epochs, dropout {tried.dropout:g}"
    processes.print(choice)
    return chosen


def with_cpu_precision(config: C, width: int, processes: Processes, resumed: dict[str, Any] | None) -> C:
    """Returns the config, for a run on the CPU with the precision of the run to resume, or for a new one bfloat16 if it
    is faster on every process for this width. A run of a version that did not choose was in float32."""
    if config.dtype != "auto" or processes.device.type != "cpu":
        return config
    if resumed:
        is_faster = resumed.get("train_config", {}).get("dtype") == "bfloat16"
    else:
        is_faster = not processes.any(not multiplies_faster_in_bfloat16(width))
        if is_faster:
            processes.print("training in bfloat16, in which this processor is faster (--dtype float32 chooses that)")
    return dataclasses.replace(config, dtype="bfloat16" if is_faster else "float32")


def expected_loss(n_parameters: float, n_tokens: float, n_unique: float) -> float:
    """Returns how far above the entropy of text, in nats per token, the loss of a model is expected to end.

    The scaling law of Hoffmann et al. (2022). Of `n_tokens`, `n_unique` are new; each repetition is worth less, as
    Muennighoff et al. (2023) measured, whose constants these are. They trained large models: use it to compare sizes.
    """
    n_repeats = max(0.0, n_tokens / n_unique - 1)
    worth = min(n_tokens, n_unique) + n_unique * 15.4 * (1 - math.exp(-n_repeats / 15.4))
    return float(521 / n_parameters**0.353 + 1488 / worth**0.353)


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
    evaluations = evaluation_steps(trainer, n_evaluations) * seconds
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


def evaluation_steps(trainer: Trainer, n_evaluations: int) -> float:
    """Returns how many training steps take as long as evaluations: a forward pass alone is a third of a step."""
    share = min(1.0, trainer.config.eval_tokens / max(1, trainer.val_data.n_tokens))
    return n_evaluations * max(1.0, share * trainer.val_data.batches_per_epoch) / 3


def measure_steps(trainer: Trainer, n_rows: int, max_seconds: float = _MAX_SECONDS) -> tuple[float, int]:
    """Takes steps with the first `n_rows` sequences of each batch, for about `max_seconds`. Returns the median seconds
    of a step with the whole batch, and of how many; the first ones, which compile and allocate memory, do not count."""
    state, config = trainer.state, trainer.config
    scale = max(1.0, config.batch_size / n_rows)
    n_warmup = 3 if state.is_compiled else 1
    seconds: list[float] = []
    for step in range(n_warmup + _MOST_STEPS):
        if step >= n_warmup + _FEWEST_STEPS and state.processes.any(sum(seconds) > max_seconds):
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
