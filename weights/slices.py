"""A checkpoint in slices: a folder into which each process of a run has written its own part of every tensor.

The folder `NAME.last` holds `slices.json` and the folder `step_N` that it names. `slices.json` is a checkpoint without
its tensors, and lists the files of `step_N` with their SHA-256 sums. It is written last, and replaced atomically: a
kill leaves the older checkpoint or the new one. The files `shard-….safetensors` are those of PyTorch's
`HuggingFaceStorageWriter`; its default `FileSystemWriter` would write a pickle. Nothing here executes what it reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from system.errors import UserError
from system.files import write_json
from system.untrusted import brief, is_integer, parse_json, read_json

if TYPE_CHECKING:
    from weights.checkpoint import Checkpoint

META = "slices.json"
MAX_HEADER_BYTES = 2**24
"""Longest header of a safetensors file. It takes about 200 bytes per tensor; GPT-2 XL and its AdamW have 2,320."""

_SHARD = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")
_STEP = re.compile(r"step_[0-9]{1,19}")
_DTYPES = ("F32", "BF16", "F16", "F64")
_MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class _Slice:
    """A part of a tensor, in an open file."""

    file: Any
    offset: tuple[int, ...]
    """where it begins in the tensor, in each dimension"""
    shape: tuple[int, ...]
    dtype: str


# ---- names: a nested dict as flat tensors


def separate(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns a checkpoint's metadata, copied, and its tensors by names such as `model.wte.weight` and
    `optimizer.0.3.exp_avg`: the state `exp_avg` of parameter 3 of optimizer 0."""
    tensors = {f"model.{name}": tensor for name, tensor in checkpoint["model"].items()}
    for i, optimizer in enumerate(checkpoint["optimizer"]):
        for parameter, state in optimizer["state"].items():
            tensors |= {f"optimizer.{i}.{parameter}.{name}": tensor for name, tensor in state.items()}
    groups = [{"param_groups": optimizer["param_groups"]} for optimizer in checkpoint["optimizer"]]
    others = {name: value for name, value in checkpoint.items() if name != "model"}
    return json.loads(json.dumps({**others, "optimizer": groups})), tensors


