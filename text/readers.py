"""Files and the Hugging Face Hub, read a piece at a time: rows of tables, decompression, small downloads."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from itertools import count
from pathlib import Path
from types import UnionType
from typing import IO, TYPE_CHECKING, Any

from system.errors import UserError
from system.files import atomic_write

if TYPE_CHECKING:
    from datasets import IterableDataset

Stream = io.BufferedReader
"""bytes that can be peeked at"""
Row = tuple[str, Any]
"""The place of a row, such as "a.jsonl, line 17", and the row: a dict, or in damaged JSON files any other value."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
ROWS = 256  # rows of Parquet and of the Hub to read at a time

DOWNLOADS = {  # name: URL, SHA-256
    "shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
        "/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "war-and-peace": (
        "https://raw.githubusercontent.com/enerrio/jax-transformer/e00617e4555a0dc4d64d819307f917206aeec31c"
        "/war-and-peace.txt",
        "fef5d84055533ae89c5df8f8334f5bcf9110a5d36e0a01f0e587b847c9d5444e",
    ),
}


class Notes(dict[str, tuple[int, str]]):
    """What was repaired or skipped while reading: message -> (how often, where first)."""

    def add(self, message: str, where: str, n: int = 1) -> None:
        """Counts `n` more cases of `message`."""
        number, first = self.get(message, (0, where))
        self[message] = (number + n, first)

    def clean(self, text: str, where: str, line: int | None = None) -> str:
        """Returns the text with U+FFFD instead of lone surrogates, which UTF-8 cannot encode, and counts them.

        With `line`, the number of the text's first line, the note names the line.
        """
        try:
            text.encode()
            return text
        except UnicodeEncodeError as error:
            if line:
                where = f"{where}, line {line + text.count(chr(10), 0, error.start)}"
            text, n = re.subn("[\ud800-\udfff]", "\ufffd", text)
            self.add("characters or bytes that are not Unicode became U+FFFD", where, n)
            return text

    def lines(self) -> list[str]:
        """Returns the notes as lines to print."""
        return [f"{number:,} {message}, the first in {where}" for message, (number, where) in self.items()]

    def in_brackets(self) -> str:
        """Returns the notes for the end of an error message, "" if there are none."""
        return "".join(f" ({line})" for line in self.lines())

    def as_json(self) -> dict[str, dict[str, int | str]]:
        """Returns the notes as JSON holds them."""
        return {message: {"number": number, "first": where} for message, (number, where) in self.items()}


def content_suffix(path: Path) -> str:
    """Returns the suffix of a file's content, without that of a compression: ".jsonl" for a.jsonl.gz."""
    return Path(path.stem if path.suffix in COMPRESSIONS else path.name).suffix.lower()


@contextmanager
def opened(path: Path) -> Iterator[tuple[IO[bytes], Stream]]:
    """Opens a file; yields the raw file, whose `tell` measures progress, and the decompressed content.

    Raises UserError, naming the file, for whatever goes wrong while it is being read.
    """
    import pyarrow

    try:
        with open(path, "rb") as raw:
            if path.suffix in COMPRESSIONS:
                stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), COMPRESSIONS[path.suffix])
                yield raw, io.BufferedReader(stream, 2**20)
            else:
                yield raw, raw
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def records(path: Path, stream: Stream, columns: list[str] | None = None) -> Iterator[Row]:
    """Yields the rows of a table, each with its place, and holds no more than a few of them in memory.

    From Parquet only `columns` are read, if given. Columns named "1", "2" and so on are those of a .csv or .tsv file
    without a header. Raises UserError, naming the place, for what cannot be parsed.
    """
    suffix = content_suffix(path)
    if suffix == ".parquet":
        yield from _parquet(path, stream, columns)
    elif suffix in (".csv", ".tsv"):
        yield from _csv(path, stream, suffix == ".tsv", columns)
    elif suffix == ".json" and stream.peek(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _json_list(path, stream)
    else:
        yield from _json_lines(path, stream)


def _json_lines(path: Path, stream: Stream) -> Iterator[Row]:
    for line in count(1):
        try:
            text = stream.readline().decode("utf-8-sig")
            if not text:
                return
            is_blank = text.isspace()
            row = None if is_blank else json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {line} is not JSON: {error}") from None
        text = ""  # a line may be long: free it while the row is in use
        if not is_blank:
            yield f"{path}, line {line}", row


def _json_list(path: Path, stream: Stream) -> Iterator[Row]:
    import ijson

    number = 0
    if stream.peek(3).startswith(codecs.BOM_UTF8):
        stream.read(3)
    try:
        for number, row in enumerate(ijson.items(stream, "item", use_float=True), 1):  # noqa: B007
            yield f"{path}, record {number}", row
    except ijson.JSONError as error:
        raise UserError(f"{path} is not JSON after record {number}: {' '.join(str(error).split())[:60]}") from None


def _csv(path: Path, stream: Stream, has_tabs: bool, columns: list[str] | None) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    names = None
    if columns and all(map(str.isdecimal, columns)):
        names = [str(i + 1) for i in range(max(map(int, columns)))]
    if has_tabs:  # without quoting: the fields of a .tsv file hold neither tabs nor line breaks
        rows = csv.DictReader(text, names, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        rows = csv.DictReader(text, names, strict=True)
    try:
        for row in rows:
            yield f"{path}, line {rows.line_num}", row
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}") from None


def _parquet(path: Path, stream: IO[bytes], columns: list[str] | None) -> Iterator[Row]:
    import pyarrow.parquet

    if not stream.seekable():  # inside a compressed file; Parquet is read from its end
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(stream, unpacked)
            yield from _parquet(path, unpacked, columns)
        return
    file = pyarrow.parquet.ParquetFile(stream)
    existing = [name for name in columns or [] if name in file.schema_arrow.names]
    rows = count(1)
    for batch in file.iter_batches(ROWS, columns=existing or None):
        for row in batch.to_pylist():
            yield f"{path}, row {next(rows)}", row


def text_of(row: object, column: str, where: str, flag: str = "--text-column", types: type | UnionType = str) -> str:
    """Returns what a row holds in a column, one of `types`, as text; "" for null.

    Raises UserError, naming the place and the `flag` that names the column, for anything else.
    """
    if not isinstance(row, dict) or column not in row:
        content = ", ".join(map(str, row))[:100] if isinstance(row, dict) else f"a {type(row).__name__}"
        raise UserError(f"{where}: no column {column!r}, but {content or 'nothing'}: name the right one with {flag}")
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, types):
        raise UserError(
            f"{where}: column {column!r} holds a {type(value).__name__}, not text: name another one with {flag}"
        )
    return str(value)


