"""Checks a checkpoint before anything is built of it: somebody else may have written the file.

The names and shapes of the tensors follow from the config by a formula, so a config of a billion layers costs nothing.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model import GPTConfig
from system.errors import UserError
from system.untrusted import MAX_INTEGER, brief, is_integer, is_number, is_text
from text import tokenizer as tokenizers

if TYPE_CHECKING:
    from pathlib import Path

KINDS = ("base", "sft", "classifier", "lora")
TEMPLATES = (None, "chat", "alpaca")
SWITCHES = tuple(field.name for field in dataclasses.fields(GPTConfig) if isinstance(field.default, bool))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_PROMPTS, MAX_PROMPT_LENGTH = 6, 80
"""Prompts in a checkpoint, and characters of each."""

_MAX_SIZE = 2**31 - 1
_LOWEST_AND_HIGHEST = {
    "block_size": (1, _MAX_SIZE),
    "vocab_size": (1, _MAX_SIZE),
    "n_tokens": (1, _MAX_SIZE),
    "n_layer": (1, 10_000),
    "n_head": (1, _MAX_SIZE),
    "n_embd": (1, _MAX_SIZE),
    "n_classes": (0, _MAX_SIZE),
}
_MAX_PATH = 4096


def require_valid(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Raises UserError, naming the file `path` and what is wrong, unless a checkpoint is safe and complete.

    Checks `kind`, `config`, `model`, `tokenizer` and, if present, all metadata that is read later. `config` is a
    GPTConfig whose fields may have any type; a tied head must not be among the tensors of `model`.
    """
    kind, config = checkpoint["kind"], checkpoint["config"]
    _require(isinstance(kind, str) and kind in KINDS, path, f"its kind is {brief(kind)}")
    _require_config(config, path)
    _require_metadata(checkpoint, path)
    if kind == "lora":
        _require_lora(checkpoint.get("lora"), path)
    weights = checkpoint["model"]
    _require(isinstance(weights, dict), path, f"its weights are {brief(weights)}, not a dict")
    misfit = "its adapter does not fit its config" if kind == "lora" else "its weights do not fit its config"
    n_layer = config.n_layer
    _require(n_layer <= len(weights), path, f"{misfit} ({n_layer:,} layers, but only {len(weights):,} tensors)")
    shapes = adapter_shapes(config, checkpoint["lora"]["rank"]) if kind == "lora" else weight_shapes(config)
    _require_tensors(weights, shapes, path, misfit)
    _require_tokenizer(checkpoint, path)


def weight_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of the tensors that a GPT of this config has, without a tied head."""
    C = config.n_embd
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (config.vocab_size, C)}
    if not config.rotary:
        shapes["wpe.weight"] = (config.block_size, C)
    norms = [f"h.{i}.{name}" for i in range(config.n_layer) for name in ("ln_1", "ln_2")] + ["ln_f"]
    shapes |= {f"{name}.weight": (C,) for name in norms}
    shapes |= {f"{name}.weight": shape for name, shape in _linear_shapes(config).items()}
    if config.bias:
        shapes |= {f"{name}.bias": (C,) for name in norms}
        shapes |= {f"{name}.bias": shape[:1] for name, shape in _linear_shapes(config).items()}
    if not config.tie_weights:
        shapes["lm_head.weight"] = (config.n_classes or config.vocab_size, C)
    return shapes


def adapter_shapes(config: GPTConfig, rank: int) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of the tensors of a LoRA adapter of this rank for a GPT of this config."""
    shapes: dict[str, tuple[int, ...]] = {"role_rows": (2, config.n_embd)}
    for name, (n_out, n_in) in _linear_shapes(config).items():
        shapes |= {f"{name}.lora_A": (rank, n_in), f"{name}.lora_B": (n_out, rank)}
    return shapes


