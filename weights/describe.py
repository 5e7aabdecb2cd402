"""What a model is, in words: for lists, the page, reports and model cards, all from the same facts."""

import math
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from system.cli import printable, shorten
from system.errors import UserError
from weights.checkpoint import Checkpoint
from weights.files import FOLDER, CheckpointFile, checkpoint_files
from weights.loading import load_file

Wanted = Literal["model", "language model", "chat model", "classifier"]
"""What a script can use."""

_FITTING: dict[Wanted, tuple[str, ...]] = {
    "model": ("base", "sft", "lora", "classifier"),
    "language model": ("base", "sft", "lora"),
    "chat model": ("sft", "lora"),
    "classifier": ("classifier",),
}
"""Kinds of checkpoints that fit."""

_KINDS = {"base": "base", "sft": "chat", "lora": "chat (LoRA)", "classifier": "classifier"}
_TASKS = {"base": "completes text", "sft": "answers questions", "lora": "answers", "classifier": "classifies text"}
_MAKE_ONE = "make demo, or python train.py --preset demo --data TEXT.txt"
_CARD_OPTIONS = ("batch_size", "optimizer", "learning_rate", "min_lr", "warmup_steps", "weight_decay")
_USE = {
    "base": """
write = pipeline("text-generation", "{name}")
print(write("Once upon a time")[0]["generated_text"])
```
""",
    "sft": """
answer = pipeline("text-generation", "{name}")
question = [{{"role": "user", "content": "What is the capital of France?"}}]
print(answer(question)[0]["generated_text"][-1]["content"])
```

The chat template formats conversations as in training. `transformers` encodes the text of a message together with the
control tokens of the template. Remove `<|assistant|>` and the like from the text of users that you do not trust.
""",
    "classifier": """
classify = pipeline("text-classification", "{name}")
print(classify("WINNER! Call now to claim your prize", truncation=True))
```

The tokenizer appends `<|endoftext|>` to each text, and the model predicts the label at that token. The padding token is
`<|user|>`, because no text contains it.
""",
}


def facts(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns the metadata of a checkpoint as text to show, name by name; missing metadata is left out."""
    config, options = checkpoint["config"], checkpoint.get("train_config") or {}
    vocabulary = "GPT-2's" if checkpoint["tokenizer"] == "gpt2" else "its own"
    parent = options.get("model") or options.get("init_from")
    metadata = {
        "kind": _TASKS[checkpoint["kind"]],
        "labels": ", ".join(checkpoint.get("labels", [])),
        "parameters": f"{n_parameters(checkpoint):,}",
        "shape": f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide",
        "context": f"{config.block_size:,} tokens",
        "vocabulary": f"{config.n_tokens:,} tokens, {vocabulary}",
        "data": next((str(options[name]) for name in ("data", "input", "dataset") if options.get(name)), ""),
        "made from": "" if parent in (None, "scratch") else str(parent),
        "training steps": f"{checkpoint['step']:,}" if checkpoint.get("step") else "",
        "training tokens": f"{checkpoint['tokens']:,}" if checkpoint.get("tokens") else "",
        **evaluation(checkpoint, (checkpoint.get("history") or [{}])[-1]),
        "test accuracy": f"{checkpoint['test']['accuracy']:.4f}" if checkpoint.get("test") else "",
        "written": checkpoint.get("created", "")[:10],
    }
    return {name: value for name, value in metadata.items() if value}


def evaluation(metadata: Mapping[str, Any], entry: Mapping[str, float]) -> dict[str, str]:
    """Returns an entry of the history as text to show, name by name: loss in nats per token, perplexity, bits per byte.
    `metadata` is a checkpoint, or what it will store beside its weights."""
    loss, bits_per_byte = entry.get("val_loss"), entry.get("bits_per_byte")
    if loss is None:
        return {}
    shown = {loss_name(metadata): f"{loss:.4f}"}
    if metadata["kind"] != "classifier":
        shown["perplexity"] = f"{math.exp(min(loss, 700)):,.2f}"
    return shown if bits_per_byte is None else {**shown, "bits per byte": f"{bits_per_byte:.3f}"}


def loss_name(metadata: Mapping[str, Any]) -> str:
    """Returns the name of a checkpoint's validation loss: with few conversations, none are held out."""
    return "validation loss" if metadata.get("is_held_out", True) else "loss on its training conversations"


def n_parameters(checkpoint: Checkpoint) -> int:
    """Returns the number of parameters of a checkpoint."""
    return sum(tensor.numel() for tensor in checkpoint["model"].values())


def introduction(checkpoint: Checkpoint) -> str:
    """Returns one sentence about a checkpoint: its size and task, and if known its data and its loss."""
    known, n = facts(checkpoint), n_parameters(checkpoint)
    size = f"{n / 1e6:,.1f} million" if n >= 1e6 else f"{n:,}"
    text = f"A GPT-2 with {size} parameters that {known['kind']}"
    if "data" in known:
        text += f", trained on {known['data']}"
    if loss_name(checkpoint) in known:
        text += f", with a {loss_name(checkpoint)} of {checkpoint['history'][-1]['val_loss']:.2f}"
    return text + "."


def model_card(checkpoint: Checkpoint, name: str) -> str:
    """Returns the model card, in Markdown, of a checkpoint (base, sft or classifier) that is exported under a name."""
    kind, options = checkpoint["kind"], checkpoint.get("train_config") or {}
    rows = {**facts(checkpoint), **{key.replace("_", " "): options[key] for key in _CARD_OPTIONS if key in options}}
    task = "text-classification" if kind == "classifier" else "text-generation"
    use = "```python\nfrom transformers import pipeline\n" + _USE[kind].format(name=name)
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags: [gpt2]\n---\n\n"
        f"# {name}\n\n{introduction(checkpoint)}\n\n{markdown_table(['', ''], rows.items())}\n\n## Use\n\n{use}"
    )


