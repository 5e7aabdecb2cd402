"""Our checkpoints: one dict of plain tensors, numbers, strings, lists and dicts in a `.pt` file.

Files are always read with `weights_only=True`, so that nothing in them is executed.
"""

import dataclasses
import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model import GPT, GPTConfig
from system.errors import UserError
from system.files import atomic_write
from system.untrusted import brief, is_integer, is_text
from text import tokenizer as tokenizers
from weights.validation import require_valid

FORMAT_VERSION = 1

_MAX_PICKLE_BYTES, _MAX_PICKLE_OPERATIONS = 2**25, 2**21
_PICKLED_NAMES = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage")
"""What the pickle of a checkpoint may refer to, ours or nanoGPT's: module and name."""

RESUME_KEYS = ("optimizer", "scaler", "bad_evaluations", "recent_losses")
"""What only a checkpoint for `--resume` holds."""

Checkpoint = dict[str, Any]
"""A checkpoint in memory. `kind` is "base", "sft", "classifier" or "lora", `model` maps the names of parameters to
float32 tensors, `config` is the GPTConfig, and `tokenizer` is the text that `text.tokenizer.from_spec` reads. Optional:
`template`, `labels` (of a classifier), `lora` (of an adapter), `step`, `tokens`, `history`, `train_config`, `created`,
`data` (fingerprints of the training and validation data), `is_held_out` (whether these differ), `prompts` (short texts
like those that it learned from), and in a `.last.pt` file the state of the optimizer."""


