"""What a training run shows: the model at its start, progress, samples, examples, and a summary at its end."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable
from typing import Any

from torch.nn.utils import parametrize

from generation.config import SamplingConfig
from generation.text_model import TextModel
from model import GPT
from system.cli import duration, progress, shorten
from system.device import peak_flops, peak_memory
from system.untrusted import printable
from text.tokenizer import Tokenizer
from training.evaluation import bits_per_byte, perplexity
from training.loader import Sequences, Windows
from training.run_log import RunLog
from training.state import Listener, StepFigures, StopReason, TrainingState
from weights.describe import loss_name

Examine = Callable[[TrainingState], "list[dict[str, str]]"]
"""Gives the model the same few held-out inputs each time; returns `input`, `expected` and `output` of each."""
SAMPLE_COLUMNS = 100
MANY_EPOCHS = 10
"""Longest line of a sample at the end of a run, in characters."""


class Report(Listener):
    """Prints the model and what a step takes, and a line per evaluation."""

    def __init__(self, train_data: Windows | Sequences, first_loss: float | None = None):
        """`first_loss` is the loss that random weights should have."""
        self.train_data, self.first_loss = train_data, first_loss

    def on_start(self, state: TrainingState) -> None:
        config, data, model = state.config, self.train_data, state.model
        tokens_per_batch = data.n_tokens / data.batches_per_epoch
        if not state.step:
            print(parameter_table(model))
        n, n_trained = model.n_parameters(), sum(p.numel() for p in state.trained_parameters)
        if n_trained < n:
            n_adapter = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name or "role_rows" in name)
            # Each parameter takes 4 bytes; if it trains, its gradient and AdamW's two means take 4 bytes each.
            partly, fully = 4 * n + 12 * n_trained, 16 * (n - n_adapter)
            print(
                f"{n_trained:,} of {n:,} parameters train ({n_trained / n:.2%}): weights, gradients and AdamW's state "
                f"take {partly / 1e6:,.1f} MB; training all parameters would take {fully / 1e6:,.1f} MB"
            )
        print(
            f"{data.n_tokens:,} training tokens, {data.batches_per_epoch:,.0f} steps of {config.batch_size} sequences "
            f"an epoch; {config.max_steps:,} steps are {config.max_steps / data.batches_per_epoch:,.1f} epochs, at "
            f"{model.flops_per_token() * tokens_per_batch / 1e12:.3g} TFLOP a step"
        )
        n_epochs = config.max_steps / data.batches_per_epoch
        if n_epochs > MANY_EPOCHS and isinstance(data, Windows):
            print(
                f"warning: {n_epochs:,.0f} passes over so little text end in memorizing it. The best weights are kept; "
                "a smaller --max-steps gives better ones"
            )
        if state.n_micro_batches > 1:
            print(f"each step adds up the gradients of {state.n_micro_batches} micro-batches")

    def on_evaluation(self, state: TrainingState, entry: dict[str, Any], is_best: bool) -> None:
        text = f"step {state.step:,}: validation loss {entry['val_loss']:.4f}"
        if "bits_per_byte" in entry:
            text += f", {entry['bits_per_byte']:.3f} bits per byte"
        if is_best and state.step and state.config.keep == "best":
            text += " (the best so far)"
        print(text)
        if state.step == 0 and self.first_loss and abs(entry["val_loss"] - self.first_loss) > 0.5:
            print(f"warning: the loss of random weights should be about ln(vocabulary) = {self.first_loss:.2f}")


class ProgressBar(Listener):
    """Shows the step, the loss, tokens/s and, on GPUs with a known peak, model FLOPs utilization.

    It must come before the listeners that print, so that they do not print into the bar.
    """

    def on_start(self, state: TrainingState) -> None:
        self.peak_flops = (peak_flops(state.processes.device) or 0.0) * state.processes.world_size
        self.bar = progress(total=state.config.max_steps, initial=state.step, unit="step")
        self.start, self.tokens_before = time.perf_counter(), state.tokens

    def on_step(self, state: TrainingState, figures: StepFigures, loss: float) -> None:
        rate = (figures.tokens - self.tokens_before) / (time.perf_counter() - self.start)
        text = f"loss {loss:.3f}, {rate:,.0f} tokens/s"
        if self.peak_flops:
            text += f", MFU {rate * state.model.flops_per_token() / self.peak_flops:.0%}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def on_evaluation(self, state: TrainingState, entry: dict[str, Any], is_best: bool) -> None:
        self.bar.clear()

    def close(self) -> None:
        self.bar.close()


class Summary(Listener):
    """Prints what the run came to."""

    def __init__(self, log: RunLog, metadata: dict[str, Any], bytes_per_token: float | None):
        """`metadata` is that of the checkpoints."""
        self.log, self.bytes_per_token = log, bytes_per_token
        self.kind, self.loss_name = metadata["kind"], loss_name(metadata)

    def on_end(self, state: TrainingState, reason: StopReason) -> None:
        config = state.config
        why = {
            StopReason.DONE: "done",
            StopReason.TARGET_LOSS: f"reached the target loss {config.target_loss}",
            StopReason.PATIENCE: f"no improvement in {config.patience} evaluations",
            StopReason.INTERRUPTED: "interrupted",
        }[reason]
        print(f"{why} at step {state.step:,}; model in {config.out}, curves in {config.plot_path()}")
        best_step = state.step
        if math.isfinite(state.best_val_loss):
            is_best = config.keep == "best"
            loss = state.best_val_loss if is_best else state.history[-1]["val_loss"]
            steps = [entry["step"] for entry in state.history if entry.get("val_loss") == loss]
            is_earlier = is_best and bool(steps) and steps[0] < state.step
            best_step = steps[0] if is_earlier else state.step
            at = f" (at step {best_step:,}: the model is of that step)" if is_earlier else ""
            text = f"{'best' if is_best else 'last'} {self.loss_name} {loss:.4f}{at}"
            if self.kind != "classifier":
                text += f", perplexity {perplexity(loss):,.2f}"
            if self.bytes_per_token:
                text += f", {bits_per_byte(loss, self.bytes_per_token):.3f} bits per byte"
            print(text)
        seconds = self.log.seconds
        print(
            f"{state.tokens:,} tokens in {duration(seconds)}: {state.tokens / max(seconds, 1e-9):,.0f} tokens/s, "
            f"peak memory {peak_memory(state.processes.device) / 1e6:,.0f} MB"
        )
        if self.kind == "base" and 0 < best_step < 0.7 * state.step:
            print(
                f"after step {best_step:,} it only memorized: a run with --max-steps {best_step} probably gives a "
                "better model, since the learning rate falls until the last step"
            )
        elif self.kind == "base":
            per_parameter = state.tokens / state.model.n_parameters()
            print(
                f"{per_parameter:.2g} tokens per parameter; the compute-optimal number is about 20 "
                "(Hoffmann et al. 2022)"
            )
        if any("examples" in entry for entry in state.history):
            print(before_and_after(state.history))
        if reason is not StopReason.INTERRUPTED and self.kind != "classifier":
            chat = "" if self.kind == "base" else " --chat"
            print(f"now try: python generate.py --model {shlex.quote(str(config.out))}{chat}")


class Samples(Listener):
    """Prints what the model writes: with a prompt after every evaluation, otherwise once at the end.

    At the end it prints the samples of all evaluations below each other, after `--resume` those since then. Needed on
    rank 0, and with `--fsdp` on every rank, since all take part in gathering the weights.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None, prompt: str):
        self.tokenizer, self.template, self.prompt = tokenizer, template, prompt
        self.lines: list[str] = []
        self.last: tuple[int, str] | None = None  # step and text: the report asks for the same text again

    def on_evaluation(self, state: TrainingState, entry: dict[str, Any], is_best: bool) -> None:
        text = self.sample(state)  # here, so that all ranks gather at the same time; the report asks for it again
        if self.prompt and state.processes.rank == 0:
            print(f"  {self.prompt!r} → {text!r}")
            step_and_loss = f"{state.step:>9,} {entry['val_loss']:>8.3f}  "
            self.lines.append(step_and_loss + shorten(printable(text), SAMPLE_COLUMNS - len(step_and_loss)))

    def on_end(self, state: TrainingState, reason: StopReason) -> None:
        if not self.prompt:
            text = self.sample(state)
            if state.processes.rank == 0:
                print(f"after the last step it writes, for example:\n  {text!r}")
        elif self.lines:
            print(f"what it wrote after {self.prompt!r}:")
            print(f"{'step':>9} {'loss':>8}")
            print("\n".join(self.lines))

    def sample(self, state: TrainingState) -> str:
        """Returns what the model writes after the prompt, or a chat model's answer to it; "" on a rank above 0."""
        if self.last and self.last[0] == state.step:
            return self.last[1]
        self.last = state.step, ""
        model = state.sharding.whole_model(state.model) if state.sharding else state.model
        if model is None:
            return ""
        was_training = state.model.training
        text_model = TextModel(model.eval(), self.tokenizer, self.template, dtype=state.dtype)
        config = SamplingConfig(max_new_tokens=60, seed=state.config.seed)
        messages = [{"role": "user", "content": self.prompt}]
        ids = text_model.answer_ids(messages, config) if self.template else text_model.prompt_ids(self.prompt)
        text = text_model.write(ids, config, strip=bool(self.template))
        state.model.train(was_training)
        self.last = state.step, text
        return text


