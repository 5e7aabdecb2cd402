"""Text and conversations from named data sets, the Hugging Face Hub, files, folders and URLs.

`fsspec` opens files and URLs, and `datasets` streams from the Hub. Nothing is stored on the disk. Credentials come
from the usual places of the library that talks to the store.
"""

import csv
import hashlib
import io
import json
import os
import random
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, Literal, TypeVar
from urllib.parse import unquote, urlsplit

import fsspec

from system.cli import shorten, without_secrets
from system.errors import UserError
from system.files import atomic_write
from text.tokenizer import unix_line_ends

Item = TypeVar("Item")
Row = tuple[str, Any]
"""The place of a row, such as "a.jsonl, line 17", and the row: a dict, or any other value in a damaged JSON file."""

ROWS = 256  # rows of Parquet and of the Hub to read at a time
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TEXT_FILES = (".txt", ".md", ".py")  # each file is one document
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")  # each row is one document
INSTEAD = "without a network, --input FILE and --hellaswag FILE work, and so do --dataset pydocs and pydocs-qa"


@dataclass(frozen=True)
class Dataset:
    """A named text: on the Hub (org/name), at a URL, or, without both, made from what this machine has."""

    hub: str = ""
    config: str | None = None
    url: str = ""
    sha256: str = ""
    held_out: Literal["share", "nanogpt", "first shard", "own"] = "share"
    """a share of the documents; nanoGPT's rows of OpenWebText; the first shard; or the Hub's split "validation\""""
    text_column: str = "text"


TEXTS = {
    "openwebtext": Dataset("Skylion007/openwebtext", held_out="nanogpt"),
    "fineweb-edu": Dataset("HuggingFaceFW/fineweb-edu", "sample-10BT", held_out="first shard"),
    "climbmix": Dataset("karpathy/climbmix-400b-shuffle", held_out="first shard"),
    "tinystories": Dataset("roneneldan/TinyStories", held_out="own"),
    "shakespeare": Dataset(
        url="https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
        "/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "war-and-peace": Dataset(
        url="https://raw.githubusercontent.com/enerrio/jax-transformer/e00617e4555a0dc4d64d819307f917206aeec31c"
        "/war-and-peace.txt",
        sha256="fef5d84055533ae89c5df8f8334f5bcf9110a5d36e0a01f0e587b847c9d5444e",
    ),
    "pydocs": Dataset(),
}
CONVERSATIONS = {
    "oasst1": "OpenAssistant/oasst1",
    "alpaca-gpt4": "vicgalle/alpaca-gpt4",
    "builtins-qa": None,  # made by text.lessons
    "pydocs-qa": None,
}
LABELLED = {"sms-spam": ("ucirvine/sms_spam", "sms")}  # the name on the Hub, and the column of the text


class Notes(dict[str, tuple[int, str]]):
    """What was repaired or skipped while reading: message -> (how often, where first)."""

    def add(self, message: str, where: str, n: int = 1) -> None:
        """Counts `n` more cases of `message`."""
        number, first = self.get(message, (0, where))
        self[message] = (number + n, first)

    def clean(self, text: str, where: str, line: int | None = None) -> str:
        """Returns the text with `unix_line_ends`, and with U+FFFD for lone surrogates, which UTF-8 cannot encode.

        `line` is the number of the text's first line.
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


def draw_held_out(items: Iterable[Item], fraction: float, seed: int) -> Iterator[tuple[str, Item]]:
    """Yields every item with its split: a random one in each 1/`fraction` in a row, and in the first 20, is "val"."""
    rng, size = random.Random(seed), max(2, round(1 / fraction))
    for i, item in enumerate(items):
        if i % size == 0:
            held_out = i + rng.randrange(size if i else min(size, 20))
        yield "val" if i == held_out else "train", item


def is_url(text: str) -> bool:
    """Whether a text is a URL. One letter before the colon is a drive of Windows."""
    return re.match(r"[a-z][a-z0-9.+-]+://", text, re.IGNORECASE) is not None


def find_files(patterns: Iterable[str]) -> list[str]:
    """Returns the files that patterns (files, folders, globs, also as URLs) match, each once, sorted.

    The name of a file that exists is no glob. A folder on the web ends in "/". Raises UserError if a pattern matches no
    text.
    """
    found = set()
    for pattern in patterns:
        shown, is_web = without_secrets(pattern), pattern.lower().startswith("http")
        names = set()
        with _named_errors(shown):
            store, path = fsspec.core.url_to_fs(pattern, **_options(pattern))
            is_glob = any(sign in path for sign in ("*[" if is_web else "*?[")) and not store.exists(path)
            for match in store.glob(path) if is_glob else [store.info(path)["name"]]:
                if match.endswith("/") if is_web else store.isdir(match):
                    names |= {name for name in store.find(match) if content_suffix(name) in TEXT_FILES + TABLES}
                else:
                    names.add(match)
        if not names:
            kinds = " ".join(TEXT_FILES + TABLES)
            raise UserError(f"no text in {shown}: name files, globs, or folders with {kinds} files")
        here = f"{os.getcwd()}{os.sep}"
        found |= {store.unstrip_protocol(name) if is_url(pattern) else name.removeprefix(here) for name in names}
    return sorted(found)


def content_suffix(file: str) -> str:
    """Returns the suffix of a file's content, without that of a compression: ".jsonl" for a.jsonl.gz."""
    name = _name(file)
    return PurePosixPath(name.stem if name.suffix in COMPRESSIONS else name).suffix.lower()


def _name(file: str) -> PurePosixPath:
    return PurePosixPath(unquote(urlsplit(file).path) if file.lower().startswith("http") else file)