def markdown_table(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns a table in Markdown; each cell is cut to 300 characters."""

    def line(cells: Sequence[object]) -> str:
        texts = [shorten(printable(str(cell)), 300).replace("\\", "\\\\").replace("|", "\\|") for cell in cells]
        return f"| {' | '.join(texts).replace('<', '&lt;')} |"

    return "\n".join([line(heading), line(["---"] * len(heading)), *map(line, rows)])


def fine_tuning_command(name: object, n: int) -> str:
    """Returns the command that teaches chats to a model of `n` parameters. Small ones need the rates of the demo."""
    out = f"{FOLDER}/{Path(str(name)).stem}-chat.pt"
    preset = ["--preset", "demo"] if n < 20_000_000 else []
    return shlex.join(["python", "train_sft.py", *preset, "--model", str(name), "--out", out])


def newest(wanted: Wanted) -> str:
    """Returns the newest checkpoint under `checkpoints/` that is what is wanted, and names it on standard error.

    Snapshots and damaged files do not count. Raises UserError, which says what there is instead, and how to get one.
    """
    others, command = [], {"classifier": "python train_classifier.py", "chat model": "make demo"}.get(wanted, _MAKE_ONE)
    for file, checkpoint, _ in _checkpoints():
        kind = checkpoint["kind"] if checkpoint else "damaged"
        if file.path.parent.name == "snapshots":
            continue
        if kind in _FITTING[wanted]:
            print(printable(f"model: {file.path}, the newest {wanted} in {FOLDER}/"), file=sys.stderr)
            return str(file.path)
        if checkpoint and kind == "base" and command == "make demo":
            command = fine_tuning_command(file.path, n_parameters(checkpoint))
        others.append(f"{file.path} ({_KINDS.get(kind, kind)})")
    there_is = f", only {', '.join(others[:5])}" if others else ""
    raise UserError(f"no {wanted} in {FOLDER}/{there_is}: make one with {command}, or name one with --model")


def table() -> str:
    """Returns a line for each checkpoint under `checkpoints/`, the newest first: name, kind, parameters, the validation
    loss of its weights, data, time, and the model that it was fine-tuned from. A damaged file has a line that says why.
    """
    rows = [("name", "kind", "parameters", "loss", "data", "written", "made from")]
    for file, checkpoint, problem in _checkpoints():
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.modified))
        if checkpoint is None:
            rows.append((str(file.path), "damaged", "", "", "", written, problem))
            continue
        known = facts(checkpoint)
        loss = known.get(loss_name(checkpoint), "-") + ("" if checkpoint.get("is_held_out", True) else " (training)")
        origin = known.get("data", "-"), written, known.get("made from", "-")
        rows.append((str(file.path), _KINDS[checkpoint["kind"]], known["parameters"], loss, *origin))
    if len(rows) == 1:
        return f"no model in {FOLDER}/: make one with {_MAKE_ONE}"
    columns = [[f"{cell:<{max(map(len, column))}}" for cell in column] for column in zip(*rows, strict=True)]
    return "\n".join(printable("  ".join(cells)).rstrip() for cells in zip(*columns, strict=True))


def _checkpoints() -> Iterator[tuple[CheckpointFile, Checkpoint | None, str]]:
    """Yields each checkpoint file, the newest first, with its content, or with None and what is wrong with it."""
    for file in checkpoint_files():
        try:
            yield file, load_file(file.path), ""
        except UserError as error:
            yield file, None, str(error)
