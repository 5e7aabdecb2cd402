"""The one training loop and the one evaluator, for every training script and any number of processes."""

import contextlib
import itertools
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
from cli import TrainerConfig, UserError, command_line, plain
from device import autocast, choose_device, choose_dtype, peak_flops
from files import atomic_write
from loader import Batch, Conversations, Prefetcher, Windows, micro_batches, stack
from model import GPT
from optim import build_optimizers


class Trainer:
    """Trains a model: `Trainer(…).run()`.

    What it writes, beside `config.out`: the checkpoint itself, `.last.pt` with all that `--resume` needs, `.jsonl`
    with the log, `snapshots/`, and the plot. On the CPU a resumed run equals an uninterrupted one bit for bit.
    """

    def __init__(
        self,
        model: GPT,
        train_data: Windows | Conversations,
        val_data: Windows | Conversations,
        config: TrainerConfig,
        facts: dict,
        bytes_per_token: float | None = None,
        resumed: dict | None = None,
    ):
        """`facts` go into the checkpoint (kind, tokenizer, template); `resumed` is a loaded `.last.pt`.

        With `bytes_per_token`, UTF-8 bytes per token of the validation text, bits per byte are reported too.
        """
        self.config, self.facts, self.bytes_per_token = config, facts, bytes_per_token
        self.train_data, self.val_data = train_data, val_data
        self.rank, self.world_size, local_rank = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        on_cuda = config.device == "auto" and torch.cuda.is_available()
        self.device = choose_device(f"cuda:{local_rank}" if on_cuda and self.world_size > 1 else config.device)
        self.dtype = choose_dtype(config.dtype, self.device)
        if self.world_size > 1:
            if config.batch_size % self.world_size:
                raise UserError(f"--batch-size {config.batch_size} does not divide among {self.world_size} processes")
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.model = model.to(self.device)
        self.n_micro_batches = 1 if config.grad_accum_steps == "auto" else config.grad_accum_steps
        self._load(0)  # unusable data fails here, before anything is computed or written
        self.model.gradient_checkpointing = config.grad_checkpointing
        self.optimizers = build_optimizers(
            self.model, config.optimizer, config.learning_rate, (config.beta1, config.beta2), config.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.step, self.best_val_loss, self.bad_evaluations, self.history = 0, math.inf, 0, []
        if resumed:
            self._restore(resumed)
        self.forward = self.model
        if config.compile == "on" or (config.compile == "auto" and self.device.type == "cuda"):
            self.forward = torch.compile(self.model)
        if self.world_size > 1:
            self.forward = DistributedDataParallel(self.forward)
        self.peak_flops = peak_flops(self.device)

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
        batches = Prefetcher(self._load, self.step)
        with (
            self._open_log(),
            _stop_signals() as stop_signals,
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
                self._settle(pending)  # the step before this one, so that the GPU need not wait
                self.step += 1
                pending = (self.step, learning_rate, _to_host(values))
                interrupted = self._agree(stop_signals)
                at_end = interrupted or self.step == c.max_steps
                at_evaluation = self.step % c.eval_every == 0 or self.step == c.max_steps
                at_snapshot = c.snapshot_every and self.step % c.snapshot_every == 0
                if at_end or at_evaluation or at_snapshot or self.step % c.save_every == 0:
                    pending = self._settle(pending)  # nothing is saved before its loss was seen
                    if at_evaluation:
                        stop_reason = self._evaluate()
                    if at_snapshot:
                        self._save(c.out.parent / "snapshots" / f"{c.out.stem}_step_{self.step}.pt")
                    if at_end or stop_reason or self.step % c.save_every == 0:
                        self._save_for_resume()
                if interrupted:
                    stop_reason = stop_reason or "interrupted"
                self.bar.update()
        batches.close()
        self._report(stop_reason or "done")
        if self.world_size > 1:
            dist.destroy_process_group()

    def _load(self, step: int) -> tuple[list[Batch], int]:
        """Returns this rank's micro-batches of a step, and how many tokens of the global batch count."""
        rows = self.train_data.batch(step)
        if max(int(max(row.tokens.max(), row.targets.max())) for row in rows) >= self.model.config.vocab_size:
            raise UserError(f"{self.config.data} holds token ids that the model does not have: prepare the data again")
        return (
            micro_batches(rows, self.n_micro_batches, self.rank, self.world_size, self.model.config.block_size),
            sum(row.n_counted for row in rows),
        )

    def _step(self, batches: Prefetcher, learning_rate: float) -> torch.Tensor:
        """Takes one optimizer step; returns (loss, gradient norm) on the device. Splits the batch until it fits."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        share, n_counted = batches(self.step)
        while True:
            try:
                loss = self._accumulate(share, n_counted)
                break
            except torch.OutOfMemoryError:
                if (
                    self.config.grad_accum_steps != "auto"
                    or self.world_size > 1
                    or len(share) == self.config.batch_size
                ):
                    raise
                self.n_micro_batches *= 2
                self._zero_grad()
                torch.cuda.empty_cache()
                share, n_counted = self._load(self.step)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.grad_clip or math.inf)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self._zero_grad()
        if self.world_size > 1:
            dist.all_reduce(loss)
        return torch.stack([loss, norm])

    def _accumulate(self, share: list[Batch], n_counted: int) -> torch.Tensor:
        """Adds up gradients over micro-batches; returns this rank's part of the mean loss, in nats per token."""
        total = torch.zeros((), device=self.device)
        for i, batch in enumerate(share):
            batch = batch.to(self.device)
            is_last = i == len(share) - 1
            with contextlib.nullcontext() if is_last or self.world_size == 1 else self.forward.no_sync():
                with autocast(self.device, self.dtype):
                    loss = self.forward(batch.tokens, batch.targets, batch.counted) / max(n_counted, 1)
                self.scaler.scale(loss * self.world_size).backward()  # DDP takes the mean over processes
            total += loss.detach()
            self.tokens_seen += batch.tokens.numel() * self.world_size
        return total

    def _zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _settle(self, pending: tuple | None) -> None:
        """Looks at a step's loss once it has reached the host; logs it where due. Raises UserError if not finite."""
        if pending is None:
            return
        step, learning_rate, host = pending
        loss, norm = host()
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            kept = f"{self.last_path} holds the last good state" if self.last_path.exists() else "nothing was saved yet"
            raise UserError(
                f"the loss is not finite at step {step} (loss {loss}, gradient norm {norm}); {kept}: "
                "try a lower --learning-rate, or --dtype float32"
            )
        if step % self.config.log_every == 0:
            self._log({"step": step, "loss": loss, "learning_rate": learning_rate, "grad_norm": norm})
        rate = self.tokens_seen / (time.perf_counter() - self.start)
        mfu = f", MFU {rate * self.model.flops_per_token() / self.peak_flops:.0%}" if self.peak_flops else ""
        self.bar.set_postfix_str(f"loss {loss:.3f}, lr {learning_rate:.1e}, {rate:,.0f} tokens/s{mfu}", refresh=False)

    def _evaluate(self) -> str:
        """Evaluates, saves the weights if they are the ones to keep; returns why training should stop, or ""."""
        c = self.config
        loss = evaluate(
            self.model,
            self.val_data.in_order(c.eval_tokens),
            c.batch_size,
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
        self.history.append(entry)
        if self.rank == 0:
            self._log(entry)
            self.bar.write(text + (" (the best so far)" if improved and self.step else ""))
            if improved or c.keep == "last":
                self._save(c.out)
        if c.target_loss and loss <= c.target_loss:
            return f"reached the target loss {c.target_loss}"
        return (
            f"no improvement in {c.patience} evaluations" if c.patience and self.bad_evaluations >= c.patience else ""
        )

    def _save(self, path: Path, **more: object) -> None:
        checkpoint.save(
            path,
            checkpoint.pack(
                self.model,
                **self.facts,
                step=self.step,
                best_val_loss=self.best_val_loss,
                train_config=plain(self.config),
                history=self.history,
                **more,
            ),
        )

    def _save_for_resume(self) -> None:
        """Writes `.last.pt` and redraws the plot."""
        if self.rank:
            return
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        self._save(
            self.last_path,
            optimizer=[optimizer.state_dict() for optimizer in self.optimizers],
            scaler=self.scaler.state_dict(),
            rng=rng,
            bad_evaluations=self.bad_evaluations,
        )
        draw_losses(self.log_path, self.config.plot)

    def _restore(self, resumed: dict) -> None:
        try:
            for optimizer, state in zip(self.optimizers, resumed["optimizer"], strict=True):
                optimizer.load_state_dict(state)
            self.scaler.load_state_dict(resumed["scaler"])
            torch.set_rng_state(resumed["rng"]["cpu"])
            if self.device.type == "cuda" and "cuda" in resumed["rng"]:
                torch.cuda.set_rng_state(resumed["rng"]["cuda"], self.device)
            self.step, self.history = resumed["step"], resumed["history"]
            self.best_val_loss, self.bad_evaluations = resumed["best_val_loss"], resumed["bad_evaluations"]
        except (KeyError, ValueError):
            raise UserError(
                f"{self.last_path} does not fit this run: resume with the --optimizer it began with"
            ) from None

    @contextlib.contextmanager
    def _open_log(self) -> Iterator[None]:
        """Opens the log, first dropping what a killed run logged after the state that this one resumes from."""
        self.start, self.tokens_seen, self.log = time.perf_counter(), 0, None
        if self.rank:
            yield
            return
        if self.step == 0:  # a new run: no older one may be resumed by mistake
            self.last_path.unlink(missing_ok=True)
        kept = [line for line in read_log(self.log_path) if line["step"] <= self.step] if self.step else []
        self.seconds_before = max((line["seconds"] for line in kept), default=0.0)
        with atomic_write(self.log_path, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        with open(self.log_path, "a", encoding="utf-8", buffering=1) as self.log:
            yield

    def _log(self, entry: dict) -> None:
        if self.rank == 0:
            seconds = self.seconds_before + time.perf_counter() - self.start
            self.log.write(json.dumps({**entry, "seconds": round(seconds, 3)}) + "\n")

    def _agree(self, stop_signals: list) -> bool:
        """Whether a signal asked to stop; with several processes, whether one of them got it (asked now and then)."""
        if self.world_size == 1:
            return bool(stop_signals)
        if self.step % self.config.log_every:
            return False
        flag = torch.tensor(float(bool(stop_signals)), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    def _report(self, stop_reason: str) -> None:
        if self.rank:
            return
        c = self.config
        best = "" if math.isinf(self.best_val_loss) else f", best validation loss {self.best_val_loss:.4f}"
        print(f"{stop_reason} at step {self.step:,}{best}; model in {c.out}, curves in {c.plot}")
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
    rows, n = iter(rows), 0
    while group := list(itertools.islice(rows, batch_size)):
        n += 1
        if n % world_size == rank:
            batch = stack(group, longest=model.config.block_size).to(device)
            with autocast(device, dtype):
                loss = model(batch.tokens, batch.targets, batch.counted)
            total += torch.stack([loss.double(), loss.new_tensor(batch.n_counted).double()]).to(total.device)
    if world_size > 1:
        dist.all_reduce(total)
    model.train(was_training)
    if not total[1]:
        raise UserError("the validation data is empty: prepare it with a larger --val-fraction")
    return (total[0] / total[1]).item()


def learning_rate_at(step: int, config: TrainerConfig) -> float:
    """Linear warm-up to `learning_rate`, then a cosine down to `min_lr` at `max_steps` (GPT-3, Brown et al. 2020)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.min_lr + cosine * (config.learning_rate - config.min_lr)


def last_path(out: Path) -> Path:
    """`checkpoints/pretrained.pt` → `checkpoints/pretrained.last.pt`, the file that `--resume` continues from."""
    return out.with_suffix(".last.pt")


def claim_output(config: TrainerConfig) -> dict | None:
    """Returns the loaded state to resume from, or None for a new run.

    Raises UserError where a checkpoint would be overwritten unasked, or where there is nothing to resume.
    """
    last = last_path(config.out)
    if config.out.suffix != ".pt":
        raise UserError(f"--out {config.out} must end in .pt", status=2)
    if config.resume:
        if not last.exists():
            raise UserError(f"nothing to resume: {last} is missing; start without --resume")
        return checkpoint.load(last, verify=True)
    if not config.overwrite and (taken := next((path for path in (config.out, last) if path.exists()), None)):
        raise UserError(
            f"{taken} exists: add --resume to go on with it, --overwrite to replace it, or choose another --out"
        )
    return None


def read_log(path: Path) -> list[dict]:
    """Reads a log; a last line that a kill cut short is passed over."""
    entries = []
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
    return entries


def draw_losses(log_path: Path, plot_path: Path) -> None:
    """Draws training and validation loss over the steps of a log into a PNG, atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = read_log(log_path)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key, label, style in (
        ("loss", "training", {"lw": 1, "alpha": 0.6}),
        ("val_loss", "validation", {"marker": "o", "ms": 4}),
    ):
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=f"{label} (last: {points[-1][1]:.3f})", **style)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=log_path.stem)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(plot_path) as file:
        FigureCanvasAgg(figure).print_png(file)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list]:
    """Yields a list that gets the number of a SIGINT or SIGTERM; a second one acts at once, as usual."""
    received, before = [], {}

    def handle(number, frame):
        received.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _to_host(values: torch.Tensor) -> Callable[[], list[float]]:
    """Starts copying a small tensor to the host; the returned function waits for it alone and gives its numbers."""
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def wait():
        event.synchronize()
        return host.tolist()

    return wait
