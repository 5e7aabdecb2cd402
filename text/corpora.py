"""Text for pre-training: files of many kinds, the Hugging Face Hub, small downloads, Python's own documentation.

A corpus yields documents. `Corpus.pieces` splits them into training and validation data, and cuts long ones.
"""

from __future__ import annotations

import copy
import glob
import hashlib
import io
import math
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Self, TypeVar

import numpy as np

from system.cli import without_secrets
from system.errors import UserError
from text import pydocs
from text.readers import (
    TABLES,
    File,
    Notes,
    content_suffix,
    count_rows,
    download,
    hub_error,
    hub_rows,
    load_hub,
    opened,
    records,
    text_of,
)
from text.registry import TEXTS as NAMED
from text.registry import Dataset
from text.remote import RemoteFile, find, is_url, size_of

Item = TypeVar("Item")
Piece = tuple[str, str, bool]
"""A split ("train" or "val"), a part of a document's text, and whether the document ends with that part."""

CHUNK = 1_000_000  # characters to read, and to tokenize, at a time
BPE_CHARACTERS = 200_000_000  # enough training text to train a tokenizer
TEXTS = (".txt", ".md", ".py")  # each file is one document; in TABLES, each row is one
INSTEAD = "--dataset pydocs and --input FILE work"


class Corpus(ABC):
    """Documents, which can be iterated several times.

    A document is an iterable of strings, so that a file of any size passes through in chunks. Read each document before
    you ask for the next. Meanwhile `position` counts up to `total` (bytes of files, or rows; None if unknown), and
    `notes` counts what was repaired or skipped.
    """

    total: int | None = None
    position: int = 0
    notes: Notes
    default_shard_tokens: int | None = None
    """tokens per shard unless the user chooses another number; None for one file per split"""
    first_shard_val: bool = False
    """whether the first shard is held out, instead of a share of the documents"""

    def __iter__(self) -> Iterator[Iterable[str]]:
        self.position, self.notes = 0, Notes()
        return self._documents()

    @abstractmethod
    def _documents(self) -> Iterator[Iterable[str]]:
        """Yields the documents, and keeps `position` and `notes` up to date."""

    def pieces(self, val_fraction: float, seed: int) -> Iterator[Piece]:
        """Yields the text of all documents in pieces of about CHUNK characters, without the empty documents."""
        is_empty = True
        for split, text, ends in self.split(val_fraction, seed):
            is_empty = is_empty and not text
            if not is_empty:
                yield split, text, ends
            is_empty = is_empty or ends

    def split(self, val_fraction: float, seed: int) -> Iterator[Piece]:
        """Yields all documents in pieces, with their splits."""
        return hold_out(self, val_fraction, seed)

    def parts(self, n_bytes: int) -> list[Self]:
        """Returns corpora that hold the documents of this one, in the same order: files or groups of files.

        Small files are grouped to about `n_bytes` bytes. A corpus that cannot be cut is one part.
        """
        return [self]

    @abstractmethod
    def sources(self) -> list:
        """Returns what the text comes from, for JSON: as long as it is equal, so is the text."""

    def _texts_of_rows(self, rows: Iterable[tuple[str, dict]], text_column: str) -> Iterator[Iterable[str]]:
        """Yields the texts of rows, without the empty ones."""
        for where, row in rows:
            if text := self.notes.clean(text_of(row, text_column, where), where):
                yield [text]
            else:
                self.notes.add("empty documents were skipped", where)


