"""Where text to pre-train on comes from: files of many kinds, the Hugging Face Hub, small downloads, Python itself."""

import glob
import io
import os
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import UnionType
from typing import TypeVar

from system.errors import UserError
from text import pydocs
from text.readers import (
    DOWNLOADS,
    TABLES,
    Notes,
    content_suffix,
    count_rows,
    download,
    hub_error,
    hub_rows,
    load_hub,
    opened,
    records,
)

Item = TypeVar("Item")
Piece = tuple[str, str, bool]
"""A split, "train" or "val", a part of a document's text, and whether the document ends with it."""

CHUNK = 1_000_000  # characters that are read, and tokenized, at a time
BPE_CHARACTERS = 200_000_000  # of the training text are enough to train a tokenizer on
TEXTS = (".txt", ".md", ".py")  # a file is a document; of TABLES, a row
INSTEAD = "--dataset pydocs and --input FILE work"


class Corpus:
    """Documents, to be iterated as often as needed. A document is an iterable of strings, so that a file of any size
    passes through in pieces; each has to be read before the next is asked for.

    While it is read, `position` counts up to `total` (bytes of files or rows; None where nobody knows), and `notes`
    says what was mended or passed over.
    """

    total: int | None = None
    position: int = 0
    default_shard_tokens: int | None = None
    """tokens per shard unless the user chooses another number; None for one file per split"""
    first_shard_val: bool = False
    """whether the first shard is held out, instead of a share of the documents"""

    def __iter__(self) -> Iterator[Iterable[str]]:
        self.position, self.notes = 0, Notes()
        return self._documents()

    def pieces(self, val_fraction: float, seed: int) -> Iterator[Piece]:
        """Yields the text of all documents that are not empty, in pieces of about CHUNK characters."""
        is_empty = True
        for split, text, ends in self.split(val_fraction, seed):
            is_empty = is_empty and not text
            if not is_empty:
                yield split, text, ends
            is_empty = is_empty or ends

    def split(self, val_fraction: float, seed: int) -> Iterator[Piece]:
        """Yields all documents in pieces, with their splits."""
        return hold_out(self, val_fraction, seed)

    def of_rows(self, rows: Iterable[tuple[str, dict]], text_column: str) -> Iterator[Iterable[str]]:
        """Yields the texts in rows; empty ones are passed over, and noted."""
        for where, row in rows:
            if text := self.notes.clean(text_of(row, text_column, where), where):
                yield [text]
            else:
                self.notes.add("empty documents were passed over", where)


class Texts(Corpus):
    """Texts that are in memory, each a document."""

    def __init__(self, texts: Iterable[str]):
        self.texts = list(texts)
        self.total = len(self.texts)

    def _documents(self):
        for text in self.texts:
            yield [text]
            self.position += 1


class Files(Corpus):
    """Files, folders and globs. A text file is a document; of a table (.jsonl, .csv, .parquet and so on) every row."""

    def __init__(self, patterns: Iterable[str | Path], text_column: str = "text"):
        """Raises UserError where a pattern leads to no file that can be read."""
        self.paths = find_files(map(str, patterns))
        self.text_column = text_column
        self.total = sum(path.stat().st_size for path in self.paths)

    def _documents(self):
        for path in self.paths:
            before, size = self.position, path.stat().st_size
            if content_suffix(path) in TABLES:
                with opened(path) as (raw, stream):
                    for document in self.of_rows(records(path, stream, [self.text_column]), self.text_column):
                        yield document
                        self.position = before + min(raw.tell(), size)
            else:
                yield self._chunks(path, before)
            self.position = before + size

    def _chunks(self, path, before):
        with opened(path) as (raw, stream):
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")
            line, chunk = 1, text.read(CHUNK)
            if "\0" in chunk[:8000]:  # what git takes for the mark of a binary file
                self.notes.add("binary files were passed over", str(path))
                return
            if not chunk:
                self.notes.add("empty documents were passed over", str(path))
            while chunk:
                yield self.notes.clean(chunk, str(path), line)
                self.position = before + raw.tell()
                line += chunk.count("\n")
                chunk = text.read(CHUNK)


class Hub(Corpus):
    """A data set of the Hugging Face Hub, streamed: nothing of it is kept on the disk."""

    def __init__(
        self,
        name: str,
        config: str | None = None,
        split: str = "train",
        revision: str | None = None,
        text_column: str = "text",
    ):
        """Raises UserError where it cannot be reached, or does not exist."""
        self.name, self.text_column = name, text_column
        self.rows, self.files = load_hub(name, INSTEAD, config, split, revision)

    def _documents(self):
        for document in self.of_rows(hub_rows(self.name, self.rows), self.text_column):
            yield document
            self.position += 1


class OpenWebText(Hub):
    """OpenWebText (Gokaslan and Cohen 2019), with nanoGPT's choice of held-out rows, so that validation losses compare.

    nanoGPT calls `train_test_split(test_size=0.0005, seed=2357, shuffle=True)`; here the permutation behind that call
    is computed from the number of rows alone, so that the rows can stream past in their own order.
    """

    def __init__(self):
        """Raises UserError where it cannot be reached."""
        super().__init__("Skylion007/openwebtext")
        try:
            self.total = count_rows(self.files["train"])
        except Exception as error:  # whatever the Hub's client raises
            raise hub_error(self.name, INSTEAD, error) from None
        if self.total != 8_013_769:
            print(f"{self.name} has {self.total:,} rows, not 8,013,769: its split is not the published one's")

    def is_val(self):
        """Returns for each row whether it is held out, a NumPy array of bool."""
        import numpy as np

        held_out = np.zeros(self.total, dtype=bool)
        held_out[np.random.default_rng(2357).permutation(self.total)[: int(np.ceil(0.0005 * self.total))]] = True
        return held_out

    def split(self, val_fraction: float, seed: int) -> Iterator[Piece]:
        """Yields all documents in pieces, with nanoGPT's split whatever the arguments."""
        splits = ("val" if is_val else "train" for is_val in self.is_val())
        return whole_documents(zip(splits, self, strict=True))