class Examples(Listener):
    """Adds to the history what the model makes of the same held-out inputs: at first, and with the weights kept."""

    def __init__(self, examine: Examine):
        self.examine = examine

    def on_evaluation(self, state: TrainingState, entry: dict[str, Any], is_best: bool) -> None:
        if not is_best and state.config.keep == "best":
            return
        for earlier in state.history[1:]:
            earlier.pop("examples", None)
        state.model.eval()
        entry["examples"] = self.examine(state)
        state.model.train()


def greedy_answers(
    state: TrainingState, tokenizer: Tokenizer, exchanges: list[tuple[list[int], list[int]]]
) -> list[dict[str, str]]:
    """Answers held-out questions greedily. `exchanges` holds the ids of each question, and of its true answer."""
    text_model = TextModel(state.model, tokenizer, dtype=state.dtype)
    config = SamplingConfig(greedy=True, max_new_tokens=60)

    def text(ids: list[int]) -> str:
        return tokenizer.decode(i for i in ids if i < tokenizer.end_of_text).strip()

    with parametrize.cached():  # forms each weight with its LoRA correction once
        outputs = [text_model.write(question, config).strip() for question, _ in exchanges]
    return [
        {"input": text(question), "expected": text(answer), "output": output}
        for (question, answer), output in zip(exchanges, outputs, strict=True)
    ]