def is_plain_tensor(value: object, shape: Collection[int]) -> bool:
    """Whether a value is a dense tensor of floats on the CPU with this shape, and its memory is all there."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_nested
        and value.device.type == "cpu"
        and value.dtype in DTYPES
        and tuple(value.shape) == tuple(shape)
        and value.nbytes <= value.untyped_storage().nbytes()  # not one number expanded to terabytes
    )


def is_entry(entry: object) -> bool:
    """Whether a value is an entry of the history or of a log: `step` and numbers, and perhaps beside a validation loss
    examples of what the model writes."""
    if not isinstance(entry, dict) or not is_integer(entry.get("step")):
        return False
    examples = entry.get("examples", [])
    return (
        all(is_number(value) for name, value in entry.items() if name != "examples")
        and all(map(is_text, entry))
        and isinstance(examples, list)
        and all(map(_is_example, examples))
        and ("examples" not in entry or "val_loss" in entry)
    )


def _linear_shapes(config: GPTConfig) -> dict[str, tuple[int, int]]:
    """Returns the names and the shapes (out, in) of the linear layers inside the blocks."""
    C = config.n_embd
    layers = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    return {f"h.{i}.{name}": shape for i in range(config.n_layer) for name, shape in layers.items()}


def _require(condition: bool, path: str | Path, problem: str) -> None:
    if not condition:
        raise UserError(f"{path} is damaged: {problem}; restore the file from a copy, or choose another")


def _require_config(config: GPTConfig, path: str | Path) -> None:
    for name, (low, high) in _LOWEST_AND_HIGHEST.items():
        value = getattr(config, name)
        _require(
            is_integer(value, low, high), path, f"its {name} is {brief(value)}, not an integer from {low} to {high:,}"
        )
    for name in SWITCHES:
        value = getattr(config, name)
        _require(isinstance(value, bool), path, f"its {name} is {brief(value)}, neither True nor False")
    dropout = config.dropout
    _require(
        is_number(dropout) and 0 <= dropout < 1,
        path,
        f"its dropout is {brief(dropout)}, not a number from 0 to below 1",
    )
    _require(
        config.n_embd % config.n_head == 0,
        path,
        f"its n_embd {config.n_embd:,} is not a multiple of its n_head {config.n_head:,}",
    )
    _require(
        not config.rotary or config.n_embd // config.n_head % 2 == 0,
        path,
        f"its heads are {config.n_embd // config.n_head:,} wide, which rotary positions cannot halve",
    )
    _require(
        config.n_tokens <= config.vocab_size,
        path,
        f"its n_tokens {config.n_tokens:,} is more than its vocab_size {config.vocab_size:,}",
    )
    _require(not (config.n_classes and config.tie_weights), path, "its head is for classes and tied to the embedding")


def _require_metadata(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    template = checkpoint.get("template")
    is_template = template is None or isinstance(template, str)
    _require(is_template and template in TEMPLATES, path, f"its template is {brief(template)}")
    for name in ("step", "tokens"):
        value = checkpoint.get(name, 0)
        _require(is_integer(value), path, f"its {name} is {brief(value)}, not an integer from 0")
    is_held_out = checkpoint.get("is_held_out", True)
    _require(isinstance(is_held_out, bool), path, f"its is_held_out is {brief(is_held_out)}, not true or false")
    created = checkpoint.get("created", "")
    _require(is_text(created), path, f"its created is {brief(created)}, not a text")
    prompts = checkpoint.get("prompts", [])
    are_prompts = isinstance(prompts, list) and len(prompts) <= MAX_PROMPTS and all(map(_is_prompt, prompts))
    _require(are_prompts, path, "its prompts are not a list of a few short texts")
    _require_labels(checkpoint, path)
    history = checkpoint.get("history", [])
    is_history = isinstance(history, list) and all(is_entry(entry) and "val_loss" in entry for entry in history)
    _require(is_history, path, "its history is not a list of evaluations")
    train_config = checkpoint.get("train_config", {})
    is_config = isinstance(train_config, dict) and all(map(_is_option, train_config.items()))
    _require(is_config, path, "its train_config is not a dict of options")


def _require_labels(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    labels, n_classes = checkpoint.get("labels", []), checkpoint["config"].n_classes
    is_classifier = checkpoint["kind"] == "classifier"
    _require(is_classifier == bool(n_classes), path, f"its kind is {checkpoint['kind']}, its n_classes {n_classes:,}")
    _require(isinstance(labels, list) and all(map(is_text, labels)), path, "its labels are not a list of texts")
    is_one_each = len(labels) == len(set(labels)) == n_classes
    _require(is_one_each, path, f"it has {len(set(labels)):,} labels for {n_classes:,} classes")


def _is_example(example: object) -> bool:
    return (
        isinstance(example, dict)
        and example.keys() == {"input", "expected", "output"}
        and all(map(is_text, example.values()))
    )


def _is_prompt(prompt: object) -> bool:
    return isinstance(prompt, str) and is_text(prompt) and len(prompt) <= MAX_PROMPT_LENGTH


def _is_option(option: tuple[object, object]) -> bool:
    name, value = option
    values = value if isinstance(value, list) else [value]
    return is_text(name) and all(v is None or isinstance(v, bool) or is_number(v) or is_text(v) for v in values)


def _require_lora(lora: Any, path: str | Path) -> None:
    base = lora.get("base") if isinstance(lora, dict) else None
    is_path = isinstance(base, str) and 0 < len(base) <= _MAX_PATH and _can_name_file(base)
    _require(is_path, path, "it does not name its base model")
    rank, alpha, sha256 = lora.get("rank"), lora.get("alpha"), lora.get("base_sha256")
    _require(is_integer(rank, 1, _MAX_SIZE), path, f"the rank of its adapter is {brief(rank)}")
    _require(is_number(alpha) and math.isfinite(alpha), path, f"the alpha of its adapter is {brief(alpha)}")
    is_sum = isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) is not None
    _require(is_sum, path, f"the SHA-256 sum of its base model is {brief(sha256)}")


def _can_name_file(name: str) -> bool:
    """Whether a text can be the path of a file, whose bytes need not be UTF-8."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _require_tensors(
    weights: dict[Any, Any], shapes: Mapping[str, tuple[int, ...]], path: str | Path, misfit: str
) -> None:
    for name, shape in shapes.items():
        _require(name in weights, path, f"{misfit} ({name} is missing)")
        tensor = weights[name]
        if not is_plain_tensor(tensor, shape):
            found = f"a tensor {list(tensor.shape)} of {tensor.dtype}" if isinstance(tensor, Tensor) else brief(tensor)
            _require(False, path, f"{misfit} ({name} is {found}, not a dense tensor {list(shape)} of floats)")
    unexpected = [brief(name) for name in weights if name not in shapes]
    _require(not unexpected, path, f"{misfit} (no {', '.join(unexpected[:1])} belongs to it)")
    n_bytes = sum(tensor.nbytes for tensor in weights.values())
    _require(n_bytes <= _n_stored_bytes(weights.values()), path, f"{misfit} (several tensors share their memory)")


