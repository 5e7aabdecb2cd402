"""Weights in and out: one dict of plain tensors, numbers, strings, lists and dicts in a `.pt` file.

Nothing in a file is ever executed: everything is read with `weights_only=True`.
"""

import dataclasses
import hashlib
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import torch

from model import GPT, GPTConfig
from system.errors import UserError
from system.files import atomic_write
from text import tokenizer as tokenizers
from weights import huggingface, lora, nanogpt

FORMAT_VERSION = 1


def save(path: str | Path, checkpoint: dict) -> None:
    """Writes a checkpoint (of `pack` or `load`) atomically, with `format_version` and `created` (UTC, ISO 8601) added.

    Raises UserError where the disk is full or the folder cannot be written; what was at `path` is as it was.
    """
    facts = {
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": dataclasses.asdict(checkpoint["config"]),
    }
    try:
        with atomic_write(path) as file:
            torch.save({**checkpoint, **facts}, file)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides what went wrong
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write {path}: {cause.strerror}; what was there is as it was") from None


def load(path: str | Path, verify: bool = False, kinds: tuple[str, ...] = ("base", "sft")) -> dict:
    """Reads a checkpoint onto the CPU, its tensors mapped from the file; `verify` compares the checksums first.

    `path` may also name a model of the Hugging Face Hub ("gpt2"), a folder in its format, or nanoGPT's `ckpt.pt`.
    `kinds` are those wanted; an adapter, of kind "lora", becomes the whole model unless it is wanted itself. Raises
    UserError where the file is missing, damaged, of another kind, no checkpoint of this project, or from a newer
    version.
    """
    path = Path(path)
    if not path.is_file():
        if folder := huggingface.find_folder(path):
            return _of_a_kind(huggingface.from_folder(folder), path, kinds)
        raise UserError(f"no checkpoint {path}: train one with train.py, or name one with --model")
    try:
        if verify and (damaged := zipfile.ZipFile(path).testzip()):
            raise UserError(f"{path} is damaged (checksum of {damaged})")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if isinstance(checkpoint, dict) and "model_args" in checkpoint:
            return _of_a_kind(nanogpt.from_nanogpt(checkpoint, path), path, kinds)
        config = GPTConfig(**checkpoint["config"])
        checkpoint["model"], checkpoint["tokenizer"], checkpoint["kind"]  # noqa: B018
    except UserError:
        raise
    except Exception as error:  # whatever a damaged or foreign file makes the readers raise
        newer = isinstance(error, TypeError) and "unexpected keyword" in str(error)
        what = "is from a newer version of this project" if newer else "is not a checkpoint of this project, or damaged"
        raise UserError(f"{path} {what} ({type(error).__name__})") from None
    if checkpoint.get("format_version", 0) > FORMAT_VERSION:
        raise UserError(f"{path} is from a newer version of this project: update it")
    checkpoint["config"] = config
    if checkpoint["kind"] == "lora" and "lora" not in kinds:
        checkpoint = _with_base(checkpoint, path)
    return _of_a_kind(checkpoint, path, kinds)


def _of_a_kind(checkpoint, path, kinds):
    if checkpoint["kind"] not in kinds:
        if checkpoint["kind"] == "classifier":
            raise UserError(f"{path} is a classifier, it writes no text: ask it with classify.py")
        if kinds == ("classifier",):
            raise UserError(f"{path} is a language model, not a classifier: train one with train_classifier.py")
        raise UserError(f"{path} is of the kind {checkpoint['kind']!r}, wanted {' or '.join(kinds)}")
    return checkpoint


def load_base(adapter: dict, path: str | Path) -> dict:
    """Returns the checkpoint that an adapter, read from `path`, was trained on, its vocabulary grown as it was then.

    It is sought where it was, then beside the adapter. Raises UserError where it is missing or has changed.
    """
    try:
        name, sha256 = adapter["lora"]["base"], adapter["lora"]["base_sha256"]
    except (KeyError, TypeError):
        raise UserError(f"{path} is damaged: it does not say what it adapts") from None
    found = [base for base in (Path(name), Path(path).parent / Path(name).name) if base.is_file()]
    found = found or [Path(name)] * (huggingface.find_folder(name) is not None)
    if base := next((base for base in found if sha256_of(base) == sha256), None):
        return grow_vocabulary(load(base))
    what = f"{found[0]} has changed since" if found else "it is missing"
    raise UserError(f"{path} adapts the model {name} (SHA-256 {sha256[:12]}…), but {what}: put that file back")


def sha256_of(path: str | Path) -> str:
    """Returns the SHA-256 sum of a checkpoint's file, in hexadecimal; of several files, that of their sums."""
    folder = None if Path(path).is_file() else huggingface.find_folder(path)
    sums = []
    for part in huggingface.weight_files(folder) if folder else [path]:
        with open(part, "rb") as file:
            sums.append(hashlib.file_digest(file, "sha256").hexdigest())
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def _with_base(adapter, path):
    base = load_base(adapter, path)
    try:
        scale = adapter["lora"]["alpha"] / adapter["lora"]["rank"]
        weights = lora.merge(base["model"], adapter["model"], scale, tokenizer(adapter).user)
    except (KeyError, RuntimeError, TypeError):
        raise UserError(f"{path} is damaged: it does not fit the model that it adapts") from None
    return {name: value for name, value in adapter.items() if name != "lora"} | {"kind": "sft", "model": weights}


