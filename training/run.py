"""Puts a training run together: the state, the loop and its callbacks. Every training script calls `train`."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch

from gpt_config import GPTConfig, Shape
from model import GPT
from text.tokenizer import Tokenizer, from_spec
from training.config import TrainerConfig
from training.examples import example_prompts
from training.loader import Sequences, Windows
from training.parallel import Processes
from training.plan import print_plan, with_cpu_precision
from training.reporting import Console, Log, Report
from training.saving import ORDER, Checkpointer, changed_options, restore
from training.state import Examine, StopReason, TrainingState
from training.trainer import Trainer
from weights import checkpoint

if TYPE_CHECKING:
    from training.sharding import Sharding  # half a second to import, needed for --fsdp only


def build_model(config: Any, tokenizer: Tokenizer, start: dict[str, Any] | None) -> GPT:
    """Returns the model of `train.py`: with the weights of the checkpoint `start`, or a random one of its seed."""
    torch.manual_seed(config.seed)
    if start:
        start["config"] = dataclasses.replace(start["config"], dropout=config.dropout)
        return checkpoint.build(start)
    shape: dict[str, Any] = {field.name: getattr(config, field.name) for field in dataclasses.fields(Shape)}
    return GPT(GPTConfig(**shape, vocab_size=tokenizer.padded_vocab_size, n_tokens=tokenizer.n_tokens))


def train(
    model: GPT,
    train_data: Windows | Sequences,
    val_data: Windows | Sequences,
    config: TrainerConfig,
    processes: Processes,
    metadata: dict[str, Any],
    *,
    resumed: dict[str, Any] | None = None,
    sharding: Sharding | None = None,
    examine: Examine | None = None,
) -> StopReason:
    """Trains a model, and writes `--out`, the resume file, the log, the plot and the report. `--plan` measures only.

    `metadata` (kind, tokenizer, template and the like) is stored in the checkpoints. `resumed` is a loaded resume file,
    whose weights `model` has. `examine` gives the examples of an evaluation. Raises UserError for data that cannot be
    used, and for a loss that is not finite. On the CPU, resuming changes no bit of the result.
    """
    if config.patience:  # needs an evaluation in each epoch
        config = dataclasses.replace(config, eval_every=min(config.eval_every, math.ceil(train_data.batches_per_epoch)))
    if not sharding:
        config = with_cpu_precision(config, model.config.n_embd, processes, resumed)
    metadata = {**metadata, "data": [train_data.fingerprint(), val_data.fingerprint()], "order": ORDER}
    metadata["prompts"] = example_prompts(val_data, from_spec(metadata["tokenizer"]))
    if resumed:
        changes = changed_options(config, resumed, metadata["data"])
        if isinstance(train_data, Windows) and resumed.get("order") != ORDER:
            changes.append("another order of the data, since its version drew windows with replacement")
        differs = f" with other options than before: {', '.join(changes)}" if changes else ""
        processes.print(f"resuming at step {resumed['step']:,}{differs}")
    state = TrainingState.create(model, config, processes, sharding)
    if resumed:
        restore(state, resumed)
        resumed.clear()  # the caller's reference would keep its tensors in memory
    trainer = Trainer(state, train_data, val_data, examine)
    if config.plan:
        print_plan(trainer, metadata["kind"])
        processes.leave()
        return StopReason.DONE
    if processes.rank > 0:
        return trainer.run([Checkpointer(metadata)] if sharding else [])
    log = Log()
    return trainer.run([Console(log, train_data, metadata), log, Checkpointer(metadata), Report(log, metadata)])
