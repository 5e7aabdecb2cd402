"""Files and the Hugging Face Hub, read a piece at a time: rows of tables, compressed or not, and small downloads."""

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
from typing import BinaryIO

from system.errors import UserError
from system.files import atomic_write

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
ROWS = 256  # rows of Parquet and of the Hub that are read at a time

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
    """What was mended or passed over while reading: what → (how many, where first)."""

    def add(self, what: str, where: str, n: int = 1) -> None:
        """Counts `n` more under `what`."""
        number, first = self.get(what, (0, where))
        self[what] = (number + n, first)

    def clean(self, text: str, where: str, line: int | None = None) -> str:
        """Replaces what UTF-8 cannot hold, lone surrogates, by U+FFFD, and counts it."""
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
        """Returns a line for each, for people."""
        return [f"{number:,} {what}, the first in {where}" for what, (number, where) in self.items()]

    def in_brackets(self) -> str:
        """Returns all in one line, for the end of an error message; "" for nothing."""
        return "".join(f" ({line})" for line in self.lines())

    def plain(self) -> dict:
        """Returns all in a form fit for JSON."""
        return {what: {"number": number, "first": where} for what, (number, where) in self.items()}


def content_suffix(path: Path) -> str:
    """Returns a file's suffix, that of a compression left out: ".jsonl" for a.jsonl.gz."""
    return Path(path.stem if path.suffix in COMPRESSIONS else path.name).suffix.lower()


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Opens a file; gives the raw file, whose `tell` says how far one has come, and its content, decompressed.

    Raises UserError, naming the file, for whatever goes wrong while it is being read.
    """
    import pyarrow

    try:
        with open(path, "rb") as raw:
            if path.suffix in COMPRESSIONS:
                stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), COMPRESSIONS[path.suffix])
                yield raw, io.BufferedReader(stream, 1 << 20)
            else:
                yield raw, raw
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def records(path: Path, stream: BinaryIO, columns: list[str] | None = None) -> Iterator[tuple[str, dict]]:
    """Yields the rows of a table, each with its place ("a.jsonl, line 17"), reading no more than it must.

    Of Parquet only `columns` are read, where given. Columns named "1", "2" and so on are those of a .csv or .tsv file
    that has no header. Raises UserError, naming the place, for what cannot be parsed.
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


def _json_lines(path, stream):
    for line in count(1):
        if not (text := stream.readline()):
            return
        if text.strip():
            try:
                text = text.decode("utf-8-sig")  # a line may be long: the bytes are no longer needed
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {line} is not JSON: {error}") from None
            text = None
            yield f"{path}, line {line}", row


def _json_list(path, stream):
    import ijson

    number = 0
    if stream.peek(3).startswith(codecs.BOM_UTF8):
        stream.read(3)
    try:
        for number, row in enumerate(ijson.items(stream, "item", use_float=True), 1):  # noqa: B007
            yield f"{path}, record {number}", row
    except ijson.JSONError as error:
        raise UserError(f"{path} is not JSON after record {number}: {' '.join(str(error).split())[:60]}") from None


def _csv(path, stream, tabs, columns):
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    # Quotation marks mean nothing in tab-separated files: their fields hold neither tabs nor line breaks.
    format_ = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    if columns and all(map(str.isdecimal, columns)):
        format_["fieldnames"] = [str(i + 1) for i in range(max(map(int, columns)))]
    rows = csv.DictReader(text, **format_)
    try:
        for row in rows:
            yield f"{path}, line {rows.line_num}", row
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}") from None


def _parquet(path, stream, columns):
    import pyarrow.parquet

    if not stream.seekable():  # Parquet inside a compressed file: it is read from its end
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(stream, unpacked)
            yield from _parquet(path, unpacked, columns)
        return
    file = pyarrow.parquet.ParquetFile(stream)
    known = [name for name in columns or [] if name in file.schema_arrow.names] or None
    rows = count(1)
    for batch in file.iter_batches(ROWS, columns=known):
        for row in batch.to_pylist():
            yield f"{path}, row {next(rows)}", row


def load_hub(name: str, instead: str, config: str | None = None, split: str | None = None, revision: str | None = None):
    """Returns a data set of the Hub as a stream (by split, where `split` is None), and its files by split.

    One that is still a script, which `datasets` does not run since version 4, is taken from the Hub's own conversion to
    Parquet. Raises UserError where it cannot be had; `instead` says what works without a network.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    try:
        if not Path(name).is_dir():  # says at once what is wrong, where `load_dataset` would go on trying
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


def hub_rows(name: str, rows) -> Iterator[tuple[str, dict]]:
    """Yields the rows of a streamed data set with their places. Raises UserError where the network fails."""
    numbers = count(1)
    try:
        for batch in rows.iter(ROWS):
            for values in zip(*batch.values(), strict=True):
                yield f"{name}, row {next(numbers)}", dict(zip(batch, values, strict=True))
    except Exception as error:  # whatever the Hub's client raises
        raise hub_error(name, "files that are here work", error) from None


def count_rows(urls: Iterable[str]) -> int:
    """Returns the number of rows in Parquet files, here or on the Hub, from their footers."""
    import fsspec
    from pyarrow.parquet import ParquetFile

    def count_in(url):
        with fsspec.open(url) as file:
            return ParquetFile(file).metadata.num_rows

    with ThreadPoolExecutor(16) as pool:
        return sum(pool.map(count_in, urls))


def hub_error(name: str, instead: str, error: Exception) -> UserError:
    """Returns in one line what the Hub's client complains of, and what works `instead`."""
    what = " ".join(str(error).split())[:200]
    return UserError(
        f"cannot load {name} from the Hugging Face Hub ({type(error).__name__}: {what}); without a network, {instead}"
    )


def download(name: str, instead: str, folder: Path = Path("data/raw")) -> Path:
    """Returns the path of a text of `DOWNLOADS`, fetched once. Raises UserError where it, or just it, cannot be had."""
    url, sha256 = DOWNLOADS[name]
    path = folder / f"{name}.txt"
    try:
        text = path.read_bytes() if path.exists() else urllib.request.urlopen(url, timeout=30).read()
    except (OSError, HTTPException) as error:
        raise UserError(
            f"cannot fetch {name} from {url} ({getattr(error, 'reason', error)}); "
            f"put it at {path} by hand; without a network, {instead}"
        ) from None
    if hashlib.sha256(text).hexdigest() != sha256:
        raise UserError(
            f"{path if path.exists() else url} is not the {name} that is wanted (another SHA-256): remove it"
        )
    if not path.exists():
        with atomic_write(path) as file:
            file.write(text)
    return path
