"""Token files: their format, the `meta.json` that lists them, and statistics of their content."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from system.cli import printable, progress, shorten, without_secrets
from system.errors import UserError
from system.untrusted import is_file_name, is_integer, is_text, read_json
from text.tokenizer import Tokenizer, require_same_tokenizer, tokenizer_of_data

_SHARD_MAGIC, _LLAMA_SHARD_MAGIC, _SHARD_HEADER_BYTES = 20240520, 20240801, 1024  # of llm.c
_SLICE = 2**24  # tokens to read at a time: 32 MiB


def read_meta(path: str | Path, command: str) -> dict[str, Any]:
    """Reads a `meta.json` or `sft_meta.json`.

    `files` are then names of files in the same folder, with token files of both splits among them; `tokenizer` is a
    text; `splits` maps names to counts of `tokens` and perhaps `bytes`; `template`, if present, is "chat" or "alpaca",
    and `is_held_out` true or false. Raises UserError, naming the command that writes the file, if it is missing or
    damaged.
    """
    path = Path(path)
    try:
        meta = read_json(path)
    except FileNotFoundError:
        raise UserError(f"no prepared data in {path.parent} ({path.name} is missing): run {command} first") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is damaged (it is no JSON): run {command} again") from None
    fields = meta if isinstance(meta, dict) else {}
    if wrong := [name for name, is_valid in _META_FIELDS.items() if not is_valid(fields.get(name))]:
        raise UserError(f"{path} is damaged ({', '.join(wrong)}): run {command} again")
    return fields


def read_sft_meta(folder: Path) -> dict[str, Any]:
    """Reads the `sft_meta.json` of a folder, which has a `template`. Raises UserError if it is missing or damaged."""
    path = folder / "sft_meta.json"
    meta = read_meta(path, "prepare_sft_data.py")
    if meta.get("template") is None:
        raise UserError(f"{path} is damaged (template): run prepare_sft_data.py again")
    return meta


def _are_files(names: object) -> bool:
    """Whether a value lists plain names of files, with token files of both splits among them."""
    if not isinstance(names, list) or not all(map(is_file_name, names)):
        return False
    return all(any(split in name and name.endswith(".bin") for name in names) for split in ("train", "val"))


def _are_splits(splits: object) -> bool:
    return isinstance(splits, dict) and all(map(_are_counts, splits.values()))


def _are_counts(counts: object) -> bool:
    """Whether a value says how large a split is: `tokens`, and perhaps the `bytes` of their text."""
    if not isinstance(counts, dict) or not is_integer(counts.get("tokens")):
        return False
    n_bytes = counts.get("bytes", 0)
    return is_integer(n_bytes) and (counts["tokens"] > 0 or n_bytes == 0)


_META_FIELDS: dict[str, Callable[[object], bool]] = {
    "files": _are_files,
    "tokenizer": is_text,
    "splits": _are_splits,
    "is_held_out": lambda is_held_out: is_held_out is None or isinstance(is_held_out, bool),
    "template": lambda template: template is None or (isinstance(template, str) and template in ("chat", "alpaca")),
}


def read_token_meta(folder: Path) -> dict[str, Any]:
    """Reads the `meta.json` of pre-training data. Token files without one (nanoGPT, llm.c) are taken for GPT-2's.

    Raises UserError if there is neither.
    """
    names = sorted(path.name for path in folder.glob("*.bin") if not path.name.startswith("sft_"))
    if (folder / "meta.json").exists() or not all(any(split in name for name in names) for split in ("train", "val")):
        return read_meta(folder / "meta.json", "prepare_data.py")
    return {"files": names, "tokenizer": "gpt2", "splits": {}}


def is_prepared_from(meta: Path, source: str) -> bool:
    """Whether a `meta.json` or `sft_meta.json` says that its data was made from this data set or this one file, and
    nothing else. A URL counts without its secrets."""
    source = without_secrets(source)
    return meta.exists() and read_meta(meta, "the preparation").get("source") in (source, [source])


def read_prepared_tokens(path: Path, tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """Returns the ids of one token file (.bin), or of the validation split in a folder, uint16 (n,).

    Raises UserError if the folder was prepared with another tokenizer, or if the file holds ids that a vocabulary
    lacks.
    """
    if path.suffix == ".bin":
        ids = read_tokens(path)
    else:
        meta = read_token_meta(path)
        found = tokenizer_of_data(path, meta).name
        require_same_tokenizer(tokenizer.name, found, path, "prepare the text with the model's tokenizer")
        ids = np.concatenate([read_tokens(path / name) for name in meta["files"] if "val" in name])
    require_ids_below(ids, vocab_size, path, "prepare the text with the model's tokenizer")
    return ids


def read_tokens(path: Path) -> np.ndarray:
    """Opens a token file as a read-only memory map, uint16 (n,), without the header of a llm.c or modded-nanogpt shard.

    Raises UserError if it is missing, if its size is wrong, or if its tokens have another width.
    """
    header = np.frombuffer(_first_bytes(path, _SHARD_HEADER_BYTES), dtype="<i4")
    if len(header) < 256 or header[0] not in (_SHARD_MAGIC, _LLAMA_SHARD_MAGIC):
        return memory_map(path, np.uint16)
    if header[0] == _LLAMA_SHARD_MAGIC or header[1] != 1:
        raise UserError(
            f"{path} holds llm.c's tokens of another kind than GPT-2's (version {header[1]}): prepare the text again"
        )
    tokens = memory_map(path, np.uint16)[_SHARD_HEADER_BYTES // 2 :]
    if len(tokens) != header[2]:
        raise UserError(
            f"{path} is damaged: its header announces {header[2]:,} tokens, it holds {len(tokens):,}; "
            "copy or prepare it again"
        )
    return tokens


def _first_bytes(path: Path, n: int) -> bytes:
    """Returns at most the first `n` bytes of a file, a multiple of 4."""
    try:
        with open(path, "rb") as file:
            content = file.read(n)
            return content[: len(content) // 4 * 4]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def memory_map(path: Path, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """Opens a file of little-endian numbers read-only, (n,). Raises UserError if it is missing or cut short."""
    if not path.exists():
        raise UserError(f"{path} is missing: prepare the data again")
    size, little_endian = path.stat().st_size, np.dtype(dtype).newbyteorder("<")
    if size % little_endian.itemsize:
        raise UserError(f"{path} is damaged: prepare the data again")
    if size == 0:  # an empty file cannot be mapped
        return np.zeros(0, little_endian)
    return np.memmap(path, dtype=little_endian, mode="r")


def require_ids_below(ids: np.ndarray, vocab_size: int, where: str | Path, remedy: str, offset: int = 0) -> None:
    """Raises UserError, naming the place, unless all ids (n,) are below `vocab_size`.

    `where` names the file, `remedy` tells the user what to do. `ids` may be a memory map of any size: they are read in
    slices. If `ids` are a part of the file, `offset` is the number of tokens before that part.
    """
    for start, part in slices(ids):
        if part.max() >= vocab_size:
            i = int(np.argmax(part >= vocab_size))
            raise UserError(
                f"{where} holds the id {part[i]} (token {offset + start + i:,}), which a vocabulary of "
                f"{vocab_size:,} does not have: {remedy}"
            )


def slices(ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields ids (n,) in slices that fit into memory, each with the position of its first id."""
    for start in range(0, len(ids), _SLICE):
        yield start, ids[start : start + _SLICE]


