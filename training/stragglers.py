"""A rank that is slower than the others: each step, all processes wait for it."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
from torch import nn

from training.state import Listener, TrainingState

_CLEARLY = 1.5
"""A rank that takes so many times as long as the others is reported,"""
_LINES = 3
"""if it does so in so many lines of the log, one after the other."""

Moment = float | torch.cuda.Event


class StepTimer:
    """Measures this rank's own time for its steps: from their start until its last gradient is computed.

    The time in which it waits for other ranks comes after that: DDP exchanges gradients during the backward pass, but
    waits for them when the backward pass has ended. On CUDA the times are events in the stream, so that nothing waits
    for the GPU. A process alone is not measured, nor is FSDP: there, each layer waits for the other ranks.
    """

    def __init__(self, state: TrainingState):
        device = state.processes.device
        self.on_cuda, self.is_on = device.type == "cuda", state.processes.world_size > 1 and state.sharding is None
        self.steps: deque[list[Moment]] = deque(maxlen=100)
        """start and end of steps not averaged yet"""
        if self.is_on:  # the parameter that the forward pass uses first gets its gradient last
            state.trained_parameters[0].register_post_accumulate_grad_hook(self._end)

    def start(self) -> None:
        """Begins a step."""
        if self.is_on:
            self.steps.append([self._now()])

    def _end(self, parameter: nn.Parameter) -> None:
        """Is called with each micro-batch: the last one counts."""
        if self.steps:
            self.steps[-1][1:] = [self._now()]

    def _now(self) -> Moment:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mean(self) -> float:
        """Returns the mean own time of a step in seconds since the last call, 0.0 if no step has been measured.

        On CUDA, steps that the GPU still computes count the next time.
        """
        seconds = []
        while self.steps and len(self.steps[0]) == 2:
            start, end = self.steps[0]
            if isinstance(start, float) and isinstance(end, float):
                seconds.append(end - start)
            elif isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event) and end.query():
                seconds.append(start.elapsed_time(end) / 1000)
            else:
                break
            self.steps.popleft()
        return sum(seconds) / len(seconds) if seconds else 0.0


class Stragglers(Listener):
    """Adds the mean own time of a step over the ranks, and that of the slowest, to each line of the log. For rank 0.

    Prints a line if one rank holds the others up. It comes before the listeners that write the entry.
    """

    def __init__(self) -> None:
        self.slow_rank, self.n_lines = -1, 0
        """the rank that was clearly slower in the last lines of the log, and in how many"""

    def on_log(self, state: TrainingState, entry: dict[str, Any]) -> None:
        own = state.own_seconds
        if not own or min(own) <= 0:
            return
        slowest = max(own)
        rank = own.index(slowest)
        others = (sum(own) - slowest) / (len(own) - 1)
        entry |= {"own_seconds": sum(own) / len(own), "slowest_seconds": slowest, "slowest_rank": rank}
        if slowest < _CLEARLY * others:
            self.slow_rank, self.n_lines = -1, 0
            return
        self.n_lines = self.n_lines + 1 if rank == self.slow_rank else 1
        self.slow_rank = rank
        if self.n_lines == _LINES:
            print(f"rank {rank} holds the others up: it needs {slowest:.3g} s a step, the others {others:.3g} s")
