"""The state of a training run, and the interface for everything that listens to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import torch

from model import GPT
from system.device import choose_dtype, keep_memory, uses_compile
from training.config import TrainerConfig
from training.distributed import Processes
from training.optim import build_optimizers

if TYPE_CHECKING:
    from training.sharding import Sharding


class StopReason(Enum):
    """Why training ended."""

    DONE = auto()
    """all steps are done"""
    TARGET_LOSS = auto()
    """the training loss reached `--target-loss`"""
    PATIENCE = auto()
    """the validation loss did not improve for `--patience` evaluations"""
    INTERRUPTED = auto()
    """SIGINT or SIGTERM"""


@dataclass
class TrainingState:
    """What the loop changes, and what listeners read."""

    config: TrainerConfig
    processes: Processes
    dtype: torch.dtype
    """precision of the forward pass; the weights are float32"""
    model: GPT
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    """scales the loss in float16, does nothing in other precisions"""
    sharding: Sharding | None = None
    """for a model in slices (`--fsdp`)"""
    n_micro_batches: int = 1
    """per step and process"""
    step: int = 0
    """optimizer steps taken"""
    tokens: int = 0
    """tokens seen, over all processes"""
    best_val_loss: float = math.inf
    """nats per token"""
    evaluations_since_best: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    """one entry per evaluation: `step`, `val_loss`, perhaps `bits_per_byte` and `examples`"""
    recent_losses: list[float] = field(default_factory=list)
    """training losses since the last line of the log"""

    @classmethod
    def create(
        cls, model: GPT, config: TrainerConfig, processes: Processes, sharding: Sharding | None = None
    ) -> TrainingState:
        """Puts the model on its device, in training mode, and builds its optimizers.

        Raises UserError for a batch that does not divide among the processes.
        """
        processes.require_divisible(config.batch_size)
        device, dtype = processes.device, choose_dtype(config.dtype, processes.device)
        if device.type == "cpu":
            keep_memory()
        model = model.train().to(device)
        model.gradient_checkpointing = config.grad_checkpointing
        return cls(
            config,
            processes,
            dtype,
            model,
            build_optimizers(
                model,
                config.optimizer,
                config.learning_rate,
                config.beta2,
                config.weight_decay,
                config.embedding_lr_scale,
                torch.bfloat16 if device.type == "cuda" else dtype,
                compiled=uses_compile(config.compile, device),
                sharding=sharding,
            ),
            torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
            sharding,
            n_micro_batches=1 if config.grad_accum_steps == "auto" else config.grad_accum_steps,
        )

    @property
    def is_compiled(self) -> bool:
        """Whether training runs through `torch.compile`."""
        return uses_compile(self.config.compile, self.processes.device)

    @property
    def trained_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that require a gradient."""
        return [p for p in self.model.parameters() if p.requires_grad]


@dataclass(frozen=True)
class StepFigures:
    """What an optimizer step measured."""

    step: int
    """steps taken, this one included"""
    tokens: int
    """tokens seen, this step included"""
    learning_rate: float
    read: Callable[[], list[float]]
    """waits for the device; returns the loss in nats per token, and the gradient norm before clipping"""


class Listener:
    """What happens beside the loop. A subclass overrides the methods that concern it.

    Methods run on every rank that has the listener. They leave the state as it was, except that they may add to the
    entry of an evaluation.
    """

    def on_start(self, state: TrainingState) -> None:
        """Before the first step of this process."""

    def on_step(self, state: TrainingState, figures: StepFigures, loss: float) -> None:
        """After the loss of a step is known. The weights, and the other numbers in `state`, may be one step ahead."""

    def on_log(self, state: TrainingState, entry: dict[str, Any]) -> None:
        """After every `--log-every` steps, with the entry for the log."""

    def on_evaluation(self, state: TrainingState, entry: dict[str, Any], is_best: bool) -> None:
        """After an evaluation, with its entry in the history."""

    def on_snapshot(self, state: TrainingState) -> None:
        """After every `--snapshot-every` steps."""

    def on_save(self, state: TrainingState) -> None:
        """After every `--save-every` steps, and at the end."""

    def on_end(self, state: TrainingState, reason: StopReason) -> None:
        """When the loop has ended."""

    def close(self) -> None:
        """However the run ends, by an error too; before `on_end`."""