class TokenFiles:
    """Writes the token files of one split, and counts how often each id occurs."""

    def __init__(self, folder: Path, split: str, n_tokens: int, shard_tokens: int | None) -> None:
        """`n_tokens` is the number of ids. With `shard_tokens` a new file begins after that many tokens."""
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.counts = np.zeros(n_tokens, dtype=np.int64)
        self.names: list[str] = []
        self._file: IO[bytes] | None = None
        self._room: int | None = None  # tokens that still fit into the open file; None for any number

    def write(self, ids: np.ndarray) -> None:
        """Appends ids, uint16 (n,)."""
        self.counts += np.bincount(ids, minlength=len(self.counts))
        while len(ids):
            if self._file is None or self._room == 0:
                self.close()
                self._file = self._open_next()
            part = ids[: self._room]
            self._file.write(part.tobytes())
            ids = ids[len(part) :]
            if self._room is not None:
                self._room -= len(part)

    def _open_next(self) -> IO[bytes]:
        number = f"_{len(self.names) + 1:06}" if self.shard_tokens else ""
        self.names.append(f"{self.split}{number}.bin")
        self._room = self.shard_tokens
        return open(self.folder / self.names[-1], "wb")

    def close(self) -> None:
        """Flushes the last file to the disk and closes it."""
        if self._file:
            _close(self._file)


