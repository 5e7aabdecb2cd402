"""Our checkpoints: one dict of plain tensors, numbers, strings, lists and dicts in a `.pt` file.

Files are read with `weights_only=True`, so nothing in them is executed.
"""

import contextlib
import dataclasses
import zipfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gpt_config import GPTConfig
from model import GPT
from system.device import Probe, autocast, choose_device, choose_dtype
from system.errors import UserError, is_out_of_memory
from system.files import atomic_write
from text import tokenizer as tokenizers

FORMAT_VERSION = 1
KINDS = ("base", "sft", "classifier", "lora")
TEMPLATES = (None, "chat", "alpaca")
RESUME_KEYS = ("optimizer", "scaler", "bad_evaluations", "recent_losses")
"""Keys that only a checkpoint for `--resume` has."""

Checkpoint = dict[str, Any]
"""A checkpoint in memory. `kind` is "base", "sft", "classifier" or "lora", `model` maps the names of parameters to
float32 tensors, `config` is the GPTConfig, and `tokenizer` is the text that `text.tokenizer.from_spec` reads. Optional:
`template`, `labels` (of a classifier), `lora` (of an adapter), `step`, `tokens`, `history`, `train_config`, `created`,
`data` (fingerprints of the training and validation data), `is_held_out` (whether these differ), `min_confidence` (below
it, an answer is a guess), `prompts` (short texts like its training data), and in a `.last.pt` file the state of the
optimizer."""


