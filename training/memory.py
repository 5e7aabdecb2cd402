"""The search behind `--grad-accum-steps auto`: how far a batch must be split to fit into memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from system.device import free_memory, peak_memory, total_memory
from system.errors import UserError, is_out_of_memory
from training.loader import Batch, micro_batches
from training.state import TrainingState


def fewest_micro_batches(
    state: TrainingState,
    rows: list[Batch],
    forward_backward: Callable[[list[Batch], float, bool], Any],
    limit: float | None = None,
) -> int:
    """Returns the fewest micro-batches into which a batch must be split, the same on every process.

    `rows` is the batch that needs the most memory. The search begins with single sequences, and doubles them as long as
    the growth of the peak so far says that every rank stays below `limit` bytes, by default 90% of its memory: with
    FSDP all ranks compute together, and one that ran out of memory would leave the others waiting. It runs uncompiled,
    which needs somewhat more memory and saves a compilation for each size. Raises UserError if single sequences do not
    fit.
    """
    processes, device, block_size = state.processes, state.processes.device, state.model.config.block_size
    limit = 0.9 * total_memory(device) if limit is None else limit
    n = n_rows = -(-len(rows) // processes.world_size)
    free_memory(device)
    size, peak = 0, peak_memory(device)
    try:
        with torch.compiler.set_stance("force_eager"):
            while True:
                # AdamW allocates two means per parameter at its first step.
                means = [] if state.step else [torch.empty_like(p) for p in 2 * state.trained_parameters]
                share = micro_batches(rows, n, processes.rank, processes.world_size, block_size)
                forward_backward(share[:2], 1, False)
                state.clear_gradients()
                del means
                smaller, size, peak_of_smaller, peak = size, -(-n_rows // n), peak, peak_memory(device)
                free_memory(device)
                n_next = -(-n // 2)
                growth = (-(-n_rows // n_next) - size) * (peak - peak_of_smaller) / (size - smaller)
                if n == 1 or processes.any(peak + growth > limit):
                    return n
                n = n_next
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = f"--grad-accum-steps {2 * n}, --grad-checkpointing, a shorter context or a smaller model"
        raise UserError(f"out of memory with a batch in {n} micro-batches: try {remedy}") from None
