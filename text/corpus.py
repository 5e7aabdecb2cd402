"""Text for pre-training: documents, which of them are held out, and how long ones are cut."""

import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice, repeat

import numpy as np

from system.cli import without_secrets
from text import pydocs, sources
from text.sources import TABLES, TEXTS, Dataset, Notes, Row, content_suffix, draw_held_out, hub_rows

Document = tuple[str, Iterable[str]]
"""A split ("train" or "val", or "" if it is to be drawn), and the text as an iterable of strings."""
Piece = tuple[str, str, bool]
"""A split, a part of a document's text, and whether the document ends with that part."""

CHUNK = 1_000_000  # characters to read, and to tokenize, at a time
OPENWEBTEXT_ROWS = 8_013_769


@dataclass
class Corpus:
    """Documents for pre-training. They can be read several times."""

    read: Callable[[Notes], Iterator[Document]]
    """yields the documents, and notes what was repaired or skipped; read each document before the next"""
    source: str | list[str]
    """the name of the data set, or those of the files"""
    has_split: bool = False
    """whether the documents come with their splits"""
    first_shard_val: bool = False
    """whether the corpus is written in shards, and the first shard is held out"""
    notes: Notes = field(default_factory=Notes)

    def documents(self) -> Iterator[Document]:
        """Yields the documents from the first one on, and begins new `notes`."""
        self.notes = Notes()
        return self.read(self.notes)

    def pieces(self, val_fraction: float, seed: int) -> Iterator[Piece]:
        """Yields the text of all documents in pieces of about CHUNK characters.

        Without a split of their own, whole documents are held out, or, if there are fewer than 20, the end of each.
        """
        documents = self.documents()
        if not self.has_split:
            sizes = [sum(map(len, document)) for _, document in islice(documents, 20)]
            if len(sizes) < 20:
                yield from self._split_pieces([int(size * (1 - val_fraction)) for size in sizes])
                return
            documents = draw_held_out((document for _, document in self.documents()), val_fraction, seed)
        for split, document in documents:
            yield from ((split, text, ends) for text, ends in cut(document))

    def _split_pieces(self, lengths: list[int]) -> Iterator[Piece]:
        """Yields the first characters of each document for training, and the rest for validation."""
        for n_train, (_, document) in zip(lengths, self.documents(), strict=True):
            split = "train" if n_train else "val"
            for text, ends in cut(document, split_at=n_train):
                yield split, text, ends
                if ends:
                    split = "val"


def open_corpus(
    dataset: str,
    inputs: Iterable[str] = (),
    text_column: str = "text",
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
) -> Corpus:
    """Returns the corpus of `inputs` (files, folders, globs, URLs), or without them that of a data set.

    `config`, `split` and `revision` are for a data set org/name. Raises UserError if the corpus cannot be found.
    """
    named = TEXTS.get(dataset) or Dataset(dataset, config, text_column=text_column)
    if inputs or named.url:
        files = sources.find_files(inputs) if inputs else [str(sources.download(dataset, named))]
        return Corpus(
            lambda notes: _documents(files, text_column, notes), [without_secrets(name) for name in inputs] or dataset
        )
    if not named.hub:
        return Corpus(lambda notes: (("", [text]) for text in pydocs.documents()), dataset)
    is_val: Iterable[bool] = nanogpt_held_out(OPENWEBTEXT_ROWS) if named.held_out == "nanogpt" else []
    has_split = named.held_out != "share"

    def read(notes: Notes) -> Iterator[Document]:
        if named.held_out == "own":
            yield from _texts(hub_rows(named.hub, named.config, "validation"), named.text_column, notes, repeat("val"))
        splits = chain(("val" if held_out else "train" for held_out in is_val), repeat("train" if has_split else ""))
        yield from _texts(hub_rows(named.hub, named.config, split, revision), named.text_column, notes, splits)

    return Corpus(read, dataset, has_split, named.held_out == "first shard")


def nanogpt_held_out(n_rows: int) -> np.ndarray:
    """Returns which rows of OpenWebText nanoGPT holds out, so that validation losses compare: bool (n_rows,).

    This is the permutation behind nanoGPT's `train_test_split(test_size=0.0005, seed=2357, shuffle=True)`, which
    depends on the number of rows alone.
    """
    held_out = np.zeros(n_rows, dtype=bool)
    held_out[np.random.default_rng(2357).permutation(n_rows)[: int(np.ceil(0.0005 * n_rows))]] = True
    return held_out


def _documents(files: list[str], text_column: str, notes: Notes) -> Iterator[Document]:
    for file in files:
        if content_suffix(file) in TABLES:
            yield from _texts(sources.read_rows(file, [text_column]), text_column, notes, repeat(""))
        else:
            yield "", _chunks(file, notes)


def _texts(rows: Iterable[Row], text_column: str, notes: Notes, splits: Iterable[str]) -> Iterator[Document]:
    """Yields the texts of rows with their splits, without the empty ones."""
    for split, (where, row) in zip(splits, rows, strict=False):
        if text := notes.clean(sources.text_of(row, text_column, where), where):
            yield split, [text]
        else:
            notes.add("empty documents were skipped", where)


def _chunks(file: str, notes: Notes) -> Iterator[str]:
    """Yields the text of a file in chunks."""
    shown = without_secrets(file)
    with sources.opened(file) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")
        line, chunk = 1, text.read(CHUNK)
        if "\0" in chunk[:8000]:  # the sign by which git, too, knows a binary file
            notes.add("binary files were skipped", shown)
            return
        if not chunk:
            notes.add("empty documents were skipped", shown)
        while chunk:
            yield notes.clean(chunk, shown, line)
            line += chunk.count("\n")
            chunk = text.read(CHUNK)


def cut(chunks: Iterable[str], size: int = CHUNK, split_at: int | None = None) -> Iterator[tuple[str, bool]]:
    """Yields a document of any length in pieces of about `size` characters, each with whether a document ends there.

    With `split_at` the document becomes two: one of `split_at` characters, and the rest. All other cuts are at the end
    of a word, before white space. The pattern that splits text for the BPE always splits there, so the tokens are those
    of the whole document. They may differ only if 10,000 characters hold no such place. An empty document has no piece.
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
                if text or left:
                    yield text + part[:left], True
                text, part, left = "", part[left:], None
            elif left is not None:
                left -= len(part)
            text += part
    if text:
        yield text, True


def _last_word_end(text: str) -> int:
    """Returns where the last word before white space ends; if there is none near the end, the length of the text."""
    start = max(0, len(text) - 10_000)
    ends = [match.end() for match in re.finditer(r"\S(?=[ \n])", text[start:])]
    return start + ends[-1] if ends else len(text)
