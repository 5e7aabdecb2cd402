"""Files and the Hugging Face Hub, read a piece at a time: rows of tables, decompression, small downloads.

A file may come from a stranger, and a small compressed file may hold a huge row. So a row of JSON has at most
`MAX_JSON_ROW` bytes and `MAX_JSON_VALUES` values, and the nesting that Python's recursion limit allows (about 1,000); a
row of a .csv or .tsv file has at most `MAX_CSV_ROW` characters and `MAX_COLUMNS` fields. Beyond, a UserError names the
place. Text files have no limit: they are read in chunks.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
import shutil
import tempfile
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from itertools import count, zip_longest
from pathlib import Path
from types import UnionType
from typing import IO, TYPE_CHECKING, Any

from system.errors import UserError
from system.files import atomic_write
from text.registry import Dataset
from text.remote import RemoteFile, require_no_url

if TYPE_CHECKING:
    import pyarrow
    from datasets import IterableDataset

Stream = io.BufferedReader
"""bytes that can be peeked at"""
File = Path | RemoteFile
"""on this machine, or at a URL"""
Row = tuple[str, Any]
"""The place of a row, such as "a.jsonl, line 17", and the row: a dict, or in damaged JSON files any other value."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
ROWS = 256  # rows of Parquet and of the Hub to read at a time
MAX_JSON_ROW = 2**28
"""Longest row of JSON, in bytes (in characters, if the rows are one JSON list)."""
MAX_JSON_VALUES = 2**20
"""Most values in a row of JSON: a value of 3 bytes can take 90 bytes of memory."""
MAX_CSV_ROW = 2**24
"""Longest row of a .csv or .tsv file, in characters."""
MAX_COLUMNS = 2**14
"""Most fields in a row of a .csv or .tsv file, as in a spreadsheet."""
MAX_NOTES = 50
"""Most different messages about one input."""
_JSON_CHUNK = 2**20  # characters of a JSON list to read at a time
_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_BEHIND_ITEM = re.compile(r"[ \t\n\r]*([,\]])")


class Notes(dict[str, tuple[int, str]]):
    """What was repaired or skipped while reading: message -> (how often, where first)."""

    def add(self, message: str, where: str, n: int = 1) -> None:
        """Counts `n` more cases of `message`."""
        if message not in self and len(self) >= MAX_NOTES:  # messages may quote the file
            message = "other problems were found"
        number, first = self.get(message, (0, where))
        self[message] = (number + n, first)

    def clean(self, text: str, where: str, line: int | None = None) -> str:
        """Returns the text with `unix_line_ends`, and U+FFFD for lone surrogates, which UTF-8 cannot encode; counts
        these.

        With `line`, the number of the text's first line, the note names the line.
        """
        text = unix_line_ends(text)
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


def unix_line_ends(text: str) -> str:
    """Returns a text with "\\n" for every line end, also those of Windows and of old Macs.

    Every text that a model reads, in training or as a prompt, obeys this rule. Files that are read in chunks get the
    same from Python's universal newlines.
    """
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def content_suffix(path: File) -> str:
    """Returns the suffix of a file's content, without that of a compression: ".jsonl" for a.jsonl.gz."""
    return Path(path.stem if path.suffix in COMPRESSIONS else path.name).suffix.lower()


@contextmanager
def opened(path: File) -> Iterator[tuple[IO[bytes], Stream]]:
    """Opens a file; yields the raw file, whose `tell` measures progress, and the decompressed content.

    Raises UserError, naming the file, for whatever goes wrong while it is being read, and for a `Path` that is a URL.
    """
    import pyarrow

    try:
        with _raw(path) as raw:
            if path.suffix in COMPRESSIONS:
                stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), COMPRESSIONS[path.suffix])
                yield raw, io.BufferedReader(stream, 2**20)
            else:
                yield raw, raw
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _raw(path: File) -> Any:
    """Opens a file. Parquet is read from its end, and only in part, unless it is compressed as a whole."""
    if isinstance(path, RemoteFile):
        return path.open(by_ranges=path.suffix.lower() == ".parquet")
    require_no_url(path)
    return open(path, "rb")


def records(path: File, stream: Stream, columns: list[str] | None = None) -> Iterator[Row]:
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


