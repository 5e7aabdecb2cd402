"""The search behind `--grad-accum-steps auto`: how far a batch must be split to fit into memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from system.device import free_memory, peak_memory, total_memory
from system.errors import UserError, is_out_of_memory
from training.loader import Batch, micro_batches
from training.state import TrainingState

OUT_OF_MEMORY = (
    "out of memory even with one sequence at a time: try --grad-checkpointing, a shorter context or a smaller model"
)
ForwardBackward = Callable[[list[Batch], float, bool], Any]
"""Adds gradients of micro-batches: (micro-batches, total weight, whether ranks exchange gradients)."""


def fewest_micro_batches(state: TrainingState, rows: list[Batch], forward_backward: ForwardBackward) -> int:
    """Returns the fewest micro-batches into which a batch must be split, the same on every process.

    `rows` is the batch that needs the most memory. Raises UserError if even single sequences do not fit. The whole
    batch is tried compiled, as it will run if it fits. Parts of it are tried uncompiled, which needs somewhat more
    memory and saves a compilation for each size.
    """
    n, device, compiled = 1, state.processes.device, state.model.compiled
    while state.processes.any(not fits(state, rows, n, forward_backward)):
        if n * state.processes.world_size >= len(rows):
            raise UserError(OUT_OF_MEMORY)
        n = min(2 * n, len(rows))
        state.model.compiled = None
        free_memory(device)
    if n > 1 and compiled:
        torch.compiler.reset()  # otherwise the new batch size recompiles with dynamic shapes
        state.model.compiled = compiled
    free_memory(device)
    return n


def fewest_for_slices(
    state: TrainingState, rows: list[Batch], forward_backward: ForwardBackward, limit: float | None = None
) -> int:
    """Returns what `fewest_micro_batches` returns, for a model in slices (`--fsdp`).

    All ranks compute together there, so one that ran out of memory would leave the others waiting. Therefore the search
    begins with single sequences, and doubles them only if the growth of the peak so far says that every rank stays
    below `limit` bytes, by default 90% of its memory. Parts are tried uncompiled.
    """
    processes, device = state.processes, state.processes.device
    limit = 0.9 * total_memory(device) if limit is None else limit
    n = n_rows = -(-len(rows) // processes.world_size)
    free_memory(device)
    size, peak = 0, peak_memory(device)
    with torch.compiler.set_stance("force_eager"):
        while True:
            if not fits(state, rows, n, forward_backward):
                raise UserError(OUT_OF_MEMORY if n == n_rows else f"out of memory: try --grad-accum-steps {2 * n}")
            smaller, size, peak_of_smaller, peak = size, -(-n_rows // n), peak, peak_memory(device)
            free_memory(device)
            n_next = -(-n // 2)
            growth = (-(-n_rows // n_next) - size) * (peak - peak_of_smaller) / (size - smaller)
            if n == 1 or processes.any(peak + growth > limit):
                return n
            n = n_next


def fits(state: TrainingState, rows: list[Batch], n: int, forward_backward: ForwardBackward) -> bool:
    """Whether forward and backward pass fit into memory beside AdamW's state. Changes nothing."""
    processes, parameters = state.processes, state.trained_parameters
    share = micro_batches(rows, n, processes.rank, processes.world_size, state.model.config.block_size)
    try:
        # AdamW allocates two means per parameter at its first step.
        means = [] if state.step else [torch.empty_like(p) for p in (*parameters, *parameters)]
        forward_backward(share[:2], 1, False)
        del means
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        for optimizer in state.optimizers:
            optimizer.zero_grad(set_to_none=True)