class ConversationFiles:
    """Writes the tokens, the loss masks and the offsets of one split's conversations, and counts them."""

    def __init__(self, folder: Path, split: str) -> None:
        self.names = [f"sft_{split}{part}.bin" for part in ("", "_mask", "_index")]
        self.counts = {"conversations": 0, "tokens": 0, "counted": 0}
        self._tokens, self._masks, self._offsets = (open(folder / name, "wb") for name in self.names)  # noqa: SIM115

    def write(self, ids: list[int], mask: list[int]) -> None:
        """Appends a conversation: its ids and its loss mask (1 where loss counts), equally long."""
        self._offsets.write(np.array([self.counts["tokens"]], "<u8").tobytes())
        self._tokens.write(np.array(ids, "<u2").tobytes())
        self._masks.write(np.array(mask, "u1").tobytes())
        self.counts["conversations"] += 1
        self.counts["tokens"] += len(ids)
        self.counts["counted"] += sum(mask)

    def close(self) -> None:
        """Writes the last offset, which is the number of tokens; flushes the files to the disk and closes them."""
        self._offsets.write(np.array([self.counts["tokens"]], "<u8").tobytes())
        for file in (self._tokens, self._masks, self._offsets):
            _close(file)


def _close(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def statistics(counts: np.ndarray, tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the numbers of documents, characters, UTF-8 bytes, tokens (separators included) and different tokens.

    They follow from how often each id occurs, `counts` (ids,): every document ends with a separator, and the bytes of
    every token are fixed.
    """
    text, (lengths, characters) = counts[: tokenizer.end_of_text], tokenizer.token_sizes()
    return {
        "documents": int(counts[tokenizer.end_of_text]),
        "characters": int(text @ characters),
        "bytes": int(text @ lengths),
        "tokens": int(counts.sum()),
        "unique": int(np.count_nonzero(text)),
    }


def count_tokens(folder: Path) -> tuple[dict[str, np.ndarray], Tokenizer]:
    """Returns how often each id occurs in the token files of a folder, int64 (ids,) by split, and their tokenizer.

    Raises UserError if there are no token files, or if they hold ids that the tokenizer does not have.
    """
    meta = read_token_meta(folder)
    tokenizer = tokenizer_of_data(folder, meta)
    counts = {}
    for split in ("train", "val"):
        counts[split] = np.zeros(tokenizer.n_tokens, dtype=np.int64)
        for name in (name for name in meta["files"] if split in name):
            tokens = read_tokens(folder / name)
            n_slices = math.ceil(len(tokens) / _SLICE)
            for start, part in progress(slices(tokens), total=n_slices, desc=printable(name)):
                require_ids_below(part, tokenizer.n_tokens, folder / name, "prepare the data again", offset=start)
                counts[split] += np.bincount(part, minlength=tokenizer.n_tokens)
    return counts, tokenizer


def report(counts: dict[str, np.ndarray], tokenizer: Tokenizer, folder: Path) -> str:
    """Returns a table of what token files hold, by split and in total, and the beginning of the training text.

    `counts` is how often each id occurs, (ids,) by split.
    """
    columns = {name: statistics(count, tokenizer) for name, count in counts.items()}
    columns["total"] = statistics(np.sum(list(counts.values()), axis=0), tokenizer)
    rows = [("", list(columns))]
    for name in ("documents", "characters", "bytes"):
        rows.append((name, [f"{column[name]:,}" for column in columns.values()]))
    n_text = [column["tokens"] - column["documents"] for column in columns.values()]
    rows += [
        ("tokens of text", [f"{n:,}" for n in n_text]),
        ("separators", [f"{column['documents']:,}" for column in columns.values()]),
        ("bytes per token", [f"{c['bytes'] / max(1, n):.3f}" for c, n in zip(columns.values(), n_text, strict=True)]),
        ("unique tokens", [f"{column['unique']:,}" for column in columns.values()]),
    ]
    first = next(name for name in read_token_meta(folder)["files"] if "train" in name)
    return "\n".join(
        [
            *(f"{name:16}" + "".join(f"{value:>17}" for value in values) for name, values in rows),
            f"tokenizer {tokenizer.name}: {tokenizer.n_tokens:,} tokens, 3 of them control tokens",
            f"the training text begins: {shorten(tokenizer.decode(read_tokens(folder / first)[:1500].tolist()), 74)}",
        ]
    )


def summary(counts: dict[str, np.ndarray], tokenizer: Tokenizer) -> str:
    """Returns one line about what token files hold. `counts` is how often each id occurs, (ids,) by split."""
    splits = {name: statistics(count, tokenizer) for name, count in counts.items()}
    return (
        f"{sum(split['characters'] for split in splits.values()):,} characters became "
        f"{sum(split['tokens'] for split in splits.values()):,} tokens: {splits['train']['tokens']:,} to train on, "
        f"{splits['val']['tokens']:,} to validate with"
    )