def grow_vocabulary(checkpoint: dict) -> dict:
    """Returns a checkpoint with a row for each token of its tokenizer, the role tokens included.

    OpenAI's GPT-2 has 50,257 rows and gets 50,304. New rows are the mean of the old (Hewitt 2021); no logit of an
    existing token changes.
    """
    config, known = checkpoint["config"], tokenizer(checkpoint)
    if config.n_tokens >= known.n_tokens:
        return checkpoint
    n = config.n_tokens
    vocab_size = max(known.padded_vocab_size, config.vocab_size)

    def grown(rows):
        return torch.cat((rows[:n], rows[:n].mean(dim=0, keepdim=True).expand(vocab_size - n, -1)))

    weights = {
        name: grown(tensor) if name == "wte.weight" or (name == "lm_head.weight" and not config.n_classes) else tensor
        for name, tensor in checkpoint["model"].items()
    }
    config = dataclasses.replace(config, vocab_size=vocab_size, n_tokens=known.n_tokens)
    return {**checkpoint, "model": weights, "config": config}


def build(checkpoint: dict, path: str | Path, device: torch.device | str = "cpu") -> GPT:
    """Builds the model of a loaded checkpoint, in evaluation mode. Raises UserError where the weights misfit.

    On the CPU its weights are the file's pages, read when they are first used, and copied where they are written to.
    """
    with torch.device("meta"):
        model = GPT(checkpoint["config"])
    try:
        weights = checkpoint["model"]
        if checkpoint["config"].tie_weights:
            weights = {**weights, "lm_head.weight": weights["wte.weight"]}
        model.load_state_dict(weights, assign=True)
    except (RuntimeError, KeyError):
        raise UserError(f"{path} is damaged: its weights do not fit its config") from None
    if checkpoint["config"].tie_weights:
        model.lm_head.weight = model.wte.weight
    return model.eval().to(device)


def with_class_head(checkpoint: dict, n_classes: int) -> dict:
    """Returns a language model's checkpoint with a random head over `n_classes` in place of that over tokens."""
    config = dataclasses.replace(checkpoint["config"], n_classes=n_classes, tie_weights=False)
    head = torch.normal(0.0, 0.02, (n_classes, config.n_embd))
    return {**checkpoint, "config": config, "model": {**checkpoint["model"], "lm_head.weight": head}}


def restore_adapter(model: GPT, adapter: dict, path: str | Path) -> None:
    """Puts an adapter, read from `path`, into a model that has one. Raises UserError where it does not fit."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        if adapter["model"].keys() != trained:
            raise RuntimeError
        model.load_state_dict(adapter["model"], strict=False)
    except RuntimeError:
        raise UserError(f"{path} is damaged: its adapter does not fit its model") from None


def facts(checkpoint: dict) -> dict[str, str]:
    """Returns what is known of a checkpoint, for people; what is not known is left out."""
    config, loss = checkpoint["config"], (checkpoint.get("history") or [{}])[-1].get("val_loss")
    kinds = {"base": "completes text", "sft": "answers", "classifier": "tells texts apart"}
    known = {
        "kind": kinds[checkpoint["kind"]],
        "labels": ", ".join(checkpoint.get("labels", [])),
        "parameters": f"{sum(tensor.numel() for tensor in checkpoint['model'].values()):,}",
        "shape": f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide",
        "context": f"{config.block_size:,} tokens",
        "vocabulary": f"{config.n_tokens:,} tokens, " + ("GPT-2's" if checkpoint["tokenizer"] == "gpt2" else "its own"),
        "training steps": f"{checkpoint['step']:,}" if checkpoint.get("step") else "",
        "training tokens": f"{checkpoint['tokens']:,}" if checkpoint.get("tokens") else "",
        "validation loss": f"{loss:.4f}" if loss is not None else "",
        "written": checkpoint.get("created", "")[:10],
    }
    return {name: value for name, value in known.items() if value}


def describe(checkpoint: dict) -> str:
    """Returns the main facts of a checkpoint in one line."""
    known = facts(checkpoint)
    return ", ".join(
        f"{name} {known[name]}" if name != "kind" else known[name]
        for name in ("kind", "parameters", "training steps", "validation loss")
        if name in known
    )


def tokenizer(checkpoint: dict) -> tokenizers.Tokenizer:
    """Returns the tokenizer that a checkpoint was trained with."""
    return tokenizers.from_spec(checkpoint["tokenizer"])


def pack(model: GPT, *, kind: str, **facts: object) -> dict:
    """Returns the dict to save for a model: its weights (the tied head once), its config and the given facts.

    Of kind "lora" the weights are the adapter alone: what trains.
    """
    if kind == "lora":
        weights = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    else:
        weights = model.state_dict()
        if model.config.tie_weights:
            del weights["lm_head.weight"]
    return {"kind": kind, "model": weights, "config": model.config, **facts}
