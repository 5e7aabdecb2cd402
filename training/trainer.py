"""The training loop, for every training script and any number of processes.

`Trainer.run` is the algorithm. Batches come from `loader.py`, the loss from `model.py`. The console, the log, plots and
checkpoints are callbacks (`state.Callback`): they are told what happens, and are not part of the loop.
"""

import contextlib
import gc
import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from system.cli import stop_signals
from system.device import autocast, fast_attention, free_memory, peak_memory, to_host, total_memory
from system.errors import UserError, is_out_of_memory
from training.evaluation import bits_per_byte, compile_evaluation, mean_loss
from training.loader import Batch, Sequences, StepBatch, Windows, micro_batches, require_known_ids
from training.optim import learning_rate_at, set_learning_rate
from training.parallel import local_gradients, replicate
from training.state import Callback, Entry, Examine, StopReason, TrainingState

MAX_LOSS = 1_000.0
"""Nats per token. Random weights have a loss of about 11."""


class Trainer:
    """Trains the model of a `TrainingState` in place."""

    def __init__(
        self,
        state: TrainingState,
        train_data: Windows | Sequences,
        val_data: Windows | Sequences,
        examine: Examine | None = None,
    ):
        """`examine` returns the examples of each evaluation.

        Raises UserError for data that cannot be used with the model, and if a batch cannot fit into memory.
        """
        self.state, self.config, self.examine = state, state.config, examine
        self.train_data, self.val_data = train_data, val_data
        self.callbacks: Sequence[Callback] = ()
        self.load_batch(0)  # unusable data fails before anything is written
        if state.is_compiled and train_data.is_padded:  # it recompiles when a batch passes a size
            torch._inductor.config.triton.mix_order_reduction = False
        if state.is_compiled and not state.sharding:
            state.model.compile_training()
        is_whole = state.model.compiled and not state.sharding
        self.compiled_evaluation = compile_evaluation(state.model) if is_whole else None
        self.forward = state.model if state.sharding else replicate(state.model, state.processes)
        if state.config.grad_accum_steps == "auto" and state.processes.device.type != "cpu":
            state.n_micro_batches = fewest_micro_batches(state, train_data.largest_batch(), self.forward_backward)

    def run(self, callbacks: Sequence[Callback] = ()) -> StopReason:
        """Trains until `max_steps`, an early stop, or SIGINT or SIGTERM, which finishes the step and saves.

        Callbacks are called in their order. Raises UserError if the loss is not finite.
        """
        state, config, self.callbacks = self.state, self.config, callbacks
        with (
            stop_signals() as received,
            contextlib.ExitStack() as at_exit,
            ThreadPoolExecutor(1) as prefetcher,
        ):
            upcoming = prefetcher.submit(self.load_batch, state.step)
            for callback in callbacks:
                at_exit.callback(callback.close)  # after an error too
                callback.on_start(state)
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

                stop = self.record(unread)  # the previous step, so that the host need not wait for this one
                if state.step == first_step:
                    gc.freeze()  # garbage collection need not look again at what exists by now
                state.step += 1
                state.tokens += batch.n_tokens
                read = to_host(torch.stack([loss, grad_norm]))
                unread = (state.step, state.tokens, learning_rate, read)
                if self.is_interrupted(received) and state.step < config.max_steps:
                    stop = stop or StopReason.INTERRUPTED
                if stop or self.anything_is_due():
                    stop = self.record(unread) or stop  # nothing is saved before its loss is known
                    unread = None
                    stop = self.evaluate_and_save(stop)
        stop = stop or StopReason.DONE
        for callback in callbacks:
            callback.on_end(state, stop)
        state.processes.leave()
        return stop

    def anything_is_due(self) -> bool:
        """Whether an evaluation, a snapshot or a save is due after this step."""
        c, state = self.config, self.state
        return state.step == c.max_steps or any(map(state.is_due, (c.eval_every, c.snapshot_every, c.save_every)))

    def evaluate_and_save(self, stop: StopReason | None) -> StopReason | None:
        """Does what is due after this step, or because training stops; returns why it stops, if it does."""
        state, config = self.state, self.config
        ends_early = stop is not None and stop is not StopReason.INTERRUPTED
        is_evaluated = state.is_due(config.eval_every) or state.step == config.max_steps or ends_early
        if is_evaluated:
            stop = self.evaluate() or stop
        is_saved = state.is_due(config.save_every) or state.step == config.max_steps or stop is not None
        if is_saved or state.is_due(config.snapshot_every):
            if not is_evaluated:  # the loss of a step is that of the weights before the step
                self.validation_loss(n_batches=1)
            for callback in self.callbacks:
                callback.on_save(state)
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
            if state.is_compiled and self.train_data.is_padded:  # batches differ in size and length
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
        if state.scaler.is_enabled():  # an overflow anywhere spoils the common norm: all optimizers skip the step
            flags = [flag for o in state.optimizers for flag in state.scaler._found_inf_per_device(o).values()]
            torch._foreach_copy_(flags, [torch.stack(flags).amax()] * len(flags))
        with_gradient = [p for p in state.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(with_gradient, self.config.grad_clip or math.inf)
        if state.sharding:
            norm = state.sharding.whole_norm(norm)
        for optimizer in state.optimizers:
            state.scaler.step(optimizer)
        state.scaler.update()
        state.clear_gradients()
        return norm

    def record(self, unread: tuple[int, int, float, Callable[[], list[float]]] | None) -> StopReason | None:
        """Waits for a step's loss, and tells the callbacks; returns why to stop if it reaches `--target-loss`.

        Raises UserError for a loss that is not finite.
        """
        if unread is None:
            return None
        state, config = self.state, self.config
        step, tokens, learning_rate, read = unread
        loss, grad_norm = read()
        if not math.isfinite(loss) or not (math.isfinite(grad_norm) or state.scaler.is_enabled()):
            raise UserError(
                f"the loss is not finite at step {step} (loss {loss}, gradient norm {grad_norm}); the last save, if "
                f"any, is in {config.last_path}: try a lower --learning-rate, or --dtype float32"
            )
        entry = {"step": step, "tokens": tokens, "learning_rate": learning_rate, "loss": loss, "grad_norm": grad_norm}
        state.recent_losses.append(loss)
        for callback in self.callbacks:
            callback.on_step(state, entry)
        if step % config.log_every:
            return None
        mean, state.recent_losses = sum(state.recent_losses) / len(state.recent_losses), []
        for callback in self.callbacks:
            callback.on_log(state, {**entry, "loss": mean})
        return StopReason.TARGET_LOSS if config.target_loss is not None and mean <= config.target_loss else None

    def evaluate(self) -> StopReason | None:
        """Computes the validation loss and the examples; returns why to stop if `--patience` is exhausted."""
        state, config = self.state, self.config
        loss = self.validation_loss()
        entry: Entry = {"step": state.step, "val_loss": loss}
        if self.val_data.bytes_per_token:
            entry["bits_per_byte"] = bits_per_byte(loss, self.val_data.bytes_per_token)
        if self.examine:
            state.model.eval()
            entry["examples"] = self.examine(state)
            state.model.train()
        is_best = state.step > 0 and loss < state.best_val_loss
        if state.step > 0:
            state.best_val_loss = min(loss, state.best_val_loss)
            state.evaluations_since_best = 0 if is_best else state.evaluations_since_best + 1
        state.history.append(entry)
        for callback in self.callbacks:
            callback.on_evaluation(state, entry, is_best)
        is_exhausted = 0 < config.patience <= state.evaluations_since_best
        return StopReason.PATIENCE if is_exhausted else None

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

    def is_interrupted(self, received: list[int]) -> bool:
        """Whether a process got a stop signal. Asking the others takes time, so several processes ask each other only
        every `--log-every` steps."""
        processes = self.state.processes
        if processes.world_size > 1 and not self.state.is_due(self.config.log_every):
            return False
        return processes.any(bool(received))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Returns the seed of a step's dropout: like the batch, a function of where the run stands."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


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
