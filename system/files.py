"""Files on disk: atomic writes of files and of folders, and UTF-8 text."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

from system.errors import UserError
from system.locks import writing
from system.untrusted import is_file_name, read_json

MAX_LINE = 2**24
"""Longest line of text to classify or to answer, in bytes."""


@contextlib.contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Makes an OSError that names no file, as writing to a full disk raises, or the temporary one, name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Yields a temporary file beside `path`, flushes it to the disk and renames it to `path`.

    Whatever happens meanwhile, `path` holds either its old content or all of the new content. `mode` is "wb" or "w"
    (UTF-8 text).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_temporaries(path.parent, glob.escape(path.name), seconds=3600)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # In JSON, a backslash escape stands for what UTF-8 cannot encode: a part of a file name that is not UTF-8.
        encoding, errors = (None, None) if "b" in mode else ("utf-8", "backslashreplace")
        with naming(path, temporary), open(temporary, mode, encoding=encoding, errors=errors) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with naming(path, temporary):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path, pattern: str, seconds: float = 0) -> None:
    """Removes what killed processes left of `atomic_write` to files whose names match a glob, if it is so old.

    Without `seconds`, no other process may be writing these files.
    """
    for left_behind in folder.glob(f".{pattern}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if time.time() - left_behind.stat().st_mtime >= seconds:
                left_behind.unlink()


@contextlib.contextmanager
def atomic_folder(folder: str | Path, last: str) -> Iterator[Path]:
    """Yields a temporary folder inside `folder`; at the end moves its files into `folder`, the file named `last` last.

    `last` is the meta file that lists the others. A kill leaves either all old files or all new files. Only a kill
    while the files are being moved leaves a mixture, with a meta file that says so. The next run removes what a killed
    run left behind, and old files that the new meta file does not list. Raises UserError if another process is writing
    or reading the same files, or if the disk is full.
    """
    folder = Path(folder)
    temporary = folder / f".prepare-{last}"
    with writing(folder, last):
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
        temporary.mkdir(parents=True)
        try:
            yield temporary
            _replace_files(folder, temporary, last)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise UserError(f"cannot write to {folder}: {error.strerror}; the old files are unchanged") from None
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _replace_files(folder: Path, temporary: Path, last: str) -> None:
    """Moves the files of `temporary` into `folder`, `last` after the others, and removes outdated files."""
    old_names = _listed_files(folder / last)
    if (folder / last).exists():
        write_json(folder / last, {"incomplete": "files are being replaced"})
    for path in sorted(temporary.iterdir(), key=lambda path: (path.name == last, path.name)):
        os.replace(path, folder / path.name)
    for name in old_names - _listed_files(folder / last):
        (folder / name).unlink(missing_ok=True)


def _listed_files(meta: Path) -> set[str]:
    """Returns the token files and the tokenizer that a meta file lists, or nothing if it cannot be read."""
    try:
        names = read_json(meta)["files"]
        return {name for name in names if is_file_name(name) and name.endswith((".bin", "tokenizer.json"))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def claim_folder(folder: Path, meta: str, files: Iterable[str], overwrite: bool) -> None:
    """Raises UserError if a folder holds files that match one of the globs `files`, unless `overwrite` is set.

    Also raises UserError if another process writes or reads the files that `meta` lists. This check comes early, before
    a long preparation; `atomic_folder` locks them.
    """
    with writing(folder, meta):
        pass
    require_no_files(folder, files, overwrite)


def require_no_files(folder: Path, files: Iterable[str], overwrite: bool) -> None:
    """Raises UserError if a folder holds files that match one of the globs `files`, unless `overwrite` is set."""
    taken = next((path for pattern in files for path in sorted(folder.glob(pattern))), None)
    if taken and not overwrite:
        raise UserError(f"{taken} exists: add --overwrite to replace the data there, or choose another --out")


def read_utf8(path: str | Path | None = None, max_bytes: int | None = None) -> str:
    """Returns the text of a file, or without `path` all of standard input.

    Raises UserError if the file cannot be read, is longer than `max_bytes`, or is not UTF-8.
    """
    with _open_binary(path) as file:
        content = file.read() if max_bytes is None else file.read(max_bytes + 1)
    if max_bytes is not None and len(content) > max_bytes:
        raise UserError(f"{_name(path)} is longer than {max_bytes:,} bytes: name a smaller file")
    return _decode(content, _name(path))


def read_utf8_lines(path: str | Path | None = None) -> Iterator[str]:
    """Yields the lines of a file, or without `path` those of standard input, without their line breaks.

    Raises UserError if the file cannot be read, or for a line that is not UTF-8 or longer than `MAX_LINE` bytes.
    """
    with _open_binary(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            where = f"{_name(path)}, line {number}"
            if len(line) > MAX_LINE:
                raise UserError(f"{where} is longer than {MAX_LINE:,} bytes: split it")
            yield _decode(line, where).rstrip("\r\n")


@contextlib.contextmanager
def _open_binary(path: str | Path | None) -> Iterator[BinaryIO]:
    if path is None:
        yield sys.stdin.buffer
        return
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _name(path: str | Path | None) -> str:
    return "standard input" if path is None else str(path)


def _decode(content: bytes, where: str) -> str:
    try:
        if b"\0" in content:  # UTF-16 of plain English is valid UTF-8, except for these
            raise ValueError
        return content.decode("utf-8")
    except ValueError:
        raise UserError(f"{where} is not UTF-8 text: convert it to UTF-8 first") from None


def write_json(path: str | Path, value: object) -> None:
    """Writes a value as indented JSON with `atomic_write`."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
