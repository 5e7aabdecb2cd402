"""`--data` of the training scripts: a folder of prepared data, or a file or a small data set that is prepared first."""

import atexit
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from system.cli import without_secrets
from system.errors import UserError
from text.corpus import open_corpus
from text.prepare import prepare
from text.sources import TEXTS, is_url
from text.token_files import read_meta
from text.tokenizer import Tokenizer
from training.config import TrainerConfig
from training.parallel import Processes


def prepared_text(config: Any, tokenizer: Tokenizer | int, processes: Processes) -> Path:
    """Returns the folder of prepared text that `--data` of `train.py` stands for, as `prepared` does. `tokenizer` is
    that of text to prepare, or the size of one to train."""
    small = [name for name, dataset in TEXTS.items() if not dataset.hub]

    def prepare_text(data: str, folder: Path, overwrite: bool) -> list[str]:
        corpus = open_corpus(data) if data in small else open_corpus(data, [data])
        return prepare(corpus, tokenizer, folder, overwrite=overwrite)

    return prepared(config.data, small, "meta.json", config, processes, prepare_text)


def prepared(
    data: str | Path,
    names: Collection[str],
    meta: str,
    config: TrainerConfig,
    processes: Processes,
    prepare: Callable[[str, Path, bool], list[str]],
) -> Path:
    """Returns the folder of prepared data that `--data` stands for; `meta` is the name of its meta file.

    If `data` is a file, the URL of one, or one of the data sets `names`, the folder is named after it, and
    `prepare(data, folder, overwrite)` writes it and returns lines to print; with `--plan` that is a temporary folder.
    A resumed run goes on with what was prepared for it. Raises UserError if several processes would prepare the data
    together, or if the folder holds data of another source.
    """
    data = str(data) if is_url(str(data)) else str(Path(data))
    path, shown = Path(data.partition("?")[0]), without_secrets(data)
    is_source = is_url(data) or data in names or path.suffix or path.is_file()
    if path.is_dir() or not is_source:
        return path
    if is_url(data) and (data.endswith("/") or "*" in path.name or len(path.parts) < 3):
        raise UserError(f"--data takes the URL of one file, not {shown}: prepare that with prepare_data.py --input")
    folder = Path("data") / path.stem
    if config.plan:
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = read_meta(folder / meta, "the preparation").get("source") if (folder / meta).exists() else None
    if config.resume and source in (shown, [shown]):
        processes.print(f"reading {folder}, which was prepared from {shown}; later changes of {shown} are ignored")
        return folder
    if processes.world_size > 1:
        raise UserError(f"several processes cannot prepare {shown} together: start with one, or name a prepared folder")
    if source not in (None, shown, [shown]):  # not even with --overwrite, which is for the checkpoint
        raise UserError(f"{shown} belongs in {folder}, which holds other data: rename {path.name}, or that folder")
    lines = prepare(data, folder, config.overwrite or source is not None)
    if not config.plan:
        print(*lines, sep="\n")
    return folder