def parameter_table(model: GPT) -> str:
    """Returns the number of parameters of each part of a model, as a table."""
    parts = {
        "LoRA": ("lora_", "role_rows"),
        "token embedding": ("wte",),
        "position embedding": ("wpe",),
        f"attention, {model.config.n_layer} layers": (".attn.",),
        f"MLP, {model.config.n_layer} layers": (".mlp.",),
        "LayerNorms": ("ln_",),
        "head": ("lm_head",),
    }
    counts = dict.fromkeys(parts, 0)
    for name, parameter in model.named_parameters():  # lists a tied head once, as the embedding
        part = next(part for part, marks in parts.items() if any(mark in name for mark in marks))
        counts[part] += parameter.numel()
    counts["in all"] = model.n_parameters()
    return "\n".join(f"{part:22}{n:>15,}" for part, n in counts.items() if n)


def before_and_after(history: list[dict[str, Any]], width: int = 160) -> str:
    """Returns the validation loss and the examples, before training and with the weights kept, as text."""
    entries = [entry for entry in history if "examples" in entry]
    first, last = entries[0], entries[-1]
    lines = [
        f"validation loss {first['val_loss']:.4f} before, {last['val_loss']:.4f} after (step {last['step']:,}); "
        "the same examples before and after:"
    ]
    for before, after in zip(first["examples"], last["examples"], strict=False):
        lines.append(f"> {shorten(after['input'], width)}")
        for label, text in (("before", before["output"]), ("after", after["output"]), ("wanted", after["expected"])):
            lines.append(f"  {label:7} {shorten(text, width)}")
    return "\n".join(lines)