def _json_lines(path: File, stream: Stream) -> Iterator[Row]:
    for line in count(1):
        where = f"{path}, line {line}"
        text = _read_line(stream, where)
        if not text:
            return
        is_blank = text.isspace()
        try:
            row = None if is_blank else _parse(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON: {error.msg} at character {error.pos + 1:,}") from None
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}") from None
        text = ""  # a line may be long: free it while the row is in use
        if not is_blank:
            yield where, row


def _read_line(stream: Stream, where: str) -> str:
    """Returns the next line of UTF-8, "" at the end. Raises UserError if the line is too long, or is not UTF-8."""
    line = stream.readline(MAX_JSON_ROW + 1)
    if len(line) > MAX_JSON_ROW:
        raise UserError(f"{where} is longer than {MAX_JSON_ROW:,} bytes: split it, or save it as a text file")
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8: {error.reason} at byte {error.start + 1:,}") from None


def _parse(text: str) -> Any:
    """Parses a row of JSON. Raises ValueError if it is none, is nested too deeply, or holds too many values."""
    _require_few_values(text)
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _require_few_values(text: str) -> None:
    """Raises ValueError if JSON, or the beginning of JSON, holds more than `MAX_JSON_VALUES` values.

    Every value but the first follows one of the characters "[", "{" and ",". They count outside strings only.
    """
    if len(text) <= MAX_JSON_VALUES or sum(map(text.count, "[{,")) <= MAX_JSON_VALUES:
        return
    n_values, in_string = 0, False
    for token in re.finditer(r'\\.|["\[{,]', text, re.DOTALL):  # a backslash hides the quote behind it
        if token[0] == '"':
            in_string = not in_string
        elif not in_string:
            n_values += 1
            if n_values > MAX_JSON_VALUES:
                raise ValueError(f"it holds more than {MAX_JSON_VALUES:,} values")


