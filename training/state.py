"""The state of a training run, and the interface of its callbacks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

from model import GPT
from system.device import Probe, autocast, choose_dtype, keep_memory, uses_compile
from system.errors import UserError
from training.config import TrainerConfig
from training.optim import build_optimizers
from training.parallel import Processes

if TYPE_CHECKING:
    from training.sharding import Sharding

Entry = dict[str, Any]
"""A line of the log. A step has `step` and `tokens` (both with this one), `learning_rate`, `loss` in nats per token and
`grad_norm` before clipping. An evaluation has `step`, `val_loss` and perhaps `bits_per_byte` and `examples`: what the
model makes of the same few inputs each time, as dicts of `input`, `expected` and `output`."""
Examine = Callable[["TrainingState"], list[dict[str, str]]]
"""Returns the examples of an evaluation. All ranks call it; only rank 0 needs a result."""


class StopReason(Enum):
    """Why training ended."""

    DONE = "done"
    TARGET_LOSS = "reached the target loss"
    PATIENCE = "stopped, since the validation loss no longer improved"
    INTERRUPTED = "interrupted"


@dataclass
class TrainingState:
    """What the loop changes, and what callbacks read."""

    config: TrainerConfig
    processes: Processes
    dtype: torch.dtype
    """precision of the forward pass; the weights are float32"""
    model: GPT
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    """scales the loss in float16, does nothing in other precisions"""
    sharding: Sharding | None = None
    """for a model sharded over the processes (`--fsdp`)"""
    n_micro_batches: int = 1
    """per step and process"""
    step: int = 0
    """optimizer steps taken"""
    tokens: int = 0
    """tokens seen, over all processes"""
    best_val_loss: float = math.inf
    """nats per token, of the evaluations after step 0"""
    evaluations_since_best: int = 0
    history: list[Entry] = field(default_factory=list)
    """one entry per evaluation"""
    recent_losses: list[float] = field(default_factory=list)
    """training losses since the last line of the log"""

    @classmethod
    def create(
        cls, model: GPT, config: TrainerConfig, processes: Processes, sharding: Sharding | None = None
    ) -> TrainingState:
        """Puts the model on its device, in training mode, and builds its optimizers. Raises UserError for a batch that
        does not divide among the processes."""
        if config.batch_size % processes.world_size:
            raise UserError(f"--batch-size {config.batch_size} does not divide among {processes.world_size} processes")
        device, dtype = processes.device, choose_dtype(config.dtype, processes.device)
        if device.type == "cpu":
            keep_memory()
        if config.device_check and device.type != "cpu" and not sharding:
            expected = Probe.of(model, contextlib.nullcontext(), gradient=True)
            found = Probe.of(model.to(device), autocast(device, dtype), gradient=True)
            is_chosen = config.device != "auto" or processes.world_size > 1
            if not found.agrees(device, dtype, expected, is_chosen):
                return cls.create(model, config, Processes())
        model = model.train().to(device)
        model.gradient_checkpointing = config.grad_checkpointing
        muon_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        optimizers = build_optimizers(model, config, muon_dtype, uses_compile(config.compile, device), sharding)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        n = 1 if config.grad_accum_steps == "auto" else config.grad_accum_steps
        return cls(config, processes, dtype, model, optimizers, scaler, sharding, n_micro_batches=n)

    @property
    def is_compiled(self) -> bool:
        """Whether training runs through `torch.compile`."""
        return uses_compile(self.config.compile, self.processes.device)

    @property
    def trained_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that require a gradient."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def clear_gradients(self) -> None:
        """Drops the gradients of all parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def is_due(self, every: int) -> bool:
        """Whether something that happens `every` so many steps happens now; 0 means never."""
        return every > 0 and self.step % every == 0


class Callback:
    """What happens beside the loop, on rank 0 and, where all ranks are needed, on every rank.

    A subclass overrides the methods that concern it. No method changes the state or the entries.
    """

    def on_start(self, state: TrainingState) -> None:
        """Before the first step of this process."""

    def on_step(self, state: TrainingState, entry: Entry) -> None:
        """After the loss of a step is known. `state` may be one step ahead."""

    def on_log(self, state: TrainingState, entry: Entry) -> None:
        """After every `--log-every` steps, with the mean of their losses."""

    def on_evaluation(self, state: TrainingState, entry: Entry, is_best: bool) -> None:
        """After an evaluation."""

    def on_save(self, state: TrainingState) -> None:
        """After every `--save-every` steps, and at the end."""

    def on_end(self, state: TrainingState, reason: StopReason) -> None:
        """When the loop has ended."""

    def close(self) -> None:
        """However the run ends, by an error too; before `on_end`."""