class FineWebEdu(Hub):
    """The sample of 10 billion tokens of FineWeb-Edu (Penedo et al. 2024); its first shard is held out, as is usual."""

    default_shard_tokens = 100_000_000
    first_shard_val = True

    def __init__(self):
        """Raises UserError where it cannot be reached."""
        super().__init__("HuggingFaceFW/fineweb-edu", "sample-10BT")

    def split(self, val_fraction: float, seed: int) -> Iterator[Piece]:
        """Yields all documents in pieces, as training data: `write_corpus` takes the first shard from it."""
        return whole_documents(("train", document) for document in self)


def open_corpus(
    dataset: str,
    inputs: Iterable[str] = (),
    text_column: str = "text",
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
) -> Corpus:
    """Returns the corpus of files, folders and globs, or without `inputs` that of a data set.

    `config`, `split` and `revision` choose from a data set of the Hub, named org/name. Raises UserError where there is
    none.
    """
    if inputs:
        return Files(inputs, text_column)
    if dataset == "pydocs":
        return Texts(pydocs.documents())
    if dataset in DOWNLOADS:
        return Files([download(dataset, INSTEAD)])
    if dataset == "openwebtext":
        return OpenWebText()
    if dataset == "fineweb-edu":
        return FineWebEdu()
    return Hub(dataset, config, split, revision, text_column)


def training_text(pieces: Iterable[Piece]) -> Iterator[str]:
    """Yields the text to train a tokenizer on."""
    left = BPE_CHARACTERS
    for text in (text for split, text, _ in pieces if split == "train"):
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def in_pieces(chunks: Iterable[str], size: int = CHUNK, cut_at: int | None = None) -> Iterator[tuple[str, bool]]:
    """Yields a document of any length in pieces of about `size` characters, each with whether the document ends there.

    A document with `cut_at` becomes two, the first of that many characters. Other pieces end at the end of a word,
    before white space. The pattern that splits text for the BPE always splits there, so the tokens are those of the
    whole document. They may differ only if 10,000 characters hold no such place.
    """
    text, left = "", cut_at
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
    """Returns where the last word before white space ends, or the length of the text if no word ends near there."""
    end = len(text)
    while end > max(0, len(text) - 10_000):
        end = max(text.rfind(" ", 0, end), text.rfind("\n", 0, end))
        if end > 0 and not text[end - 1].isspace():
            return end
    return len(text)


def hold_out(corpus: Iterable[Iterable[str]], fraction: float, seed: int) -> Iterator[Piece]:
    """Splits documents into "train" and "val": whole documents, or, of fewer than 20, the last part of each."""
    sizes = [sum(map(len, document)) for document in islice(corpus, 20)]
    if len(sizes) == 20:
        yield from whole_documents(draw_held_out(corpus, fraction, seed))
        return
    for size, document in zip(sizes, corpus, strict=True):
        split = "train"
        for text, ends in in_pieces(document, cut_at=int(size * (1 - fraction))):
            yield split, text, ends
            if ends:
                split = "val"


def whole_documents(documents: Iterable[tuple[str, Iterable[str]]]) -> Iterator[Piece]:
    """Yields the pieces of documents that come with their splits."""
    for split, document in documents:
        for text, ends in in_pieces(document):
            yield split, text, ends


def draw_held_out(items: Iterable[Item], fraction: float, seed: int) -> Iterator[tuple[str, Item]]:
    """Yields every item with its split: one of each 1/`fraction` in a row, drawn by seed, is "val", the others "train".

    The first 20 items hold at least one of "val", if there are so many.
    """
    rng, size = random.Random(seed), max(2, round(1 / fraction))
    for i, item in enumerate(items):
        if i % size == 0:
            held_out = i + rng.randrange(size if i else min(size, 20))
        yield "val" if i == held_out else "train", item


def find_files(patterns: Iterable[str]) -> list[Path]:
    """Returns the files behind files, folders and globs, each once and sorted. Raises UserError for none."""
    found = set()
    for pattern in patterns:
        matches = [Path(match) for match in glob.glob(os.path.expanduser(pattern), recursive=True)] or [Path(pattern)]
        for path in matches:
            inside = (p for p in path.rglob("*") if content_suffix(p) in (*TEXTS, *TABLES) and p.is_file())
            files = set(inside) if path.is_dir() else {path} if path.is_file() else set()
            if not files:
                raise UserError(
                    f"no text in {pattern}: wanted files, a glob, or a folder of {' '.join((*TEXTS, *TABLES))} files"
                )
            found |= files
    return sorted(found)


def text_of(row: object, column: str, where: str, flag: str = "--text-column", kinds: type | UnionType = str) -> str:
    """Returns the text in a row, "" for null; what else of `kinds` may stand there, as text. Raises UserError, naming
    the place and the `flag` that names the column, where there is none."""
    if not isinstance(row, dict) or column not in row:
        has = ", ".join(map(str, row))[:100] if isinstance(row, dict) else f"a {type(row).__name__}"
        raise UserError(f"{where}: no column {column!r}, but {has or 'nothing'}: name the right one with {flag}")
    if not isinstance(row[column], kinds | None):
        raise UserError(f"{where}: column {column!r} holds a {type(row[column]).__name__}, not text")
    return "" if row[column] is None else str(row[column])
