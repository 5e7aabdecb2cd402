"""Locks between processes: one writer for an output; for a folder, one writer or any number of readers.

The kernel frees a lock when its process ends, however it ends. A killed process leaves a hidden lock file behind, which
the next process with the same output uses and removes. On a file system without locks, nothing is locked.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from system.errors import UserError
from system.interrupts import before_death

_WAIT = 0.5  # seconds; a new reader locks a folder for a moment

Argument = TypeVar("Argument")
Held = TypeVar("Held")

_until_main_ends = contextlib.ExitStack()
before_death.append(_until_main_ends.close)


@contextlib.contextmanager
def locked(path: Path, refusal: str, remedy: str) -> Iterator[bool]:
    """Holds a lock file until the block ends; yields False if the file system has no locks, or is read-only.

    Raises UserError if another process holds the lock. Its message joins `refusal`, the process, and `remedy`.
    """
    missing_folders = [folder for folder in path.parents if not folder.exists()]
    # A soft lock would survive a kill. With the mode, another user's process can try the lock too.
    lock = FileLock(path, mode=0o666, fallback_to_soft=False)
    may_be_anothers = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_WAIT)
        path.write_text(str(os.getpid()))
    except Timeout:
        raise UserError(f"{refusal}{_process_in(path)}: {remedy}") from None
    except (OSError, NotImplementedError) as error:
        may_be_anothers = isinstance(error, PermissionError)
    try:
        yield lock.is_locked
    finally:
        with contextlib.suppress(OSError):
            if not may_be_anothers:
                path.unlink()  # before the release: `filelock` notices if the file that it has just locked was removed
        lock.release()
        with contextlib.suppress(OSError):
            for folder in missing_folders:
                folder.rmdir()  # unless something was written


def output_lock(out: Path) -> Path:
    """Returns the lock file of a run that writes the checkpoint `out`."""
    return out.with_name(f".{out.name}.lock")


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock file. If none does, this call holds it for a moment, which `locked` waits for."""
    if not path.exists():
        return False
    lock = FileLock(path, mode=0o666, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # without locks, nobody can tell
        return False
    lock.release()
    return False


def _process_in(path: Path) -> str:
    """Returns " (process 123)" for the process that holds a lock file, or nothing if the file does not say."""
    with contextlib.suppress(OSError, ValueError):
        return f" (process {int(path.read_text())})"
    return ""


@contextlib.contextmanager
def writing(folder: Path, meta: str) -> Iterator[None]:
    """Lets one process replace the files of a folder that a meta file lists, while no process reads them.

    Raises UserError if another process writes or reads them.
    """
    remedy = "wait for it, or choose another --out"
    with locked(_writer_lock(folder, meta), f"{folder} is being written by another run", remedy):
        for reader in folder.glob(f".{glob.escape(meta)}.reader-*"):
            with locked(reader, f"{folder} is being read by a training run", f"{remedy}; --data {folder} reads it too"):
                pass  # its process was killed: the lock file goes
        yield


@contextlib.contextmanager
def reading(folder: Path, meta: str) -> Iterator[None]:
    """Keeps other processes from replacing the files of a folder that a meta file lists.

    Raises UserError if another process is replacing them. A read-only folder needs no lock.
    """
    if not folder.is_dir():
        yield
        return
    with contextlib.ExitStack() as stack:
        refusal, remedy = f"{folder} is being written by another run", "wait for it, or choose another --data"
        with locked(_writer_lock(folder, meta), refusal, remedy):
            reader = folder / f".{meta}.reader-{secrets.token_hex(4)}"
            stack.enter_context(locked(reader, refusal, remedy))
        yield


def _writer_lock(folder: Path, meta: str) -> Path:
    return folder / f".{meta}.lock"


def hold(lock: contextlib.AbstractContextManager[Held]) -> Held:
    """Takes a lock until a `main` with `releases_locks` ends. Returns what the lock yields."""
    return _until_main_ends.enter_context(lock)


def releases_locks(main: Callable[[Argument], None]) -> Callable[[Argument], None]:
    """Decorates the `main` of a script: at its end, however it ends, everything that `hold` took is released."""

    @functools.wraps(main)
    def wrapper(config: Argument) -> None:
        with _until_main_ends:
            main(config)

    return wrapper
