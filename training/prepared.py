"""`--data` of the training scripts: a folder of prepared data, or a file or a small data set that is prepared first."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from system.errors import UserError
from system.locks import hold
from text.token_files import is_prepared_from
from training.config import Output


def prepare_first(
    data: Path,
    names: Collection[str],
    meta: str,
    config: Output,
    n_processes: int,
    prepare: Callable[[Path, bool], None],
) -> Path:
    """Returns the folder with the prepared data that `--data` stands for.

    If `data` is a file, or one of the data sets `names`, the folder is named after it, and `prepare` is called with
    that folder and with whether to replace what is there. With `--plan` the folder is a temporary one. A resumed run
    goes on with what was prepared for it. `meta` is the name of the folder's meta file. Raises UserError if several
    processes would prepare the data together, or if the folder holds data of another source.
    """
    if data.is_dir() or not (str(data) in names or data.suffix or data.is_file()):
        return data
    folder = Path(hold(tempfile.TemporaryDirectory())) if config.plan else Path("data") / data.stem
    is_prepared = is_prepared_from(folder / meta, str(data))
    if config.resume and is_prepared:
        print(f"reading {folder}, which was prepared from {data}; changes of {data} since then are ignored")
    elif n_processes > 1:
        raise UserError(f"several processes cannot prepare {data} together: start with one, or name a prepared folder")
    elif (folder / meta).exists() and not is_prepared:  # not even with --overwrite, which is for the checkpoint
        raise UserError(
            f"{data} would be prepared in {folder}, which holds other data: rename {data.name}, or that folder"
        )
    else:
        prepare(folder, config.overwrite or is_prepared)
    return folder