class Texts(Corpus):
    """Texts in memory. Each is a document."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = list(texts)
        self.total = len(self.texts)

    def _documents(self) -> Iterator[Iterable[str]]:
        for text in self.texts:
            yield [text]
            self.position += 1

    def sources(self) -> list:
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
        return [digest.hexdigest()]


class Files(Corpus):
    """Files, folders, globs and URLs. A text file is one document; in a table (.jsonl, .csv, …), each row is one."""

    def __init__(self, patterns: Iterable[str | Path], text_column: str = "text") -> None:
        """Raises UserError if a pattern matches no file that can be read."""
        self.paths = find_files(map(str, patterns))
        self.text_column = text_column
        self.total = _total_size(self.paths)

    def _documents(self) -> Iterator[Iterable[str]]:
        for path in self.paths:
            before, size = self.position, size_of(path)
            if content_suffix(path) in TABLES:
                with opened(path) as (raw, stream):
                    rows = records(path, stream, [self.text_column])
                    for document in self._texts_of_rows(rows, self.text_column):
                        yield document
                        self.position = before + (raw.tell() if size is None else min(raw.tell(), size))
            else:
                yield self._chunks(path, before)
            if size is not None:
                self.position = before + size

    def parts(self, n_bytes: int) -> list[Self]:
        groups: list[list[File]] = []
        room = 0
        for path in self.paths:
            if room <= 0:
                groups.append([])
                room = n_bytes
            groups[-1].append(path)
            size = size_of(path)
            room -= n_bytes if size is None else size
        parts = [copy.copy(self) for _ in groups]
        for part, paths in zip(parts, groups, strict=True):
            part.paths, part.total = paths, _total_size(paths)
        return parts

    def sources(self) -> list:
        return [self.text_column, *map(_stamp, self.paths)]

    def _chunks(self, path: File, before: int) -> Iterator[str]:
        """Yields a text file in chunks; `before` is the position where the file begins."""
        with opened(path) as (raw, stream):
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")
            line, chunk = 1, text.read(CHUNK)
            if "\0" in chunk[:8000]:  # the sign by which git, too, knows a binary file
                self.notes.add("binary files were skipped", str(path))
                return
            if not chunk:
                self.notes.add("empty documents were skipped", str(path))
            while chunk:
                yield self.notes.clean(chunk, str(path), line)
                self.position = before + raw.tell()
                line += chunk.count("\n")
                chunk = text.read(CHUNK)


class Hub(Corpus):
    """A data set of the Hugging Face Hub, streamed: nothing is stored on the disk."""

    def __init__(
        self,
        name: str,
        config: str | None = None,
        split: str = "train",
        revision: str | None = None,
        text_column: str = "text",
    ) -> None:
        """Raises UserError if the Hub cannot be reached, or has no such data set."""
        self.name, self.config, self.text_column = name, config, text_column
        self.split_name, self.label = split, name
        self.rows, self.files = load_hub(name, INSTEAD, config, split, revision)

    def _documents(self) -> Iterator[Iterable[str]]:
        for document in self._texts_of_rows(hub_rows(self.label, self.rows), self.text_column):
            yield document
            self.position += 1

    def parts(self, n_bytes: int) -> list[Self]:
        n = self.rows.num_shards  # files
        parts = [copy.copy(self) for _ in range(n)]
        if n > 1:
            for i, part in enumerate(parts):
                part.rows, part.label = self.rows.shard(n, i), f"{self.name}, file {i + 1}"
        return parts

    def sources(self) -> list:
        """On the Hub, the names of the files hold the commit."""
        files = {str(split): [_stamp(name) for name in names] for split, names in self.files.items()}
        return [self.name, self.config, self.split_name, self.text_column, files]


class OpenWebText(Hub):
    """OpenWebText (Gokaslan and Cohen 2019), with nanoGPT's held-out rows, so that validation losses compare.

    nanoGPT calls `train_test_split(test_size=0.0005, seed=2357, shuffle=True)`. The permutation behind that call
    depends on the number of rows alone. Computing it here lets the rows stream past in their own order.
    """

    total: int
    first_row: int = 0

    def __init__(self, dataset: Dataset) -> None:
        """Raises UserError if the Hub cannot be reached."""
        super().__init__(dataset.hub, dataset.config, text_column=dataset.text_column)
        try:
            self.row_counts = count_rows(self.files["train"])
        except Exception as error:  # whatever the Hub's client raises
            raise hub_error(self.name, INSTEAD, error) from None
        self.total = sum(self.row_counts)
        if self.total != 8_013_769:
            print(f"{self.name} has {self.total:,} rows, not 8,013,769: its split is not the published one's")

    def is_val(self) -> np.ndarray:
        """Returns whether each row is held out: bool (rows,)."""
        n_rows = sum(self.row_counts)
        n_val = math.ceil(0.0005 * n_rows)
        held_out = np.zeros(n_rows, dtype=bool)
        held_out[np.random.default_rng(2357).permutation(n_rows)[:n_val]] = True
        return held_out[self.first_row : self.first_row + self.total]

    def parts(self, n_bytes: int) -> list[Self]:
        parts = super().parts(n_bytes)
        if len(parts) != len(self.row_counts):
            return [self]
        for i, part in enumerate(parts):
            part.first_row, part.total = sum(self.row_counts[:i]), self.row_counts[i]
        return parts

    def split(self, val_fraction: float, seed: int) -> Iterator[Piece]:
        """Yields all documents in pieces, with nanoGPT's split: the arguments change nothing."""
        splits = ("val" if is_val else "train" for is_val in self.is_val())
        return _in_pieces(zip(splits, self, strict=True))