@contextmanager
def opened(file: str) -> Iterator[io.BufferedReader]:
    """Opens a file or a URL; yields its decompressed content. Raises UserError for whatever goes wrong meanwhile."""
    import pyarrow

    with _named_errors(without_secrets(file)), fsspec.open(file, "rb", **_options(file)) as raw:
        if kind := COMPRESSIONS.get(_name(file).suffix):
            raw = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), kind)
        yield io.BufferedReader(raw, 2**20)


def _options(file: str) -> dict[str, Any]:
    """Returns `fsspec`'s options for a URL on the web: no limit of five minutes, byte ranges only for Parquet."""
    if not file.lower().startswith("http"):
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
    streaming = {} if content_suffix(file) == ".parquet" else {"block_size": 0}
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}, **streaming}


@contextmanager
def _named_errors(shown: str) -> Iterator[None]:
    """Turns whatever a library raises into a UserError that names what was read."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        reason = getattr(cause, "strerror", None) or shorten(without_secrets(str(cause)), 200) or type(cause).__name__
        raise UserError(f"cannot read {shown}: {reason}") from error


def read_rows(file: str, columns: list[str] | None = None) -> Iterator[Row]:
    """Yields the rows of a table with their places. From Parquet only `columns` are read, if they exist.

    Columns named "1", "2" and so on are those of a .csv or .tsv file without a header.
    """
    suffix, shown = content_suffix(file), without_secrets(file)
    with opened(file) as stream:
        if suffix == ".parquet":
            yield from ((f"{shown}, row {i}", row) for i, row in enumerate(_parquet(stream, columns), 1))
        elif suffix in (".csv", ".tsv"):
            yield from _csv(stream, shown, suffix == ".tsv", columns)
        elif suffix == ".json" and stream.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from ((f"{shown}, record {i}", row) for i, row in enumerate(json.load(stream), 1))
        else:
            for i, line in enumerate(stream, 1):
                try:
                    if not line.isspace():
                        yield f"{shown}, line {i}", json.loads(line)
                except ValueError as error:
                    raise UserError(f"{shown}, line {i} is not JSON: {error}") from None


def _csv(stream: io.BufferedReader, shown: str, has_tabs: bool, columns: list[str] | None) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    names = None
    if columns and all(column.isdecimal() for column in columns):
        names = [str(i + 1) for i in range(max(map(int, columns)))]
    tabs: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}  # its fields have no tab and no line break
    rows = csv.DictReader(text, names, **tabs) if has_tabs else csv.DictReader(text, names, strict=True)
    try:
        for row in rows:
            yield f"{shown}, line {rows.line_num}", row
    except csv.Error as error:
        raise UserError(f"{shown}, line {rows.line_num}: {error}") from None


def _parquet(stream: io.BufferedReader, columns: list[str] | None) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    # Parquet is read from its end, which needs a stream that can seek: a compressed one cannot.
    file = pyarrow.parquet.ParquetFile(stream if stream.seekable() else pyarrow.BufferReader(stream.read()))
    existing = [name for name in columns or [] if name in file.schema_arrow.names]
    for batch in file.iter_batches(ROWS, columns=existing or None):
        yield from batch.to_pylist()


def text_of(row: object, column: str, where: str, flag: str = "--text-column", types: type | UnionType = str) -> str:
    """Returns the text in a column, "" for null. Raises UserError, naming place and `flag`, for anything else."""
    if not isinstance(row, dict) or column not in row:
        content = shorten(", ".join(map(str, row)), 100) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise UserError(f"{where}: no column {column!r}, but {content or 'nothing'}: name the right one with {flag}")
    value = row[column]
    if not isinstance(value, types | None):
        kind = type(value).__name__
        raise UserError(f"{where}: column {column!r} holds a {kind}, not text: name another one with {flag}")
    return "" if value is None else str(value)


def hub_rows(name: str, config: str | None = None, split: str = "train", revision: str | None = None) -> Iterator[Row]:
    """Streams the rows of a data set of the Hub with their places. Labels stored as numbers get their names.

    Raises UserError if the data set cannot be had, or if the network fails.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    number = 0
    try:
        if not Path(name).is_dir():  # fails at once, while `load_dataset` would try again and again
            HfApi().dataset_info(name, revision=revision, timeout=20)
        rows = datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
        labels = {key: f.names for key, f in (rows.features or {}).items() if isinstance(f, datasets.ClassLabel)}
        for batch in rows.iter(ROWS):  # much faster than row by row
            for column, names in labels.items():  # -1 is no label
                batch[column] = [None if i is None or i < 0 else names[i] for i in batch[column]]
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield f"{name}, row {number}", dict(zip(batch, values, strict=True))
    except Exception as error:  # whatever the Hub's client raises
        reason = f"{type(error).__name__}: {shorten(str(error), 200)}"
        raise UserError(f"cannot load {name} from the Hugging Face Hub ({reason}); {INSTEAD}") from None


def download(name: str, dataset: Dataset, folder: Path = Path("data/raw")) -> Path:
    """Returns the path of a text with a URL, fetched once. Raises UserError if it cannot be had unchanged."""
    path = folder / f"{name}.txt"
    source = str(path) if path.exists() else dataset.url
    try:
        with opened(source) as file:
            content = file.read()
    except UserError as error:
        raise UserError(f"cannot fetch {name}: {error}; put it at {path} by hand; {INSTEAD}") from None
    if hashlib.sha256(content).hexdigest() != dataset.sha256:
        raise UserError(f"{source} is not the published {name} (another SHA-256): replace {path}")
    if source == dataset.url:
        with atomic_write(path) as file:
            file.write(content)
    return path