def _join(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the checkpoint that `separate` has taken apart."""
    model: dict[str, Tensor] = {}
    optimizers = [{**optimizer, "state": {}} for optimizer in metadata["optimizer"]]
    for name, tensor in tensors.items():
        part, rest = name.split(".", 1)
        if part == "model":
            model[rest] = tensor
        elif part == "optimizer":
            i, parameter, key = rest.split(".")
            optimizers[int(i)]["state"].setdefault(int(parameter), {})[key] = tensor
        else:
            raise ValueError(f"a tensor {brief(name)}")
    return {**metadata, "model": model, "optimizer": optimizers}


# ---- reading


def is_slices(folder: Path) -> bool:
    """Whether a folder holds a whole checkpoint in slices."""
    return (folder / META).is_file()


def read_step(folder: Path) -> int:
    """Returns the training step of a checkpoint. Raises UserError if `slices.json` is damaged."""
    with _naming_damage(folder):
        step = read_json(folder / META)["step"]
        if not is_integer(step):
            raise ValueError(f"its step is {brief(step)}")
        return step


def read_contents(folder: Path, verify: bool = False) -> dict[str, Any]:
    """Returns what a `.pt` file of the same checkpoint holds, with whole tensors on the CPU, not yet compared with its
    config: see `checkpoint.from_contents`.

    A tensor in one slice is mapped from its file. `verify` compares the checksums first. Raises UserError if a file is
    missing, damaged or foreign, or if slices overlap or are missing.
    """
    with contextlib.ExitStack() as stack, _naming_damage(folder):
        metadata = read_json(folder / META)
        listed = metadata.pop("slices")
        step_folder, files = listed["folder"], listed["files"]
        if not _STEP.fullmatch(step_folder) or not all(map(_SHARD.fullmatch, files)):
            raise ValueError("it lists files that are no slices")
        found: dict[str, list[_Slice]] = {}
        for name, facts in files.items():
            path = folder / step_folder / name
            _require_whole(path, facts, verify)
            for tensor, part in _slices_in(path, stack):
                found.setdefault(tensor, []).append(part)
        layouts = {name: _in_order(name, parts) for name, parts in found.items()}  # check all, then read
        return _join(metadata, {name: _joined(*layout) for name, layout in layouts.items()})


def _require_whole(path: Path, facts: dict[str, Any], verify: bool) -> None:
    """Raises ValueError or OSError unless a file has the size that `slices.json` gives, and perhaps its SHA-256 sum."""
    if not path.is_file() or path.stat().st_size != facts["bytes"]:
        raise ValueError(f"{path.name} is missing or has another size")
    with open(path, "rb") as file:
        n_header_bytes = int.from_bytes(file.read(8), "little")
        if n_header_bytes > MAX_HEADER_BYTES:  # the library reads longer ones, into 20 times their size of memory
            raise ValueError(f"the header of {path.name} has {n_header_bytes:,} bytes")
        file.seek(0)
        if verify and hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
            raise ValueError(f"checksum of {path.name}")


def _slices_in(path: Path, stack: contextlib.ExitStack) -> Iterator[tuple[str, _Slice]]:
    """Yields the names and slices in the header of a file. `safe_open` checks that its tensors fill the file."""
    from safetensors import safe_open

    file = stack.enter_context(safe_open(path, framework="pt"))
    offsets = parse_json((file.metadata() or {})["DCP_SHARDING_INFO"])
    for name in file.keys():  # noqa: SIM118
        header, offset = file.get_slice(name), offsets[name]["saved_offsets"]
        shape, dtype = tuple(header.get_shape()), header.get_dtype()
        is_offset = isinstance(offset, list) and len(offset) == len(shape) and all(map(is_integer, offset))
        if not is_offset or len(shape) > _MAX_DIMENSIONS or dtype not in _DTYPES:
            raise ValueError(f"{brief(name)} in {path.name} is no slice of a tensor of floats")
        yield name, _Slice(file, tuple(offset), shape, dtype)


def _in_order(name: str, parts: list[_Slice]) -> tuple[str, list[_Slice], int]:
    """Returns a tensor's name, its slices in order, and the dimension along which they follow one another.

    Raises ValueError if they overlap, leave a gap, or are no slices of one tensor.
    """
    parts = [part for part in parts if 0 not in part.shape] or parts[:1]  # more processes than rows
    parts.sort(key=lambda part: part.offset)
    first, end = parts[0], 0
    dimension = max((i for part in parts for i, start in enumerate(part.offset) if start), default=0)
    for part in parts:
        offset, shape = [0] * len(first.shape), list(first.shape)
        if shape:
            offset[dimension], shape[dimension] = end, part.shape[dimension]
            end += part.shape[dimension]
        fits = (part.offset, part.shape, part.dtype) == (tuple(offset), tuple(shape), first.dtype)
        if not fits or (part is not first and not shape):
            raise ValueError(f"the slices of {brief(name)} do not make one tensor")
    return name, parts, dimension


def _joined(name: str, parts: list[_Slice], dimension: int) -> Tensor:
    tensors = [part.file.get_tensor(name) for part in parts]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dimension)


@contextlib.contextmanager
def _naming_damage(folder: Path) -> Iterator[None]:
    """Turns what damaged and foreign files raise into a UserError that names the folder."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # torch and safetensors raise many types
        problem = " ".join(str(error)[:200].split()) or "no memory"
        raise UserError(
            f"{folder} is damaged ({type(error).__name__}: {problem}): restore the folder from a copy"
        ) from None


# ---- writing


def write_meta(folder: Path, metadata: dict[str, Any], step_folder: str, files: dict[str, dict[str, Any]]) -> None:
    """Makes the slices in `step_folder` the checkpoint that `folder` holds.

    `files` maps the names of the files to their `bytes` and `sha256`. Raises UserError if one of them is not there, and
    OSError.
    """
    if not all((folder / step_folder / name).exists() for name in files):
        raise UserError(
            f"cannot find in {folder / step_folder} what other processes have written there: choose an --out on a file "
            "system that all machines share, or --sharded-saves off"
        )
    write_json(folder / META, {**metadata, "slices": {"folder": step_folder, "files": files}})


def file_facts(path: Path) -> dict[str, Any]:
    """Returns what `slices.json` says about a file: its `bytes` and its `sha256`."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def remove(folder: Path) -> None:
    """Removes a checkpoint in slices, and nothing else that a folder may hold."""
    (folder / META).unlink(missing_ok=True)
    remove_steps(folder)
    with contextlib.suppress(OSError):
        folder.rmdir()


def remove_unfinished(folder: Path) -> None:
    """Removes the slices that a killed run did not finish. No other process may be writing to the folder."""
    keep = ""
    if is_slices(folder):
        try:
            keep = read_json(folder / META)["slices"]["folder"]
            if not _STEP.fullmatch(keep):
                return
        except (OSError, ValueError, KeyError, TypeError):
            return  # damaged: nobody can tell which slices belong to it
    remove_steps(folder, keep)


def remove_steps(folder: Path, keep: str = "") -> None:
    """Removes all slices but those in the folder `keep`. Raises OSError."""
    for step_folder in folder.glob("step_*"):
        if step_folder.name == keep or not _STEP.fullmatch(step_folder.name):
            continue
        for path in step_folder.glob("shard-*"):
            if _SHARD.fullmatch(path.name):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            step_folder.rmdir()