class Shards(Hub):
    """A data set of billions of tokens, such as FineWeb-Edu (Penedo et al. 2024), in shards; the first is held out."""

    default_shard_tokens = 100_000_000
    first_shard_val = True

    def split(self, val_fraction: float, seed: int) -> Iterator[Piece]:
        """Yields all documents in pieces, as training data: the first shard is split off by `write_corpus`."""
        return _in_pieces(("train", document) for document in self)


class OwnSplits(Hub):
    """A data set that comes with a split "validation"."""

    splits: tuple[str, ...] = ("val", "train")

    def split(self, val_fraction: float, seed: int) -> Iterator[Piece]:
        """Yields all documents in pieces, the held-out ones first: the arguments change nothing."""
        documents = iter(self)
        if "val" in self.splits:
            rows, _ = load_hub(self.name, INSTEAD, self.config, "validation")
            held_out = self._texts_of_rows(hub_rows(self.name, rows), self.text_column)
            yield from _in_pieces(("val", document) for document in held_out)
        if "train" in self.splits:
            yield from _in_pieces(("train", document) for document in documents)

    def parts(self, n_bytes: int) -> list[Self]:
        """Returns the held-out documents as one part, and the parts of the others."""
        parts = [copy.copy(self), *super().parts(n_bytes)]
        for i, part in enumerate(parts):
            part.splits = ("train",) if i else ("val",)
        return parts


def open_corpus(
    dataset: str,
    inputs: Iterable[str] = (),
    text_column: str = "text",
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
) -> Corpus:
    """Returns the corpus of `inputs` (files, folders, globs, URLs), or without them that of a data set.

    `config`, `split` and `revision` select from a data set of the Hub, named org/name. Raises UserError if the corpus
    cannot be found.
    """
    if inputs:
        return Files(inputs, text_column)
    named = NAMED.get(dataset)
    if named is None:
        return Hub(dataset, config, split, revision, text_column)
    if named.url:
        return Files([download(named, INSTEAD)])
    if not named.hub:
        return Texts(pydocs.documents())
    if named.split == "nanogpt":
        return OpenWebText(named)
    hub = {"first shard": Shards, "own": OwnSplits}.get(named.split, Hub)
    return hub(named.hub, named.config, text_column=named.text_column)


def find_files(patterns: Iterable[str]) -> list[File]:
    """Returns the files that the patterns (files, folders, globs, also as URLs) match: each once, sorted, and those at
    URLs last.

    A pattern that is the name of a file or a folder on this machine is no glob.

    Raises UserError if something that a pattern matches is neither a file nor a folder with files of text.
    """
    found: set[Path] = set()
    remote: set[RemoteFile] = set()
    suffixes = (*TEXTS, *TABLES)
    for pattern in patterns:
        if is_url(pattern):
            files_there = find(pattern, lambda file: content_suffix(file) in suffixes)
            if not files_there:
                raise UserError(
                    f"no text in {without_secrets(pattern)}: name files, globs, or folders with {' '.join(suffixes)} "
                    "files; a folder on the web ends in /, and its server must list it"
                )
            remote |= files_there
            continue
        name = os.path.expanduser(pattern)
        matches = [name] if os.path.exists(name) else glob.glob(name, recursive=True)  # "a[1].txt" may be a file
        for path in map(Path, matches or [pattern]):
            files = _text_files(path)
            if not files:
                missing = "" if path.exists() else ", which does not exist"
                names = f"name files, globs, or folders with {' '.join(suffixes)} files"
                raise UserError(f"no text in {pattern}{missing}: {names}")
            found |= files
    return [*sorted(found), *sorted(remote, key=lambda file: file.url)]


