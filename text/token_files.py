"""Token files: their format, the `meta.json` that says what belongs together, and what they hold."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from system.errors import UserError
from text.tokenizer import Tokenizer, tokenizer_of_data

_SHARD_MAGIC, _LLAMA_SHARD_MAGIC, _SHARD_HEADER_BYTES = 20240520, 20240801, 1024
_SLICE = 2**24  # tokens that are read at a time, 32 MiB


def read_meta(path: str | Path, command: str) -> dict:
    """Reads a `meta.json`. Raises UserError, naming the command that makes one, where it is missing or damaged."""
    path = Path(path)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        strings = [*meta["files"], meta["tokenizer"]]
        numbers = [counts["tokens"] for counts in meta["splits"].values()]
        if not all(isinstance(name, str) for name in strings) or not all(isinstance(n, int) for n in numbers):
            raise TypeError
        return meta
    except FileNotFoundError:
        raise UserError(f"no prepared data in {path.parent} ({path.name} is missing): run {command} first") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: run {command} again") from None


def read_token_meta(folder: Path) -> dict:
    """Reads the `meta.json` of pre-training data; token files without one are taken for GPT-2's (nanoGPT, llm.c).

    Raises UserError where there is neither.
    """
    names = sorted(path.name for path in folder.glob("*.bin") if not path.name.startswith("sft_"))
    if (folder / "meta.json").exists() or not all(any(split in name for name in names) for split in ("train", "val")):
        return read_meta(folder / "meta.json", "prepare_data.py")
    return {"files": names, "tokenizer": "gpt2", "splits": {}}


def read_tokens(path: Path) -> np.ndarray:
    """Opens a token file as a read-only uint16 memory map; a llm.c / modded-nanogpt shard loses its header.

    Raises UserError where it is missing, its size does not fit its kind, or its tokens are of another width.
    """
    header = np.frombuffer(_first_bytes(path, _SHARD_HEADER_BYTES), dtype="<i4")
    if len(header) == 256 and (header[0] == _LLAMA_SHARD_MAGIC or header[0] == _SHARD_MAGIC and header[1] != 1):
        raise UserError(f"{path} holds llm.c's tokens of another kind than GPT-2's (version {header[1]})")
    if len(header) == 256 and header[0] == _SHARD_MAGIC:
        tokens = memory_map(path, np.uint16)[_SHARD_HEADER_BYTES // 2 :]
        if len(tokens) != header[2]:
            raise UserError(f"{path} is damaged: its header promises {header[2]:,} tokens, it holds {len(tokens):,}")
        return tokens
    return memory_map(path, np.uint16)


def _first_bytes(path, n):
    try:
        with open(path, "rb") as file:
            data = file.read(n)
            return data[: len(data) // 4 * 4]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def require_ids_below(ids: np.ndarray, vocab_size: int, where: str | Path, remedy: str, offset: int = 0) -> None:
    """Raises UserError, naming the place, if one of `ids` (n,) is not below `vocab_size`.

    `where` names the file, `remedy` tells the user what to do. `ids` may be a memory map of any size; if they are a
    part of a file, `offset` is the number of tokens before them.
    """
    for start, part in slices(ids):
        if part.max() >= vocab_size:
            i = int(np.argmax(part >= vocab_size))
            raise UserError(
                f"{where} holds the id {part[i]} (token {offset + start + i:,}), which a vocabulary of "
                f"{vocab_size:,} does not have: {remedy}"
            )


def slices(ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields ids in slices that fit into memory, each with the position of its first."""
    for start in range(0, len(ids), _SLICE):
        yield start, ids[start : start + _SLICE]


def memory_map(path: Path, dtype: type) -> np.ndarray:
    """Opens a file of little-endian numbers read-only. Raises UserError where it is missing or cut short."""
    size, item = (path.stat().st_size if path.exists() else -1), np.dtype(dtype).itemsize
    if size < 0 or size % item:
        raise UserError(f"{path} is {'missing' if size < 0 else 'damaged'}: prepare the data again")
    return np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r") if size else np.zeros(0, dtype)


