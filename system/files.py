"""Files on disk: atomic writes of files and of folders, one writer for each output, UTF-8 text and JSON."""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from filelock import FileLock, Timeout

from system.errors import UserError


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Yields a temporary file beside `path`, flushes it to the disk and renames it to `path`.

    Whatever happens meanwhile, `path` holds either its old content or all of the new content. `mode` is "wb" or "w"
    (UTF-8 text). The temporary file has a fixed name, so the next write replaces what a killed process left.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # as on a full disk: name the file that the user knows
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes from writing an output, a file or a folder's meta file, until the block ends.

    The lock is the hidden file `.NAME.lock` beside it. The kernel frees it when its process ends, however it ends. On a
    file system without locks nothing is locked. Raises UserError if another process writes the output.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(path)
    try:
        lock.acquire(timeout=0.5)  # `is_locked` holds it for a moment
    except Timeout:
        raise UserError(f"{path} is being written by another run: wait for it, or choose another --out") from None
    except (NotImplementedError, PermissionError):
        pass
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                os.unlink(lock.lock_file)  # before the release: whoever waits sees that the file has gone
            lock.release()


def is_locked(path: Path) -> bool:
    """Whether another process is writing an output."""
    lock = _lock(path)
    if not Path(lock.lock_file).exists():
        return False
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except (NotImplementedError, OSError):
        return False
    lock.release()
    return False


def _lock(path: Path) -> FileLock:
    return FileLock(path.with_name(f".{path.name}.lock"), mode=0o666, fallback_to_soft=False)


@contextlib.contextmanager
def atomic_folder(folder: str | Path, last: str, keep: bool = False) -> Iterator[Path]:
    """Yields a temporary folder inside `folder`; at the end moves its files into `folder`, the file named `last` last.

    `last` is the meta file that lists the others under `files`. A kill leaves either all old files or all new files.
    Only a kill while the files are being moved leaves a mixture, without a meta file. Old files that the new meta file
    does not list are removed. With `keep`, an interrupted run leaves its temporary folder to the next run. Raises
    UserError if another process is writing the same files.
    """
    folder = Path(folder)
    temporary = folder / f".{last}.tmp"
    with locked(folder / last):
        if not keep:
            shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
        temporary.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            flush(temporary)
            outdated = _listed_files(folder / last)
            (folder / last).unlink(missing_ok=True)
            for path in sorted(temporary.iterdir(), key=lambda path: (path.name == last, path.name)):
                os.replace(path, folder / path.name)
            for name in outdated - _listed_files(folder / last):
                (folder / name).unlink(missing_ok=True)
            keep = False
        finally:
            if not keep:
                shutil.rmtree(temporary, ignore_errors=True)


def flush(folder: Path) -> None:
    """Flushes the files in a folder to the disk."""
    for path in folder.iterdir():
        with open(path, "r+b") as file:
            os.fsync(file.fileno())


def _listed_files(meta: Path) -> set[str]:
    """Returns the token files and the tokenizer that a meta file lists, or nothing if it cannot be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        files = read_json(meta)["files"]  # by split; up to version 0.2 a list
        names = files if isinstance(files, list) else [name for group in files.values() for name in group]
        return {name for name in names if name == Path(name).name and name.endswith((".bin", ".json"))}
    return set()


def require_no_files(folder: Path, files: Iterable[str], overwrite: bool) -> None:
    """Raises UserError if a folder holds files that match one of the globs `files`, unless `overwrite` is set."""
    taken = next((path for pattern in files for path in sorted(folder.glob(pattern))), None)
    if taken and not overwrite:
        raise UserError(f"{taken} exists: add --overwrite to replace the data there, or choose another --out")


def read_utf8(path: str | Path | None = None) -> str:
    """Returns the text of a file, or without `path` all of standard input. Raises UserError if it is not UTF-8."""
    with _open_binary(path) as file:
        return _decode(file.read(), path)


def read_utf8_lines(path: str | Path | None = None) -> Iterator[str]:
    """Yields the lines of a file, or without `path` those of standard input. Raises UserError as `read_utf8` does."""
    with _open_binary(path) as file:
        for line in file:
            yield _decode(line, path).rstrip("\r\n")


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


def _decode(content: bytes, path: str | Path | None) -> str:
    try:
        if b"\0" in content:  # UTF-16 of plain English is valid UTF-8, except for these
            raise ValueError
        return content.decode("utf-8")
    except ValueError:
        raise UserError(f"{path or 'standard input'} is not UTF-8 text: convert it to UTF-8 first") from None


def read_json(path: str | Path) -> Any:
    """Reads a JSON file. Raises OSError if the file cannot be read, and ValueError if it is not JSON."""
    return json.loads(Path(path).read_bytes())


def write_json(path: str | Path, value: object) -> None:
    """Writes a value as indented JSON with `atomic_write`."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
