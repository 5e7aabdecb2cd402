"""The training loop, for every training script and any number of processes.

`Trainer.run` is the algorithm. Batches come from `loader.py`, the loss from `model.py`. Logging, samples, plots and
checkpoints are listeners (`state.Listener`): they hear what happens, and are not part of the loop.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from system.cli import stop_signals as catch_stop_signals
from system.device import autocast, fast_attention, to_host
from system.errors import UserError
from training.distributed import local_gradients, replicate
from training.evaluation import bits_per_byte, compile_evaluation, mean_loss
from training.loader import Batch, Sequences, StepBatch, Windows, micro_batches, require_known_ids, step_seed
from training.memory import fewest_for_slices, fewest_micro_batches
from training.optim import learning_rate_at, set_learning_rate
from training.state import Listener, StepFigures, StopReason, TrainingState

MAX_LOSS = 1_000.0
"""Nats per token. Random weights have a loss of about 11."""


class Trainer:
    """Trains the model of a `TrainingState` in place."""

    def __init__(
        self,
        state: TrainingState,
        train_data: Windows | Sequences,
        val_data: Windows | Sequences,
    ):
        """Raises UserError for data that cannot be used with the model, and if a batch cannot fit into memory."""
        self.state, self.config = state, state.config
        self.train_data, self.val_data = train_data, val_data
        self.listeners: Sequence[Listener] = ()
        self.load_batch(0)  # unusable data fails before anything is written
        if state.is_compiled and not state.sharding:
            state.model.compile_training()
        is_whole = state.model.compiled and not state.sharding
        self.compiled_evaluation = compile_evaluation(state.model) if is_whole else None
        self.forward = state.model if state.sharding else replicate(state.model, state.processes)
        if state.config.grad_accum_steps == "auto" and state.processes.device.type != "cpu":
            search = fewest_for_slices if state.sharding else fewest_micro_batches
            state.n_micro_batches = search(state, train_data.largest_batch(), self.forward_backward)

    def run(self, listeners: Sequence[Listener] = ()) -> StopReason:
        """Trains until `max_steps`, an early stop, or SIGINT or SIGTERM, which finishes the step and saves.

        Listeners are called in their order. Raises UserError if the loss is not finite.
        """
        state, config, self.listeners = self.state, self.config, listeners
        with (
            catch_stop_signals() as stop_signals,
            contextlib.ExitStack() as at_exit,
            ThreadPoolExecutor(1) as prefetcher,
        ):
            upcoming = prefetcher.submit(self.load_batch, state.step)
            for listener in self.listeners:
                at_exit.callback(listener.close)  # after an error too
                listener.on_start(state)
            stop = self.evaluate() if state.step == 0 else None
            unread = None  # what the last step measured, as long as the GPU may still compute it
            first_step = state.step
            while stop is None and state.step < config.max_steps:
                batch = upcoming.result()
                upcoming = prefetcher.submit(self.load_batch, state.step + 1)
                learning_rate = learning_rate_at(state.step, config)
                torch.manual_seed(step_seed(config.seed, state.step, state.processes.rank))  # dropout
                loss = self.forward_backward(batch.micro_batches, batch.total_weight)
                grad_norm = self.update_weights(learning_rate)
                state.processes.sum_in_place(loss)

                stop = self.check(unread)  # the previous step, so that the host need not wait for this one
                if state.step == first_step:
                    gc.freeze()  # garbage collection need not look again at what exists by now
                state.step += 1
                state.tokens += batch.n_tokens
                unread = StepFigures(state.step, state.tokens, learning_rate, to_host(torch.stack([loss, grad_norm])))
                if self.is_interrupted(stop_signals) and state.step < config.max_steps:
                    stop = stop or StopReason.INTERRUPTED
                if stop or self.anything_is_due():
                    stop = self.check(unread) or stop  # nothing is saved before its loss is known
                    unread = None
                    stop = self.evaluate_and_save(stop)
        stop = stop or StopReason.DONE
        for listener in self.listeners:
            listener.on_end(state, stop)
        state.processes.leave()
        return stop

    def anything_is_due(self) -> bool:
        """Whether an evaluation, a snapshot or a save is due after this step."""
        c = self.config
        intervals = (c.eval_every, c.snapshot_every, c.save_every)
        return self.state.step == c.max_steps or any(self.is_due(every) for every in intervals)

    def evaluate_and_save(self, stop: StopReason | None) -> StopReason | None:
        """Does what is due after this step, or because training stops; returns why it stops, if it does."""
        state, config = self.state, self.config
        is_last_step = state.step == config.max_steps
        ends_early = stop is not None and stop is not StopReason.INTERRUPTED
        if self.is_due(config.eval_every) or is_last_step or ends_early:
            stop = self.evaluate() or stop
        is_last = is_last_step or stop is not None
        if self.is_due(config.snapshot_every) or self.is_due(config.save_every) or is_last:
            self.check_weights()
        if self.is_due(config.snapshot_every):
            for listener in self.listeners:
                listener.on_snapshot(state)
        if self.is_due(config.save_every) or is_last:
            for listener in self.listeners:
                listener.on_save(state)
        return stop

    def load_batch(self, step: int) -> StepBatch:
        """Returns this rank's share of the global batch of a step."""
        rows, state, processes = self.train_data.batch(step), self.state, self.state.processes
        require_known_ids(rows, state.model.config)
        max_length = state.model.config.block_size
        return StepBatch(
            micro_batches(rows, state.n_micro_batches, processes.rank, processes.world_size, max_length),
            total_weight=sum(row.total_weight for row in rows),
            n_tokens=sum(row.tokens.numel() for row in rows),
        )

    def forward_backward(self, batches: list[Batch], total_weight: float, exchange: bool = True) -> Tensor:
        """Adds up the gradients of micro-batches; returns this rank's part of the mean loss, in nats per token.

        Ranks exchange gradients with the last micro-batch, unless `exchange` is False. FSDP always exchanges them.
        """
        state, device = self.state, self.state.processes.device
        exchange = exchange or state.sharding is not None
        total = torch.zeros((), device=device)
        for i, batch in enumerate(batches):
            batch = batch.to(device)
            if state.is_compiled and self.train_data.is_padded:  # its batches differ in size and length
                torch._dynamo.maybe_mark_dynamic(batch.tokens, [0, 1])
            is_exchanged = exchange and i == len(batches) - 1
            has_fixed_shapes = not self.train_data.is_padded and state.model.config.dropout == 0
            with local_gradients(self.forward, on=not is_exchanged), fast_attention(has_fixed_shapes):
                with autocast(device, state.dtype):
                    loss = self.forward(batch.tokens, batch.targets, batch.class_weights)
                loss = loss / (total_weight or 1)  # 0 if nothing counts
                # DDP averages over processes, but each loss is already divided by the weight of the whole batch.
                state.scaler.scale(loss * state.processes.world_size).backward()
            total += loss.detach()
        return total

    def update_weights(self, learning_rate: float) -> Tensor:
        """Clips the gradients, takes an optimizer step and clears them; returns the gradient norm before clipping."""
        state = self.state
        set_learning_rate(state.optimizers, learning_rate)
        for optimizer in state.optimizers:
            state.scaler.unscale_(optimizer)
        with_gradient = [p for p in state.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(with_gradient, self.config.grad_clip or math.inf)
        if state.sharding:
            norm = state.sharding.whole_norm(norm)
        for optimizer in state.optimizers:
            state.scaler.step(optimizer)
        state.scaler.update()
        for optimizer in state.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return norm

    def check(self, figures: StepFigures | None) -> StopReason | None:
        """Waits for a step's loss, and logs it if that is due; returns why to stop if it reaches `--target-loss`.

        Raises UserError for a loss that is not finite.
        """
        if figures is None:
            return None
        state, config = self.state, self.config
        loss, grad_norm = figures.read()
        if not math.isfinite(loss) or not (math.isfinite(grad_norm) or state.scaler.is_enabled()):
            raise UserError(
                f"the loss is not finite at step {figures.step} (loss {loss}, gradient norm {grad_norm}); the last "
                f"save, if any, is in {config.last_path}: try a lower --learning-rate, or --dtype float32"
            )
        state.recent_losses.append(loss)
        for listener in self.listeners:
            listener.on_step(state, figures, loss)
        if figures.step % config.log_every:
            return None
        mean, state.recent_losses = sum(state.recent_losses) / len(state.recent_losses), []
        entry = {
            "step": figures.step,
            "tokens": figures.tokens,
            "loss": mean,
            "learning_rate": figures.learning_rate,
            "grad_norm": grad_norm,
        }
        for listener in self.listeners:
            listener.on_log(state, entry)
        return StopReason.TARGET_LOSS if mean <= config.target_loss else None

    def evaluate(self) -> StopReason | None:
        """Computes the validation loss; returns why to stop if `--patience` is exhausted."""
        state, config = self.state, self.config
        loss = self.validation_loss()
        entry = {"step": state.step, "val_loss": loss}
        if self.val_data.bytes_per_token:
            entry["bits_per_byte"] = bits_per_byte(loss, self.val_data.bytes_per_token)
        is_best = loss < state.best_val_loss
        state.best_val_loss = min(loss, state.best_val_loss)
        state.evaluations_since_best = 0 if is_best else state.evaluations_since_best + 1
        state.history.append(entry)
        for listener in self.listeners:
            listener.on_evaluation(state, entry, is_best)
        is_exhausted = 0 < config.patience <= state.evaluations_since_best
        return StopReason.PATIENCE if is_exhausted else None

    def check_weights(self) -> None:
        """Raises UserError if the weights, which are about to be saved, are not sound. Costs a part of an evaluation:
        the loss of a step is that of the weights before the step."""
        is_evaluated = self.state.history and self.state.history[-1]["step"] == self.state.step
        if not is_evaluated:
            self.validation_loss(n_batches=1)

    def validation_loss(self, n_batches: int | None = None) -> float:
        """Returns the validation loss, in nats per token, over `--eval-tokens` or over a few batches.

        Raises UserError for a loss that no model has, so that its weights are never saved.
        """
        state, config = self.state, self.config
        size = max(state.processes.world_size, config.batch_size // state.n_micro_batches)  # as in training
        rows = itertools.islice(self.val_data.in_order(config.eval_tokens), n_batches and n_batches * size)
        loss = mean_loss(state.model, rows, size, state.dtype, state.processes, self.compiled_evaluation)
        if not loss < MAX_LOSS:
            raise UserError(
                f"the weights have a validation loss of {loss:.4g} after step {state.step} and are not saved; the last "
                f"save, if any, is in {config.last_path}: try a lower --learning-rate, or --dtype float32"
            )
        return loss

    def is_due(self, every: int) -> bool:
        """Whether something that happens `every` so many steps happens now; 0 means never."""
        return every > 0 and self.state.step % every == 0

    def is_interrupted(self, stop_signals: list[int]) -> bool:
        """Whether a process got a stop signal. Asking the others takes time, so several processes ask each other only
        every `--log-every` steps."""
        processes = self.state.processes
        if processes.world_size > 1 and not self.is_due(self.config.log_every):
            return False
        return processes.any(bool(stop_signals))