def _json_list(path: File, stream: Stream) -> Iterator[Row]:
    """Yields the items of a JSON list. Whatever of the text is not yet parsed stays in `rest`."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    decode, number = json.JSONDecoder().raw_decode, 0

    def read(n_bytes: int = _JSON_CHUNK) -> str:
        content = stream.read(n_bytes)
        return decoder.decode(content, final=not content)

    try:
        rest = read()
        at = rest.index("[") + 1
        while True:
            try:
                start = _skip_space(rest, at)
                if number == 0 and rest.startswith("]", start):
                    at = start + 1
                    break
                row, end = decode(rest, start)
                behind = _BEHIND_ITEM.match(rest, end)  # without this, a number might go on in the next chunk
                if behind is None:
                    raise json.JSONDecodeError("Expecting ',' or ']'", rest, _skip_space(rest, end))
            except json.JSONDecodeError as error:
                rest, at = _read_on(read, rest, at, error), 0
                continue
            number, at = number + 1, behind.end()
            yield f"{path}, record {number}", row
            if behind[1] == "]":
                break
        if (rest[at:] + read()).strip():
            raise ValueError("text follows the list")
    except (ValueError, RecursionError) as error:
        message = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{path} is not JSON after record {number}: {message}") from None


def _skip_space(text: str, at: int) -> int:
    """Returns the first position from `at` on that is not white space."""
    match = _JSON_SPACE.match(text, at)
    assert match  # the pattern matches nothing, too
    return match.end()


def _read_on(read: Callable[[int], str], rest: str, at: int, error: json.JSONDecodeError) -> str:
    """Returns `rest[at:]`, the beginning of an item of a JSON list, and as much text behind it.

    Raises ValueError if more text cannot mend the error, if there is none, or if the item is too long.
    """
    if error.pos < len(rest) - 32 and not error.msg.startswith("Unterminated string"):
        raise ValueError(error.msg)
    rest = rest[at:]
    if len(rest) >= MAX_JSON_ROW:
        raise ValueError(f"the next one is longer than {MAX_JSON_ROW:,} characters")
    _require_few_values(rest)
    more = read(max(_JSON_CHUNK, len(rest)))
    if not more:
        raise ValueError(error.msg)
    return rest + more


def _csv(path: File, stream: Stream, has_tabs: bool, columns: list[str] | None) -> Iterator[Row]:
    csv.field_size_limit(MAX_CSV_ROW)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    left = MAX_CSV_ROW  # characters that the row may still have

    def lines() -> Iterator[str]:
        nonlocal left
        while line := text.readline(left + 1):
            left -= len(line)
            if left < 0:
                raise UserError(
                    f"{path}, line {rows.line_num + 1}: the row is longer than {MAX_CSV_ROW:,} characters: "
                    "close its quotes, or save it as a text file"
                )
            yield line

    names = None
    if columns and all(re.fullmatch("[1-9][0-9]{0,4}", column) for column in columns):
        names = [str(i + 1) for i in range(max(map(int, columns)))]
    rows = (
        csv.reader(lines(), delimiter="\t", quoting=csv.QUOTE_NONE)  # a field of a .tsv file has no tab, no line break
        if has_tabs
        else csv.reader(lines(), strict=True)
    )
    try:
        for fields in rows:
            left = MAX_CSV_ROW
            if len(fields) > MAX_COLUMNS:
                raise csv.Error(f"the row has more than {MAX_COLUMNS:,} columns")
            if names is None:
                names = fields or None
            elif fields:
                yield f"{path}, line {rows.line_num}", dict(zip_longest(names, fields[: len(names)]))
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}") from None


def _parquet(path: File, stream: IO[bytes], columns: list[str] | None) -> Iterator[Row]:
    import pyarrow.parquet

    if not stream.seekable():  # inside a compressed file; Parquet is read from its end
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(stream, unpacked)
            yield from _parquet(path, unpacked, columns)
        return
    file = pyarrow.parquet.ParquetFile(stream)
    names = file.schema_arrow.names
    existing = [name for name in columns or names if name in names]
    numbers = count(1)
    if not existing and file.metadata.num_rows:
        yield f"{path}, row 1", dict.fromkeys(names)  # its values are of no use, its names are
        return
    for batch in file.iter_batches(ROWS, columns=existing):
        rows: Iterable[dict[str, Any]]
        try:
            rows = batch.to_pylist()
        except _NO_PYTHON_VALUE:  # look for it row by row, which is slower
            rows = (
                {name: _value(scalar, f"{path}: column {name!r}") for name, scalar in zip(existing, row, strict=True)}
                for row in zip(*(batch[name] for name in existing), strict=True)
            )
        for row in rows:
            yield f"{path}, row {next(numbers)}", row


_NO_PYTHON_VALUE = (ValueError, OverflowError)
"""What `pyarrow` raises for a text that is not UTF-8, or a date in the year 99999."""


def _value(scalar: pyarrow.Scalar, where: str) -> Any:
    """Returns a value of Parquet. A text that is not UTF-8 has lone surrogates, as in a text file.

    Raises UserError, naming the place, if Python has no such value.
    """
    import pyarrow

    try:
        return scalar.as_py()
    except _NO_PYTHON_VALUE as error:
        if isinstance(scalar, pyarrow.StringScalar | pyarrow.LargeStringScalar):
            return scalar.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
        raise UserError(f"{where} cannot be read: {error}") from None


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


def count_rows(urls: Iterable[str]) -> list[int]:
    """Returns the number of rows in each of some Parquet files, local or on the Hub, from their footers."""
    import fsspec
    from pyarrow.parquet import ParquetFile

    def count_in(url: str) -> int:
        with fsspec.open(url) as file:
            return ParquetFile(file).metadata.num_rows

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(count_in, urls))


def hub_error(name: str, instead: str, error: Exception) -> UserError:
    """Returns the error of the Hub's client as one line that ends with what works `instead`."""
    message = " ".join(str(error).split())[:200]
    return UserError(
        f"cannot load {name} from the Hugging Face Hub ({type(error).__name__}: {message}); "
        f"without a network, {instead}"
    )


def download(dataset: Dataset, instead: str, folder: Path = Path("data/raw")) -> Path:
    """Returns the path of a text with a URL, fetched once. Raises UserError if it cannot be had unchanged."""
    name, url = dataset.name, dataset.url
    path = folder / f"{name}.txt"
    try:
        content = path.read_bytes() if path.exists() else urllib.request.urlopen(url, timeout=30).read()
    except (OSError, HTTPException) as error:
        raise UserError(
            f"cannot fetch {name} from {url} ({getattr(error, 'reason', error)}); "
            f"put it at {path} by hand; without a network, {instead}"
        ) from None
    if hashlib.sha256(content).hexdigest() != dataset.sha256:
        if path.exists():
            raise UserError(f"{path} is not the published {name} (another SHA-256): remove it to fetch it again")
        raise UserError(f"{url} is not the published {name} (another SHA-256): {instead}")
    if not path.exists():
        with atomic_write(path) as file:
            file.write(content)
    return path
