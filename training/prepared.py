"""`--data` of the training scripts: a folder of prepared data, or a file or a small data set that is prepared first."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

from system.cli import without_secrets
from system.errors import UserError
from text.conversations import prepare_conversations
from text.corpus import open_corpus
from text.prepare import prepare
from text.sources import CONVERSATIONS, TEXTS, is_url
from text.token_files import read_meta
from text.tokenizer import Tokenizer
from training.config import TrainerConfig
from training.parallel import Processes
from weights import checkpoint


def prepared_text(data: str | Path, config: TrainerConfig, tokenizer: Tokenizer | int, processes: Processes) -> Path:
    """Returns the folder of token files that `--data` stands for. An integer as `tokenizer` trains a BPE of this size.

    Raises UserError if it cannot be prepared.
    """
    small = [name for name, dataset in TEXTS.items() if not dataset.hub]
    data, folder, is_new = _folder_of(data, small, "meta.json", config, processes)
    if is_new:
        corpus = open_corpus(data, [] if data in small else [data])
        lines = prepare(corpus, tokenizer, folder, overwrite=config.overwrite or (folder / "meta.json").exists())
        if not config.plan:
            print(*lines, sep="\n")
    return folder


def prepared_conversations(
    data: str | Path, config: TrainerConfig, start: checkpoint.Checkpoint, processes: Processes
) -> Path:
    """Returns the folder of prepared conversations that `--data` stands for, as the checkpoint `start` needs them.

    Raises UserError if they cannot be prepared.
    """
    data, folder, is_new = _folder_of(data, CONVERSATIONS, "sft_meta.json", config, processes)
    if is_new:
        lines = prepare_conversations(
            data,
            None if data in CONVERSATIONS else data,
            checkpoint.tokenizer_of(start),
            folder,
            template=start.get("template") or "chat",
            block_size=start["config"].block_size,
            overwrite=config.overwrite or (folder / "sft_meta.json").exists(),
        )
        if not config.plan:
            print(*lines, sep="\n")
    return folder


def _folder_of(
    data: str | Path, names: Collection[str], meta: str, config: TrainerConfig, processes: Processes
) -> tuple[str, Path, bool]:
    """Returns `data` as text, its folder, and whether it must be prepared there first.

    If `data` is a file, the URL of one, or one of the data sets `names`, the folder is named after it; with `--plan` it
    is a temporary folder. A resumed run goes on with what was prepared for it. Raises UserError if several processes
    would prepare the data together, or if the folder holds data of another source.
    """
    data = str(data) if is_url(str(data)) else str(Path(data))
    path, shown = Path(data.partition("?")[0]), without_secrets(data)
    if not is_url(data) and (path.is_dir() or not (data in names or path.suffix or path.is_file())):
        return data, path, False
    if is_url(data) and (data.endswith("/") or "*" in path.name or len(path.parts) < 3):
        raise UserError(f"--data takes the URL of one file, not {shown}: prepare that with prepare_data.py --input")
    folder = Path("data") / path.stem
    if config.plan:
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = read_meta(folder / meta, "the preparation").get("source") if (folder / meta).exists() else None
    if config.resume and source in (shown, [shown]):
        processes.print(f"reading {folder}, which was prepared from {shown}; later changes of {shown} are ignored")
        return data, folder, False
    if processes.world_size > 1:
        raise UserError(f"several processes cannot prepare {shown} together: start with one, or name a prepared folder")
    if source not in (None, shown, [shown]):  # not even with --overwrite, which is for the checkpoint
        raise UserError(f"{shown} belongs in {folder}, which holds other data: rename {path.name}, or that folder")
    return data, folder, True