def load_hub(
    name: str, instead: str, config: str | None = None, split: str | None = None, revision: str | None = None
) -> tuple[Any, dict[str, list[str]]]:
    """Returns a data set of the Hub as an IterableDataset (a dict of them by split, without `split`), and its files by
    split.

    `datasets` no longer runs the scripts that some data sets still are; those are read from the Hub's own conversion to
    Parquet. Raises UserError if the data set cannot be had; `instead` says what works without a network.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    try:
        if not Path(name).is_dir():  # fails at once, while `load_dataset_builder` would try again and again
            HfApi().dataset_info(name, revision=revision, timeout=20)
        try:
            builder = datasets.load_dataset_builder(name, config, revision=revision)
        except RuntimeError as error:
            if revision or "scripts are no longer supported" not in str(error):
                raise
            builder = datasets.load_dataset_builder(name, config, revision="refs/convert/parquet")
        return builder.as_streaming_dataset(split), builder.config.data_files
    except Exception as error:  # whatever the Hub's client raises
        raise hub_error(name, instead, error) from None


def hub_rows(name: str, rows: IterableDataset) -> Iterator[Row]:
    """Yields the rows of a streamed data set with their places. Raises UserError if the network fails."""
    numbers = count(1)
    try:
        for batch in rows.iter(ROWS):
            for values in zip(*batch.values(), strict=True):
                yield f"{name}, row {next(numbers)}", dict(zip(batch, values, strict=True))
    except Exception as error:  # whatever the Hub's client raises
        raise hub_error(name, "local files work", error) from None


def count_rows(urls: Iterable[str]) -> int:
    """Returns the number of rows in Parquet files, local or on the Hub, from their footers."""
    import fsspec
    from pyarrow.parquet import ParquetFile

    def count_in(url: str) -> int:
        with fsspec.open(url) as file:
            return ParquetFile(file).metadata.num_rows

    with ThreadPoolExecutor(16) as pool:
        return sum(pool.map(count_in, urls))


def hub_error(name: str, instead: str, error: Exception) -> UserError:
    """Returns the error of the Hub's client as one line that ends with what works `instead`."""
    message = " ".join(str(error).split())[:200]
    return UserError(
        f"cannot load {name} from the Hugging Face Hub ({type(error).__name__}: {message}); "
        f"without a network, {instead}"
    )


def download(name: str, instead: str, folder: Path = Path("data/raw")) -> Path:
    """Returns the path of a text in `DOWNLOADS`, fetched once. Raises UserError if it cannot be had unchanged."""
    url, sha256 = DOWNLOADS[name]
    path = folder / f"{name}.txt"
    try:
        content = path.read_bytes() if path.exists() else urllib.request.urlopen(url, timeout=30).read()
    except (OSError, HTTPException) as error:
        raise UserError(
            f"cannot fetch {name} from {url} ({getattr(error, 'reason', error)}); "
            f"put it at {path} by hand; without a network, {instead}"
        ) from None
    if hashlib.sha256(content).hexdigest() != sha256:
        if path.exists():
            raise UserError(f"{path} is not the published {name} (another SHA-256): remove it to fetch it again")
        raise UserError(f"{url} is not the published {name} (another SHA-256): {instead}")
    if not path.exists():
        with atomic_write(path) as file:
            file.write(content)
    return path