def save(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint atomically, and adds `format_version` and `created` (UTC, ISO 8601). Raises OSError."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    config = dataclasses.asdict(checkpoint["config"])
    stored = {**checkpoint, "format_version": FORMAT_VERSION, "created": created, "config": config}
    with atomic_write(path) as file:
        try:
            torch.save(stored, file)
        except RuntimeError as error:  # hides the OSError of a full disk
            raise error.__context__ or error from None


def read_contents(path: str | Path, verify: bool = False) -> dict[str, Any]:
    """Returns the dict that `torch.save` wrote to a file, ours or nanoGPT's, on the CPU and not yet checked.

    `verify` compares the checksums first. Raises UserError if the file is damaged or holds anything but a dict.
    """
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        damaged = zipfile.ZipFile(path).testzip() if verify else None
    except Exception as error:  # damaged and foreign files make torch and zipfile raise many types
        if is_out_of_memory(error):
            raise
        raise _not_a_checkpoint(path, type(error).__name__) from None  # torch's text advises to execute the file
    if damaged or not isinstance(contents, dict):
        raise _not_a_checkpoint(path, f"checksum of {damaged}" if damaged else f"a {type(contents).__name__}")
    return contents


def from_contents(contents: dict[str, Any], path: str | Path) -> Checkpoint:
    """Returns the checkpoint in the contents of our file `path`.

    Raises UserError if the contents are from a newer version of this project, or are no valid checkpoint.
    """
    try:
        config = dict(contents["config"])
        if config.pop("value_embeddings", False):
            raise UserError(f"{path} has value embeddings, which version 0.2 was the last to read: use that version")
        unknown = sorted(map(str, config.keys() - {field.name for field in dataclasses.fields(GPTConfig)}))
        if unknown or contents.get("format_version", 0) > FORMAT_VERSION:
            because = f" (its config has the unknown field {unknown[0]!r})" if unknown else ""
            raise UserError(f"{path} is from a newer version of this project{because}: update the project")
        return checked({**contents, "config": GPTConfig(**config)}, path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _not_a_checkpoint(path, f"{type(error).__name__}: {error}") from None


def _not_a_checkpoint(path: str | Path, problem: str) -> UserError:
    return UserError(f"{path} is not a checkpoint of this project, or damaged ({problem}): choose another file")


def checked(checkpoint: Checkpoint, path: str | Path) -> Checkpoint:
    """Returns a checkpoint with float32 tensors, and without a tied head and stored attention masks.

    Raises UserError, with the file or folder `path`, unless the weights fit the config and the tokenizer is readable;
    ValueError, KeyError, TypeError or AttributeError if other parts are missing or do not fit each other.
    """
    kind, config = checkpoint["kind"], checkpoint["config"]
    left_out = (".attn.bias", ".attn.masked_bias", *(["lm_head.weight"] if config.tie_weights else []))
    weights = {name: tensor for name, tensor in checkpoint["model"].items() if not name.endswith(left_out)}
    labels, template = checkpoint.get("labels", []), checkpoint.get("template")
    if kind not in KINDS or template not in TEMPLATES:
        raise ValueError(f"kind {kind!r} with template {template!r}")
    if (kind == "classifier") != (config.n_classes > 0) or len(set(labels)) != config.n_classes:
        raise ValueError(f"kind {kind!r} with {config.n_classes} classes and the labels {labels!r}")
    if not 0 <= checkpoint.get("min_confidence", 0) <= 1:
        raise ValueError(f"min_confidence {checkpoint['min_confidence']!r}")
    if kind == "lora" and not {"base", "base_sha256", "rank", "alpha"} <= checkpoint["lora"].keys():
        raise ValueError("the adapter does not name its base model")
    try:
        tokenizer = tokenizer_of(checkpoint)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    least = tokenizer.n_tokens if template == "chat" or kind == "lora" else tokenizer.end_of_text + 1
    if not least <= config.n_tokens <= tokenizer.n_tokens:
        raise ValueError(f"its n_tokens is {config.n_tokens:,}, its tokenizer has {tokenizer.n_tokens:,} tokens")
    if kind != "lora":  # whoever merges an adapter checks its tensors
        require_fit(weights, pack(empty_model(config), kind=kind)["model"], path)
    weights = {name: tensor.detach().to(torch.float32).contiguous() for name, tensor in weights.items()}
    return {**checkpoint, "model": weights}


def require_fit(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises UserError unless `weights` are tensors of floats that have the names and shapes of `expected`."""
    problems = [f"it has no tensor {name}" for name in weights if name not in expected]
    for name, tensor in expected.items():
        found = weights.get(name)
        if not isinstance(found, Tensor):
            problems.append(f"{name} is missing")
        elif found.shape != tensor.shape or not found.is_floating_point():
            problems.append(f"{name} is {list(found.shape)} of {found.dtype}, not {list(tensor.shape)} of floats")
    if problems:
        raise UserError(f"{path} is damaged: its weights do not fit its config ({problems[0]}); choose another file")


def pack(model: GPT, *, kind: str, **metadata: object) -> Checkpoint:
    """Returns the checkpoint to save for a model: its weights, its config and the given metadata.

    A tied head is left out. For the kind "lora", the weights are the adapter's alone: the parameters that train.
    """
    if kind == "lora":
        weights = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    else:
        weights = model.state_dict()
        if model.config.tie_weights:
            del weights["lm_head.weight"]
    return {"kind": kind, "model": weights, "config": model.config, **metadata}


def build(checkpoint: Checkpoint) -> GPT:
    """Builds the model of a loaded checkpoint on the CPU, in evaluation mode.

    Its weights are pages of the file: they are read at their first use, and copied when written to.
    """
    config, weights = checkpoint["config"], checkpoint["model"]
    model = empty_model(config)
    if config.tie_weights:
        weights = {**weights, "lm_head.weight": weights["wte.weight"]}
    model.load_state_dict(weights, assign=True)
    if config.tie_weights:
        model.lm_head.weight = model.wte.weight
    return model.eval()


def place(
    checkpoint: Checkpoint, device: str, dtype: str, check: bool = True, convert: bool = False
) -> tuple[GPT, torch.dtype]:
    """Builds a model on the named device; returns it and the precision to compute in.

    `convert` converts the weights to that precision. With `check`, a GPU computes a few tokens beside the CPU first. If
    they disagree, an "auto" device becomes the CPU. Raises UserError for another device then, or if there is none.
    """
    chosen = choose_device(device)
    precision, model = choose_dtype(dtype, chosen), build(checkpoint)
    expected = Probe.of(model, contextlib.nullcontext()) if check and chosen.type != "cpu" else None
    model.to(chosen, precision if convert else None)
    if expected:
        context = contextlib.nullcontext() if convert else autocast(chosen, precision)
        if not Probe.of(model, context).agrees(chosen, precision, expected, is_chosen=device != "auto"):
            return place(checkpoint, "cpu", dtype, convert=convert)
    return model, precision


def empty_model(config: GPTConfig) -> GPT:
    """Returns a model whose parameters have names and shapes, but no memory and no values."""
    with torch.device("meta"), _SkipInitialization():
        return GPT(config)


class _SkipInitialization(TorchFunctionMode):
    """Leaves out `torch.nn.init`: on the device "meta", random numbers import `torch._dynamo`, which takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return None  # nothing reads the result: the functions of `init` change their tensor in place
        return func(*args, **(kwargs or {}))


def grow_vocabulary(checkpoint: Checkpoint) -> Checkpoint:
    """Returns a checkpoint with an embedding row for each token of its tokenizer, the role tokens included.

    OpenAI's GPT-2 grows from 50,257 to 50,304 rows. New rows are the mean of the old ones (Hewitt 2021); the logits of
    the old tokens do not change.
    """
    config, tokenizer = checkpoint["config"], tokenizer_of(checkpoint)
    n = config.n_tokens
    if n >= tokenizer.n_tokens:
        return checkpoint
    vocab_size = max(tokenizer.padded_vocab_size, config.vocab_size)
    weights = {**checkpoint["model"]}
    for name in ["wte.weight"] if config.tie_weights or config.n_classes else ["wte.weight", "lm_head.weight"]:
        rows = weights[name][:n]
        mean = rows.mean(dim=0, keepdim=True)  # (1, C)
        weights[name] = torch.cat((rows, mean.expand(vocab_size - n, -1)))  # (vocab_size, C)
    config = dataclasses.replace(config, vocab_size=vocab_size, n_tokens=tokenizer.n_tokens)
    return {**checkpoint, "model": weights, "config": config}


def with_class_head(checkpoint: Checkpoint, n_classes: int) -> Checkpoint:
    """Returns a language model's checkpoint with a random head over `n_classes` instead of the head over tokens."""
    config = dataclasses.replace(checkpoint["config"], n_classes=n_classes, tie_weights=False)
    head = torch.normal(0.0, 0.02, (n_classes, config.n_embd))
    return {**checkpoint, "config": config, "model": {**checkpoint["model"], "lm_head.weight": head}}


def tokenizer_of(checkpoint: Checkpoint) -> tokenizers.Tokenizer:
    """Returns the tokenizer that a checkpoint was trained with."""
    return tokenizers.from_spec(checkpoint["tokenizer"])