def _text_files(path: Path) -> set[Path]:
    """Returns the file itself whatever its suffix, or the files of text in a folder."""
    if path.is_dir():
        suffixes = (*TEXTS, *TABLES)
        return {inside for inside in path.rglob("*") if content_suffix(inside) in suffixes and inside.is_file()}
    return {path} if path.is_file() else set()


def _total_size(paths: Iterable[File]) -> int | None:
    """Returns the bytes of files, None if the size of one is unknown."""
    sizes = [size_of(path) for path in paths]
    return None if None in sizes else sum(size or 0 for size in sizes)


def _stamp(path: str | File) -> list[str | int | None]:
    """Returns the name of a file and its size; for a local one also the second of its last change."""
    if isinstance(path, RemoteFile):
        return [str(path), path.size]
    try:
        status = os.stat(path)
    except OSError:
        return [str(path)]
    return [str(path), status.st_size, int(status.st_mtime)]


def training_text(pieces: Iterable[Piece]) -> Iterator[str]:
    """Yields the training text of a corpus, as much of it as a tokenizer is trained on."""
    left = BPE_CHARACTERS
    for split, text, _ in pieces:
        if split == "train":
            yield text[:left]
            left -= len(text)
        if left <= 0:
            return


def draw_held_out(items: Iterable[Item], fraction: float, seed: int) -> Iterator[tuple[str, Item]]:
    """Yields every item with its split: of each 1/`fraction` items in a row, one drawn by seed is "val".

    If there are 20 items or more, one of the first 20 is "val".
    """
    rng, size = random.Random(seed), max(2, round(1 / fraction))
    for i, item in enumerate(items):
        if i % size == 0:
            held_out = i + rng.randrange(size if i else min(size, 20))
        yield "val" if i == held_out else "train", item


def hold_out(corpus: Iterable[Iterable[str]], fraction: float, seed: int) -> Iterator[Piece]:
    """Splits documents into "train" and "val": whole documents, or if there are fewer than 20, the end of each."""
    sizes = [sum(map(len, document)) for document in islice(corpus, 20)]
    if len(sizes) == 20:
        yield from _in_pieces(draw_held_out(corpus, fraction, seed))
        return
    for size, document in zip(sizes, corpus, strict=True):
        split = "train"
        for text, ends in cut(document, split_at=int(size * (1 - fraction))):
            yield split, text, ends
            if ends:
                split = "val"


def _in_pieces(documents: Iterable[tuple[str, Iterable[str]]]) -> Iterator[Piece]:
    """Yields the pieces of documents that come with their splits."""
    for split, document in documents:
        for text, ends in cut(document):
            yield split, text, ends


def cut(chunks: Iterable[str], size: int = CHUNK, split_at: int | None = None) -> Iterator[tuple[str, bool]]:
    """Yields a document of any length in pieces of about `size` characters, each with whether a document ends there.

    With `split_at` the document becomes two: one of `split_at` characters, and the rest. Other pieces end at the end of
    a word, before white space. The pattern that splits text for the BPE always splits there, so the tokens are those
    of the whole document. They may differ only if 10,000 characters hold no such place.
    """
    text, left = "", split_at
    for chunk in chunks:
        for start in range(0, len(chunk), CHUNK):
            part = chunk[start : start + CHUNK]
            if len(text) >= size:
                end = _last_word_end(text)
                yield text[:end], False
                text = text[end:]
            if left is not None and left <= len(part):
                yield text + part[:left], True
                text, part, left = "", part[left:], None
            elif left is not None:
                left -= len(part)
            text += part
    yield text, True


def _last_word_end(text: str) -> int:
    """Returns where the last word before white space ends; if there is none near the end, the length of the text."""
    end = len(text)
    while end > max(0, len(text) - 10_000):
        end = max(text.rfind(" ", 0, end), text.rfind("\n", 0, end))
        if end > 0 and not text[end - 1].isspace():
            return end
    return len(text)