def save(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint atomically, and adds `format_version` and `created` (UTC, ISO 8601).

    Raises UserError if the disk is full or the folder is not writable; an older file at `path` then stays unchanged.
    """
    try:
        with atomic_write(path) as file:
            torch.save(as_stored(checkpoint), file)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides the OSError
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write {path}: {cause.strerror}; the old file, if any, is unchanged") from None


def as_stored(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns what a file holds of a checkpoint: plain types only, `format_version`, and `created` (UTC, ISO 8601)."""
    return {
        **checkpoint,
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": dataclasses.asdict(checkpoint["config"]),
    }


def without_run(checkpoint: Checkpoint) -> Checkpoint:
    """Returns a checkpoint without what only `--resume` reads, such as the state of the optimizer."""
    return {name: value for name, value in checkpoint.items() if name not in RESUME_KEYS}


def read(path: str | Path, verify: bool = False) -> Checkpoint:
    """Reads one of our files, of any kind, onto the CPU; the tensors are mapped from the file.

    `verify` compares the checksums first. Raises UserError if the file is damaged, foreign or from a newer version.
    """
    return from_contents(read_contents(path, verify), path)


def read_contents(path: str | Path, verify: bool = False) -> dict[str, Any]:
    """Returns the dict that `torch.save` wrote to a file, ours or nanoGPT's, on the CPU and not yet checked.

    `verify` compares the checksums first. Raises UserError if the file is damaged or holds anything but a dict.
    """
    try:
        _require_harmless(path)
        if verify:
            _verify_checksums(path)
        is_mapped = is_text(str(path))  # torch cannot map a file whose name is not UTF-8
        with open(path, "rb") as file:
            contents = torch.load(path if is_mapped else file, map_location="cpu", weights_only=True, mmap=is_mapped)
        if not isinstance(contents, dict):
            raise TypeError
        return contents
    except UserError:
        raise
    except Exception as error:  # damaged and foreign files make torch and zipfile raise many types
        raise _not_a_checkpoint(path, error) from None


def from_contents(contents: dict[str, Any], path: str | Path) -> Checkpoint:
    """Returns the checkpoint in the contents of our file `path`.

    Raises UserError if the contents are from a newer version of this project, or are no valid checkpoint.
    """
    try:
        config, version = contents["config"], contents.get("format_version", 0)
        unknown_fields = config.keys() - {field.name for field in dataclasses.fields(GPTConfig)}
        contents["model"], contents["tokenizer"], contents["kind"]  # noqa: B018
        if not is_integer(version):
            raise TypeError
    except (KeyError, TypeError, AttributeError) as error:
        raise _not_a_checkpoint(path, error) from None
    if unknown_fields or version > FORMAT_VERSION:
        fields = ", ".join(sorted(brief(name) for name in unknown_fields))
        because = f" (its config has the unknown field {fields})" if fields else ""
        raise UserError(f"{path} is from a newer version of this project{because}: update the project")
    return _checked({**contents, "config": GPTConfig(**config)}, path)


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


def from_state_dict(
    weights: Mapping[str, Tensor],
    config: GPTConfig,
    tokenizer: tokenizers.Tokenizer,
    path: str | Path,
    **metadata: object,
) -> Checkpoint:
    """Returns a checkpoint, of the kind "base" by default, for weights in the file or folder `path` that another
    program trained and that have our names.

    Stored attention masks and a tied head are left out; the rest becomes float32. Raises UserError if the weights do
    not fit the config.
    """
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    whole = {"kind": "base", "model": kept, "config": config, "tokenizer": tokenizer.spec, "template": None, **metadata}
    return _checked(whole, path)


def _checked(checkpoint: Checkpoint, path: str | Path) -> Checkpoint:
    """Returns a checkpoint with float32 tensors and without a tied head; raises UserError unless it is valid."""
    weights = checkpoint["model"]
    if checkpoint["config"].tie_weights is True and isinstance(weights, dict):
        weights = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    require_valid({**checkpoint, "model": weights}, path)
    weights = {name: tensor.detach().to(torch.float32).contiguous() for name, tensor in weights.items()}
    return {**checkpoint, "model": weights}


def build(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> GPT:
    """Builds the model of a loaded checkpoint, in evaluation mode. Loading has checked that the weights fit the config.

    On the CPU, the weights of a checkpoint from a file are pages of that file: they are read at their first use, and
    copied when they are written to.
    """
    config, weights = checkpoint["config"], checkpoint["model"]
    with torch.device("meta"), _SkipInitialization():
        model = GPT(config)
    if config.tie_weights:
        weights = {**weights, "lm_head.weight": weights["wte.weight"]}
    model.load_state_dict(weights, assign=True)
    if config.tie_weights:
        model.lm_head.weight = model.wte.weight
    return model.eval().to(device)


class _SkipInitialization(TorchFunctionMode):
    """Leaves out the functions of `torch.nn.init`, for weights that are about to be replaced.

    Otherwise random numbers on the device "meta" import `torch._dynamo`, which takes a second.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


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

    def grow(rows: Tensor) -> Tensor:
        mean = rows[:n].mean(dim=0, keepdim=True)  # (1, C)
        return torch.cat((rows[:n], mean.expand(vocab_size - n, -1)))  # (vocab_size, C)

    weights = {**checkpoint["model"]}
    for name in _vocabulary_matrices(checkpoint):
        weights[name] = grow(weights[name])
    config = dataclasses.replace(config, vocab_size=vocab_size, n_tokens=tokenizer.n_tokens)
    return {**checkpoint, "model": weights, "config": config}


def trim_vocabulary(checkpoint: Checkpoint) -> Checkpoint:
    """Returns a checkpoint without the embedding rows that pad the vocabulary."""
    config = checkpoint["config"]
    weights = {**checkpoint["model"]}
    for name in _vocabulary_matrices(checkpoint):
        weights[name] = weights[name][: config.n_tokens]
    return {**checkpoint, "model": weights, "config": dataclasses.replace(config, vocab_size=config.n_tokens)}


def with_class_head(checkpoint: Checkpoint, n_classes: int) -> Checkpoint:
    """Returns a language model's checkpoint with a random head over `n_classes` instead of the head over tokens."""
    config = dataclasses.replace(checkpoint["config"], n_classes=n_classes, tie_weights=False)
    head = torch.normal(0.0, 0.02, (n_classes, config.n_embd))
    return {**checkpoint, "config": config, "model": {**checkpoint["model"], "lm_head.weight": head}}


def tokenizer_of(checkpoint: Checkpoint) -> tokenizers.Tokenizer:
    """Returns the tokenizer that a checkpoint was trained with."""
    return tokenizers.from_spec(checkpoint["tokenizer"])


def facts(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns the metadata of a checkpoint as text to show, name by name; missing metadata is left out."""
    config = checkpoint["config"]
    kinds = {"base": "completes text", "sft": "answers", "classifier": "classifies text"}
    history = checkpoint.get("history") or [{}]
    val_loss = history[-1].get("val_loss")
    vocabulary = "GPT-2's" if checkpoint["tokenizer"] == "gpt2" else "its own"
    metadata = {
        "kind": kinds[checkpoint["kind"]],
        "labels": ", ".join(checkpoint.get("labels", [])),
        "parameters": f"{sum(tensor.numel() for tensor in checkpoint['model'].values()):,}",
        "shape": f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide",
        "context": f"{config.block_size:,} tokens",
        "vocabulary": f"{config.n_tokens:,} tokens, {vocabulary}",
        "training steps": f"{checkpoint['step']:,}" if checkpoint.get("step") else "",
        "training tokens": f"{checkpoint['tokens']:,}" if checkpoint.get("tokens") else "",
        "validation loss": f"{val_loss:.4f}" if val_loss is not None else "",
        "written": checkpoint.get("created", "")[:10],
    }
    return {name: value for name, value in metadata.items() if value}


def describe(checkpoint: Checkpoint) -> str:
    """Returns the main facts of a checkpoint in one line."""
    metadata = facts(checkpoint)
    shown = [name for name in ("parameters", "training steps", "validation loss") if name in metadata]
    return ", ".join([metadata["kind"], *(f"{name} {metadata[name]}" for name in shown)])


def _require_harmless(path: str | Path) -> None:
    """Raises ValueError if a file is compressed, or if its pickle does what `torch.save` of a checkpoint never does.

    Such files can fill the memory: torch, even with `weights_only=True`, calls `bytearray(10**12)` if a pickle says so.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(
            entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries
        ):
            raise ValueError
        [pickled] = [entry for entry in entries if entry.filename.lower().endswith("data.pkl")]  # torch ignores case
        if pickled.file_size > _MAX_PICKLE_BYTES:
            raise ValueError
        for i, (operation, argument, _) in enumerate(pickletools.genops(archive.read(pickled))):
            is_foreign = operation.name == "GLOBAL" and not _PICKLED_NAMES.fullmatch(str(argument))
            if i > _MAX_PICKLE_OPERATIONS or operation.proto > 2 or is_foreign:
                raise ValueError


def _verify_checksums(path: str | Path) -> None:
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise UserError(f"{path} is damaged (checksum of {damaged}): restore the file from a copy")


def _not_a_checkpoint(path: str | Path, error: Exception) -> UserError:
    return UserError(f"{path} is not a checkpoint of this project, or damaged ({type(error).__name__})")


def _vocabulary_matrices(checkpoint: Checkpoint) -> list[str]:
    """Returns the names of the stored matrices that have one row for each token."""
    is_class_head = checkpoint["config"].n_classes > 0
    return [
        name for name in checkpoint["model"] if name == "wte.weight" or (name == "lm_head.weight" and not is_class_head)
    ]