class TokenFiles:
    """Writes the token files of one split, and counts how often each id occurs."""

    def __init__(self, folder: Path, split: str, n_tokens: int, shard_tokens: int | None):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.counts = np.zeros(n_tokens, dtype=np.int64)
        self.names, self.file, self.room = [], None, 0

    @property
    def n_tokens(self) -> int:
        """Tokens written."""
        return int(self.counts.sum())

    def write(self, ids: np.ndarray) -> None:
        """Appends ids (uint16); a shard that is full is closed, and the next one begun."""
        self.counts += np.bincount(ids, minlength=len(self.counts))
        while len(ids):
            if not self.room:
                self.close()
                number = f"_{len(self.names) + 1:06}" if self.shard_tokens else ""
                self.names.append(f"{self.split}{number}.bin")
                self.file, self.room = open(self.folder / self.names[-1], "wb"), self.shard_tokens or 1 << 62  # noqa: SIM115
            self.file.write(ids[: self.room].tobytes())
            n = min(len(ids), self.room)
            self.room, ids = self.room - n, ids[n:]

    def close(self) -> None:
        """Brings the last file to the disk."""
        if self.file:
            _close(self.file)


class ConversationFiles:
    """Writes the tokens, the loss masks and the offsets of one split's conversations, and counts them."""

    def __init__(self, folder: Path, split: str):
        self.names = [f"sft_{split}{part}.bin" for part in ("", "_mask", "_index")]
        self.files = [open(folder / name, "wb") for name in self.names]  # noqa: SIM115
        self.counts = {"conversations": 0, "tokens": 0, "counted": 0}

    def write(self, ids: list[int], mask: list[int]) -> None:
        """Appends a conversation: its ids and its loss mask, 1 where loss counts."""
        tokens_file, mask_file, index_file = self.files
        index_file.write(np.array([self.counts["tokens"]], "<u8").tobytes())
        tokens_file.write(np.array(ids, "<u2").tobytes())
        mask_file.write(np.array(mask, "u1").tobytes())
        self.counts["conversations"] += 1
        self.counts["tokens"] += len(ids)
        self.counts["counted"] += sum(mask)

    def close(self) -> None:
        """Writes the last offset, the number of tokens, and brings the files to the disk."""
        self.files[2].write(np.array([self.counts["tokens"]], "<u8").tobytes())
        for file in self.files:
            _close(file)


def _close(file: BinaryIO) -> None:
    """Brings a file to the disk and closes it."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def statistics(counts: np.ndarray, tokenizer: Tokenizer) -> dict[str, int]:
    """Returns documents, characters, UTF-8 bytes, tokens (separators included) and different tokens of the text.

    All of it follows from how often each id occurs: a document ends with a separator, and a token's bytes are known.
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
    """Returns how often each id occurs in the token files of a folder, by split, and their tokenizer.

    Raises UserError where there are none, or where they hold ids that the tokenizer does not have.
    """
    meta = read_token_meta(folder)
    tokenizer = tokenizer_of_data(folder, meta)
    counts = {}
    for split in ("train", "val"):
        counts[split] = np.zeros(tokenizer.n_tokens, dtype=np.int64)
        for name in (name for name in meta["files"] if split in name):
            tokens = read_tokens(folder / name)
            n_slices = math.ceil(len(tokens) / _SLICE)
            for start, part in tqdm(slices(tokens), total=n_slices, desc=name, leave=False):
                require_ids_below(part, tokenizer.n_tokens, folder / name, "prepare the data again", offset=start)
                counts[split] += np.bincount(part, minlength=tokenizer.n_tokens)
    return counts, tokenizer


def report(counts: dict[str, np.ndarray], tokenizer: Tokenizer, folder: Path) -> str:
    """Returns a table of what token files hold, by split and in all, and the first 300 characters."""
    columns = {name: statistics(count, tokenizer) for name, count in counts.items()}
    columns["total"] = statistics(sum(counts.values()), tokenizer)
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
            f"tokenizer {tokenizer.name}, {tokenizer.n_tokens:,} tokens, 3 of control; the training text begins:",
            tokenizer.decode(read_tokens(folder / first)[:1500].tolist())[:300],
        ]
    )
