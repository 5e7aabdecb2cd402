"""`--data` of the training scripts: a folder of prepared data, or a file or a small data set that is prepared first."""

from __future__ import annotations

import atexit
import contextlib
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from system.cli import without_secrets
from system.errors import UserError
from text.remote import RemoteFile, is_url, with_plain_path
from text.token_files import is_prepared_from
from training.config import TrainerConfig


def prepare_first(
    data: str | Path,
    names: Collection[str],
    meta: str,
    config: TrainerConfig,
    n_processes: int,
    prepare: Callable[[Path, bool], None],
) -> Path:
    """Returns the folder with the prepared data that `--data` stands for.

    If `data` is a file, the URL of one, or one of the data sets `names`, the folder is named after it, and `prepare` is
    called with that folder and with whether to replace what is there. With `--plan` the folder is a temporary one, of
    which nothing is printed. A resumed run goes on with what was prepared for it. `meta` is the name of the folder's
    meta file. Raises UserError if several processes would prepare the data together, if the folder holds data of
    another source, or if a URL names no file.
    """
    data = with_plain_path(str(data))
    file: Path | RemoteFile = RemoteFile(data) if is_url(data) else Path(data)
    shown = without_secrets(data)
    if isinstance(file, RemoteFile):
        if data.endswith("/") or not file.stem or "*" in file.name:
            raise UserError(f"--data takes the URL of one file, not {shown}: prepare that with prepare_data.py --input")
    elif file.is_dir() or not (data in names or file.suffix or file.is_file()):
        return file
    folder = Path(temporary_folder()) if config.plan else Path("data") / file.stem
    is_prepared = is_prepared_from(folder / meta, data)
    if config.resume and is_prepared:
        print(f"reading {folder}, which was prepared from {shown}; changes of {shown} since then are ignored")
    elif n_processes > 1:
        raise UserError(f"several processes cannot prepare {shown} together: start with one, or name a prepared folder")
    elif (folder / meta).exists() and not is_prepared:  # not even with --overwrite, which is for the checkpoint
        raise UserError(
            f"{shown} would be prepared in {folder}, which holds other data: rename {file.name}, or that folder"
        )
    else:
        with contextlib.redirect_stdout(None) if config.plan else contextlib.nullcontext():
            prepare(folder, config.overwrite or is_prepared)
    return folder


def temporary_folder() -> str:
    """Returns the path of a folder that is removed when the process ends."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return folder.name
