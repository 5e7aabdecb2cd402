"""Files on disk: atomic writes of files and of folders, locks, and UTF-8 text."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

from filelock import FileLock, Timeout

from system.errors import UserError
from system.untrusted import is_file_name, read_json

_LOCK = "lock"


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Yields a temporary file beside `path`, flushes it to the disk and renames it to `path`.

    Whatever happens meanwhile, `path` holds either its old content or all of the new content. `mode` is "wb" or "w"
    (UTF-8 text).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_behind in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # of a process that was killed
        if time.time() - left_behind.stat().st_mtime > 3600:
            left_behind.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: str | Path, last: str) -> Iterator[Path]:
    """Yields a temporary folder inside `folder`; at the end moves its files into `folder`, the file named `last` last.

    `last` is the meta file that lists the others. A kill leaves either all old files or all new files. Only a kill
    while the files are being moved leaves a mixture, with a meta file that says so. The next run removes what a killed
    run left behind, and old files that the new meta file does not list. Raises UserError if another process is writing
    the same files, or if the disk is full.
    """
    folder = Path(folder)
    temporary = folder / f".prepare-{last}"
    temporary.mkdir(parents=True, exist_ok=True)
    with _locked(temporary):
        try:
            for path in _files_in(temporary):  # of a run that was killed
                path.unlink()
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
    for path in sorted(_files_in(temporary), key=lambda path: (path.name == last, path.name)):
        os.replace(path, folder / path.name)
    for name in old_names - _listed_files(folder / last):
        (folder / name).unlink(missing_ok=True)


def _files_in(temporary: Path) -> list[Path]:
    return [path for path in temporary.iterdir() if path.name != _LOCK]


def _listed_files(meta: Path) -> set[str]:
    """Returns the token files and the tokenizer that a meta file lists, or nothing if it cannot be read."""
    try:
        names = read_json(meta)["files"]
        return {name for name in names if is_file_name(name) and name.endswith((".bin", "tokenizer.json"))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time use a folder, until the block ends or the process dies.

    The lock file goes when the folder is removed: `filelock` notices if the file that it has just locked was removed.
    A soft lock would survive a kill, so on a file system without locks nothing is locked.
    """
    lock = FileLock(folder / _LOCK, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"another run is writing to {folder.parent}: wait for it, or choose another --out") from None
    except (OSError, NotImplementedError):  # the file system has no locks
        pass
    try:
        yield
    finally:
        lock.release()


def claim_folder(folder: Path, files: str, overwrite: bool) -> None:
    """Raises UserError if a folder holds files that match the glob `files`, unless `overwrite` is set."""
    if not overwrite and (taken := next(folder.glob(files), None)):
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

    Raises UserError if the file cannot be read, or for a line that is not UTF-8.
    """
    with _open_binary(path) as file:
        for number, line in enumerate(file, 1):
            yield _decode(line, f"{_name(path)}, line {number}").rstrip("\r\n")


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
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{where} is not UTF-8 text: convert it to UTF-8 first") from None


def write_json(path: str | Path, value: object) -> None:
    """Writes a value as indented JSON with `atomic_write`."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
