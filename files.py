"""Files on disk: atomic writes, and the token files with the `meta.json` that says what belongs together."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from cli import UserError


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Opens a temporary file beside `path` and renames it to `path` once it is written and on the disk.

    Whatever happens in between, `path` holds either what it held before or the whole new content.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
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
    """Yields a temporary folder inside `folder`; at the end its files are renamed into `folder`, `last` after the rest.

    The old `last` (the meta file that vouches for the others) is removed before the first file is replaced, so that a
    kill at any moment leaves a whole old set, a whole new set, or files that nothing vouches for.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".prepare-", dir=folder))
    try:
        yield temporary
        (folder / last).unlink(missing_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda path: (path.name == last, path.name)):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | Path, value: object) -> None:
    """Writes a value as indented JSON, atomically."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_meta(path: str | Path, command: str) -> dict:
    """Reads a `meta.json`. Raises UserError, naming the command that makes one, where it is missing or damaged."""
    path = Path(path)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        meta["files"], meta["tokenizer"], meta["splits"]  # noqa: B018
        return meta
    except FileNotFoundError:
        raise UserError(f"no prepared data in {path.parent} ({path.name} is missing): run {command} first") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: run {command} again") from None


def read_token_meta(folder: Path) -> dict:
    """Reads the `meta.json` of pre-training data; token files without one are taken for GPT-2's (nanoGPT, llm.c).

    Raises UserError where there is neither.
    """
    names = sorted(path.name for path in folder.glob("*.bin") if not path.name.startswith("sft_"))
    if (folder / "meta.json").exists() or not all(any(split in name for name in names) for split in ("train", "val")):
        return read_meta(folder / "meta.json", "prepare_data.py")
    return {"files": names, "tokenizer": "gpt2", "splits": {}}


def read_text(path: str | Path) -> str:
    """Reads a UTF-8 text file (a byte-order mark is dropped). Raises UserError where it is not readable as such."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
