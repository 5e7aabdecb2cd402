"""The one training loop and the one evaluator, for every training script and any number of processes."""

import contextlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from generation.config import SamplingConfig
from generation.text_model import TextModel
from model import GPT
from system.cli import catch_stop_signals, command_line, plain
from system.device import (
    autocast,
    choose_device,
    choose_dtype,
    fast_attention,
    free_memory,
    keep_memory,
    peak_flops,
    peak_memory,
    to_host,
)
from system.errors import UserError, is_out_of_memory
from text.tokenizer import from_spec
from training.config import TrainerConfig
from training.loader import Batch, Epochs, Prefetcher, Windows, micro_batches, step_seed
from training.optim import build_optimizers, learning_rate_at
from training.run_log import RunLog, before_and_after, draw_losses, parameter_table, summary
from weights import checkpoint

Examine = Callable[[GPT, torch.device, torch.dtype], list[dict[str, str]]]
"""Gives a model the same few held-out inputs each time; returns for each `input`, `expected` and `output`."""


class Trainer:
    """Trains a model: `Trainer(…).run()`.

    What it writes, beside `config.out`: the checkpoint itself, `.last.pt` with all that `--resume` needs, `.jsonl`
    with the log, `snapshots/`, and the plot. On the CPU a resumed run equals an uninterrupted one bit for bit.
    """

    def __init__(
        self,
        model: GPT,
        train_data: Windows | Epochs,
        val_data: Windows | Epochs,
        config: TrainerConfig,
        facts: dict,
        bytes_per_token: float | None = None,
        resumed: dict | None = None,
        model_is_fresh: bool = False,
        examine: Examine | None = None,
        fsdp: bool = False,
    ):
        """`facts` go into the checkpoint (kind, tokenizer, template); `resumed` is a loaded `.last.pt`.

        With `bytes_per_token`, UTF-8 bytes per token of the validation text, bits per byte are reported too.
        `model_is_fresh` says that the weights are random, so that the first loss is known beforehand. What `examine`
        gives before and after training is shown and kept. `fsdp` shards the model over the processes.
        """
        self.config, self.facts, self.bytes_per_token, self.examine = config, facts, bytes_per_token, examine
        self.train_data, self.val_data = train_data, val_data
        self.rank, self.world_size, local_rank = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        on_cuda = config.device in ("auto", "cuda") and torch.cuda.is_available()
        self.device = choose_device(f"cuda:{local_rank}" if on_cuda and self.world_size > 1 else config.device)
        self.dtype = choose_dtype(config.dtype, self.device)
        if self.device.type == "cpu":
            keep_memory()
        if self.world_size > 1:
            if config.batch_size % self.world_size:
                raise UserError(f"--batch-size {config.batch_size} does not divide among {self.world_size} processes")
            gpu = self.device if self.device.type == "cuda" else None
            dist.init_process_group("nccl" if gpu else "gloo", device_id=gpu)
        self.is_compiled = config.compile == "on" or (config.compile == "auto" and self.device.type == "cuda")
        self.fsdp = fsdp
        if fsdp:
            from training import distributed

            is_allowed = config.grad_accum_steps != "auto" and config.optimizer == "adamw" and not config.sample_prompt
            if self.world_size == 1 or self.dtype == torch.float16 or not is_allowed:
                raise UserError(
                    "--fsdp wants torchrun, a number of --grad-accum-steps, AdamW, bfloat16 or float32, and no "
                    "--sample-prompt"
                )
            distributed.shard(model, self.device, self.is_compiled)
        self.model = model.to(self.device)
        self.n_micro_batches = 1 if config.grad_accum_steps == "auto" else config.grad_accum_steps
        self._load(0)  # unusable data fails here, before anything is computed or written
        self.model.gradient_checkpointing = config.grad_checkpointing
        self.optimizers = build_optimizers(
            self.model, config.optimizer, config.learning_rate, (config.beta1, config.beta2), config.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.step, self.best_val_loss, self.bad_evaluations, self.history = 0, math.inf, 0, []
        self.tokens, self.recent_losses = 0, []
        self.is_fresh = model_is_fresh
        if resumed:
            self._restore(resumed)
        if self.is_compiled and not fsdp:
            self.model.compile_training()
        self.forward = DistributedDataParallel(self.model) if self.world_size > 1 and not fsdp else self.model
        self.peak_flops = (peak_flops(self.device) or 0) * self.world_size

    @property
    def last_path(self) -> Path:
        """The file that `--resume` continues from."""
        return last_path(self.config.out)

    @property
    def log_path(self) -> Path:
        """The log: one JSON object a line."""
        return self.config.out.with_suffix(".jsonl")

    def run(self) -> None:
        """Trains to `max_steps`, an early stop, or SIGINT/SIGTERM, which ends the step, saves and returns."""
        c, stop_reason, pending = self.config, "", None
        if c.grad_accum_steps == "auto" and self.device.type != "cpu":
            self._fit_into_memory()
        batches = Prefetcher(self._load, self.step)
        if self.rank == 0:
            self.log = RunLog(self.log_path, self.step, c)
            if self.step == 0:  # a new run: no older one may be resumed by mistake
                self.last_path.unlink(missing_ok=True)
            self._introduce()
        self.start, self.tokens_before = time.perf_counter(), self.tokens
        with (
            catch_stop_signals() as stop_signals,
            tqdm(
                total=c.max_steps,
                initial=self.step,
                unit="step",
                disable=self.rank > 0,
                dynamic_ncols=True,
                mininterval=0.5 if os.isatty(2) else 30,
            ) as self.bar,
        ):
            if self.step == 0:
                stop_reason = self._evaluate()
            while self.step < c.max_steps and not stop_reason:
                learning_rate = learning_rate_at(self.step, c)
                values = self._step(batches, learning_rate)
                stop_reason = self._settle(pending)  # the step before this one, so that the GPU need not wait
                self.step += 1
                pending = (self.step, learning_rate, self.tokens, to_host(values))
                is_asked = self.world_size == 1 or self.step % c.log_every == 0  # asking the others takes time
                interrupted = is_asked and self._on_any(bool(stop_signals))
                at_end = interrupted or stop_reason or self.step == c.max_steps
                at_evaluation = self.step % c.eval_every == 0 or self.step == c.max_steps
                at_snapshot = c.snapshot_every and self.step % c.snapshot_every == 0
                if at_end or at_evaluation or at_snapshot or self.step % c.save_every == 0:
                    stop_reason = self._settle(pending) or stop_reason  # nothing is saved before its loss was seen
                    pending = None
                    if at_evaluation or stop_reason:
                        stop_reason = self._evaluate() or stop_reason
                    if at_snapshot:
                        self._save(c.out.parent / "snapshots" / f"{c.out.stem}_step_{self.step}.pt")
                    if at_end or stop_reason or self.step % c.save_every == 0:
                        self._save_for_resume()
                if interrupted:
                    stop_reason = stop_reason or "interrupted"
                self.bar.update()
        batches.close()
        if self.rank == 0:
            self._report(stop_reason or "done")
        if self.world_size > 1:
            dist.barrier()  # none leaves while another still talks to it
            dist.destroy_process_group()

    def _load(self, step: int) -> tuple[list[Batch], int, int]:
        """Returns this rank's micro-batches of a step, and how many tokens of the global batch count, and there are."""
        rows = self.train_data.batch(step)
        if max(int(max(row.tokens.max(), row.targets.max())) for row in rows) >= self.model.config.vocab_size:
            raise UserError(f"{self.config.data} holds token ids that the model does not have: prepare the data again")
        return (
            micro_batches(rows, self.n_micro_batches, self.rank, self.world_size, self.model.config.block_size),
            sum(row.n_counted for row in rows),
            sum(row.tokens.numel() for row in rows),
        )

    def _step(self, batches: Prefetcher, learning_rate: float) -> torch.Tensor:
        """Takes one optimizer step; returns (loss, gradient norm) on the device."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        share, n_counted, n_tokens = batches(self.step)
        torch.manual_seed(step_seed(self.config.seed, self.step, self.rank))  # of dropout
        loss = self._accumulate(share, n_counted)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.grad_clip or math.inf)
        norm = norm.full_tensor() if self.fsdp else norm
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self._zero_grad()
        if self.world_size > 1:
            dist.all_reduce(loss)
        self.tokens += n_tokens
        return torch.stack([loss, norm])

    def _fit_into_memory(self) -> None:
        """`--grad-accum-steps auto`: finds the fewest micro-batches that fit into memory, the same on every process.

        Tried with the longest sequences there are. Raises UserError where nothing fits.
        """
        rows = self.train_data.largest_batch()
        while self._on_any(not self._fits(rows)):
            if self.n_micro_batches * self.world_size >= len(rows):
                raise UserError(
                    "out of memory even with one sequence at a time: try --grad-checkpointing, a shorter context or a "
                    "smaller model"
                )
            self.n_micro_batches = min(2 * self.n_micro_batches, len(rows))
            torch.compiler.reset()  # else the other size would be compiled for any size
            free_memory(self.device)
        free_memory(self.device)

    def _fits(self, rows: list[Batch]) -> bool:
        """Whether memory is enough for the passes over a batch beside AdamW's means; changes nothing."""
        share = micro_batches(rows, self.n_micro_batches, self.rank, self.world_size, self.model.config.block_size)
        try:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            means = [] if self.step else [torch.empty_like(p) for p in (*trained, *trained)]  # noqa: F841
            self._accumulate(share[:2], 1, exchange=False)
            return True
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            self._zero_grad()

    def _accumulate(self, share: list[Batch], n_counted: int, exchange: bool = True) -> torch.Tensor:
        """Adds up gradients over micro-batches, and with the last over processes if they are to `exchange` them;
        returns this rank's part of the mean loss, in nats per token."""
        total = torch.zeros((), device=self.device)
        for i, batch in enumerate(share):
            batch = batch.to(self.device)
            if self.is_compiled and batch.counted is not None:  # padded batches differ in size and length
                torch._dynamo.maybe_mark_dynamic(batch.tokens, [0, 1])
            is_local = self.world_size > 1 and not self.fsdp and not (exchange and i == len(share) - 1)
            with self.forward.no_sync() if is_local else contextlib.nullcontext(), fast_attention():
                with autocast(self.device, self.dtype):
                    loss = self.forward(batch.tokens, batch.targets, batch.counted) / max(n_counted, 1)
                self.scaler.scale(loss * self.world_size).backward()  # DDP takes the mean over processes
            total += loss.detach()
        return total

    def _zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _settle(self, pending: tuple | None) -> str:
        """Looks at a step's loss once it has reached the host, and logs it where due.

        Returns why training should stop, or "". Raises UserError for a loss that is not finite.
        """
        if pending is None:
            return ""
        step, learning_rate, tokens, host = pending
        loss, norm = host()
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            kept = f"{self.last_path} holds the last good state" if self.last_path.exists() else "no step was saved yet"
            raise UserError(
                f"the loss is not finite at step {step} (loss {loss}, gradient norm {norm}); {kept}: "
                "try a lower --learning-rate, or --dtype float32"
            )
        rate = (tokens - self.tokens_before) / (time.perf_counter() - self.start)
        mfu = f", MFU {rate * self.model.flops_per_token() / self.peak_flops:.0%}" if self.peak_flops else ""
        self.bar.set_postfix_str(f"loss {loss:.3f}, lr {learning_rate:.1e}, {rate:,.0f} tokens/s{mfu}", refresh=False)
        self.recent_losses.append(loss)
        if step % self.config.log_every:
            return ""
        mean, self.recent_losses = sum(self.recent_losses) / len(self.recent_losses), []
        if self.rank == 0:
            self.log.write(
                {"step": step, "tokens": tokens, "loss": mean, "learning_rate": learning_rate, "grad_norm": norm}
            )
        is_reached = self.config.target_loss_on == "train" and mean <= self.config.target_loss
        return f"reached the target loss {self.config.target_loss}" if is_reached else ""

    def _evaluate(self) -> str:
        """Evaluates, saves the weights if they are the ones to keep; returns why training should stop, or ""."""
        c = self.config
        loss = evaluate(
            self.model,
            self.val_data.in_order(c.eval_tokens),
            max(self.world_size, c.batch_size // self.n_micro_batches),
            self.device,
            self.dtype,
            self.rank,
            self.world_size,
        )
        entry = {"step": self.step, "val_loss": loss}
        text = f"step {self.step:,}: validation loss {loss:.4f}"
        if self.bytes_per_token:
            entry["bits_per_byte"] = loss / math.log(2) / self.bytes_per_token
            text += f", {entry['bits_per_byte']:.3f} bits per byte"
        improved = loss < self.best_val_loss
        self.best_val_loss = min(loss, self.best_val_loss)
        self.bad_evaluations = 0 if improved else self.bad_evaluations + 1
        is_kept = improved or c.keep == "last"
        if self.examine and is_kept:
            for old in self.history[1:]:
                old.pop("examples", None)
            entry["examples"] = self.examine(self.model.eval(), self.device, self.dtype)
            self.model.train()
        self.history.append(entry)
        if self.rank == 0:
            self.log.write(entry)
            self.bar.write(text + (" (the best so far)" if improved and self.step else ""))
            expected = math.log(self.model.config.vocab_size)
            if self.step == 0 and self.is_fresh and abs(loss - expected) > 0.5:
                self.bar.write(f"warning: random weights should give about ln(vocabulary) = {expected:.2f}")
            if c.sample_prompt:
                self.bar.write(self._sample())
        if is_kept:
            self._save(c.out)
        if c.target_loss_on == "val" and loss <= c.target_loss:
            return f"reached the target loss {c.target_loss}"
        return (
            f"no improvement in {c.patience} evaluations" if c.patience and self.bad_evaluations >= c.patience else ""
        )

    def _save(self, path: Path, **more: object) -> None:
        state = checkpoint.pack(
            self.model,
            **self.facts,
            step=self.step,
            tokens=self.tokens,
            best_val_loss=self.best_val_loss,
            train_config=plain(self.config),
            history=self.history,
            **more,
        )
        if self.fsdp:
            from training.distributed import gather

            state = gather(state)
        if self.rank == 0:
            checkpoint.save(path, state)

    def _save_for_resume(self) -> None:
        """Writes `.last.pt` and redraws the plot."""
        self._save(
            self.last_path,
            optimizer=[optimizer.state_dict() for optimizer in self.optimizers],
            scaler=self.scaler.state_dict(),
            bad_evaluations=self.bad_evaluations,
            recent_losses=self.recent_losses,
        )
        if self.rank == 0:
            draw_losses(self.log_path, self.config.plot)

    def _restore(self, resumed: dict) -> None:
        try:
            for optimizer, state in zip(self.optimizers, resumed["optimizer"], strict=True):
                if self.fsdp:
                    from training.distributed import shard_state

                    state = shard_state(state, optimizer)
                optimizer.load_state_dict(state)
            if resumed["scaler"]:  # empty where it was not float16
                self.scaler.load_state_dict(resumed["scaler"])
            self.step, self.history = resumed["step"], resumed["history"]
            self.best_val_loss, self.bad_evaluations = resumed["best_val_loss"], resumed["bad_evaluations"]
            self.tokens, self.recent_losses = resumed["tokens"], resumed["recent_losses"]
        except (KeyError, ValueError):
            raise UserError(
                f"{self.last_path} does not fit this run: resume with the --optimizer it began with"
            ) from None

    def _on_any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        if self.world_size == 1:
            return flag
        flag = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    def _sample(self) -> str:
        """Returns what the model makes of `--sample-prompt`: a completion, or, from a chat model, an answer."""
        was_training = self.model.training
        tokenizer, template = from_spec(self.facts["tokenizer"]), self.facts["template"]
        text_model = TextModel(self.model.eval(), tokenizer, template, dtype=self.dtype)
        prompt, config = self.config.sample_prompt, SamplingConfig(max_new_tokens=60, seed=self.config.seed)
        if template:
            text = "".join(text_model.answer([{"role": "user", "content": prompt}], config))
        else:
            text = prompt + "".join(text_model.complete(prompt, config))
        self.model.train(was_training)
        return f"  {text!r}"

    def _introduce(self) -> None:
        """Prints the model by parts, and what a step takes."""
        config, data = self.config, self.train_data
        print(parameter_table(self.model))
        per_epoch = getattr(data, "batches_per_epoch", data.n_tokens / config.batch_size / self.model.config.block_size)
        tokens_per_batch = data.n_tokens / per_epoch
        all_, trained = self.model.n_parameters(), sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        if trained < all_:  # in float32: weights, gradients, AdamW's two means
            whole = all_ - trained if self.facts["kind"] == "lora" else all_
            print(
                f"{trained:,} of {all_:,} parameters train ({trained / all_:.2%}): weights, gradients and AdamW's "
                f"state take {(4 * all_ + 12 * trained) / 1e6:,.1f} MB; if all did, {16 * whole / 1e6:,.1f} MB"
            )
        print(
            f"{data.n_tokens:,} training tokens, {per_epoch:,.0f} batches of {config.batch_size} sequences an epoch, "
            f"{self.model.flops_per_token() * tokens_per_batch / 1e12:.3g} TFLOP a step"
        )
        if self.n_micro_batches > 1:
            print(f"gradients add up over {self.n_micro_batches} micro-batches a step")

    def _report(self, stop_reason: str) -> None:
        """Prints what the run came to, and how to go on with one that was interrupted."""
        c = self.config
        print(f"{stop_reason} at step {self.step:,}; model in {c.out}, curves in {c.plot}")
        is_text = self.facts["kind"] != "classifier"
        print(summary(self.best_val_loss, self.bytes_per_token, self.tokens, self.model, self.log.seconds, is_text))
        print(f"peak memory {peak_memory(self.device) / 1e6:,.0f} MB")
        if self.examine:
            print(before_and_after(self.history))
        elif not c.sample_prompt and not self.fsdp:
            print(f"it writes:\n{self._sample()}")
        self.log.close()
        if stop_reason == "interrupted":
            print(f"go on with:\n  {command_line('--resume', drop=('--overwrite',))}")


@torch.no_grad()
def evaluate(
    model: GPT,
    rows: Iterable[Batch],
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    rank: int = 0,
    world_size: int = 1,
) -> float:
    """Returns the mean loss in nats per counted token over rows (one sequence each), in evaluation mode."""
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    rows = iter(rows)
    while group := list(itertools.islice(rows, batch_size)):
        [batch] = micro_batches(group, 1, rank, world_size, model.config.block_size)
        batch = batch.to(device)
        with autocast(device, dtype):
            loss = model(batch.tokens, batch.targets, batch.counted)
        total += torch.stack([loss.to(total.device).double(), total.new_full((), batch.n_counted)])
    if world_size > 1:
        dist.all_reduce(total)
    model.train(was_training)
    if not total[1]:
        raise UserError("the validation data is empty: prepare it with a larger --val-fraction")
    return (total[0] / total[1]).item()


def last_path(out: Path) -> Path:
    """`checkpoints/pretrained.pt` → `checkpoints/pretrained.last.pt`, the file that `--resume` continues from."""
    return out.with_suffix(".last.pt")


def claim_output(config: TrainerConfig, *kinds: str) -> dict | None:
    """Returns the loaded state to resume from, which is of one of the `kinds`, or None for a new run.

    Raises UserError where a checkpoint would be overwritten unasked, or where there is nothing to resume.
    """
    last = last_path(config.out)
    if config.out.suffix != ".pt":
        raise UserError(f"--out {config.out} must end in .pt", status=2)
    if config.plot.is_dir():
        raise UserError(f"--plot {config.plot} is a folder: name a file", status=2)
    if config.resume:
        if not last.exists():
            raise UserError(f"nothing to resume: {last} is missing; start without --resume")
        return checkpoint.load(last, verify=True, kinds=kinds)
    files = (config.out, last, config.out.with_suffix(".jsonl"))
    if not config.overwrite and (taken := next((path for path in files if path.exists()), None)):
        go_on = "--resume to go on with it, " * last.exists()
        raise UserError(f"{taken} exists: add {go_on}--overwrite to replace it, or choose another --out")
    return None