def _n_stored_bytes(tensors: Collection[Tensor]) -> int:
    """Returns the size of the memory that tensors occupy together; memory that several of them share counts once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    total = end = 0
    for start, stop in sorted((storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def _require_tokenizer(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Requires a tokenizer that gives the model no id without an embedding, and gets no id from it without a text."""
    spec, n_tokens = checkpoint["tokenizer"], checkpoint["config"].n_tokens
    _require(is_text(spec), path, f"its tokenizer is {brief(spec)}, not a text")
    try:
        tokenizer = tokenizers.from_spec(spec)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    least = tokenizer.end_of_text + 1
    if checkpoint.get("template") == "chat" or checkpoint["kind"] == "lora":
        least = tokenizer.n_tokens
    _require(
        least <= n_tokens <= tokenizer.n_tokens,
        path,
        f"its n_tokens is {n_tokens:,}, its tokenizer has {tokenizer.n_tokens:,} tokens",
    )


def is_progress(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint holds all the numbers from which a training run resumes, except its optimizers' state."""
    losses, scaler = checkpoint.get("recent_losses"), checkpoint.get("scaler")
    return (
        all(is_integer(checkpoint.get(name), 0, MAX_INTEGER) for name in ("step", "tokens", "bad_evaluations"))
        and is_number(checkpoint.get("best_val_loss"))
        and isinstance(checkpoint.get("history"), list)
        and isinstance(losses, list)
        and all(map(is_number, losses))
        and isinstance(scaler, dict)
        and all(map(is_text, scaler))
        and all(is_number(value) and math.isfinite(value) for value in scaler.values())
    )
