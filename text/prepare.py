"""Text → token files, in order, on all cores and in constant memory."""

import os
import threading
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from system.cli import command_line, progress
from system.errors import UserError
from system.files import atomic_folder, flush, read_json, require_no_files, write_json
from text.corpus import CHUNK, Corpus, Piece
from text.token_files import SPLITS, append_tokens, count_tokens, files_by_split, report, statistics
from text.tokenizer import Tokenizer, train_bpe

BPE_CHARACTERS = 200_000_000  # enough training text to train a tokenizer
SHARD_TOKENS = 100_000_000  # for corpora of billions of tokens
Group = tuple[str, list[str], bool]
"""A split, texts for it of about CHUNK characters in all, and whether the last text goes on in the next group."""


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer | int,
    out: Path,
    *,
    val_fraction: float = 0.1,
    seed: int = 1337,
    workers: int | None = None,
    shard_tokens: int | None = None,
    max_tokens: int | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Tokenizes a corpus into `out`; returns lines that say what was written.

    An integer as `tokenizer` trains a BPE of this size on the training text first. The files are train.bin and val.bin,
    or shards of `shard_tokens` tokens, with at most `max_tokens` tokens in total. They appear together at the end. The
    shards of an interrupted run with the same settings are kept. `workers` is the number of threads, by default one per
    core; it never changes the output. Raises UserError if there are old files and no `overwrite`, or if a split gets no
    text.
    """
    require_no_files(out, ["train*.bin", "val*.bin", "meta.json", "tokenizer.json"], overwrite)
    if isinstance(tokenizer, int):
        tokenizer = train_tokenizer(corpus.pieces(val_fraction, seed), tokenizer)
    if corpus.first_shard_val:
        shard_tokens = shard_tokens or SHARD_TOKENS
    with atomic_folder(out, last="meta.json", keep=shard_tokens is not None) as folder:
        state = _resume(folder, [corpus.source, tokenizer.name, val_fraction, seed, shard_tokens, max_tokens])
        groups = _grouped(corpus.pieces(val_fraction, seed))
        _write(groups, tokenizer, folder, state, workers, shard_tokens, max_tokens, corpus.first_shard_val)
        files = files_by_split(path.name for path in folder.iterdir())
        counts = count_tokens(folder, files, tokenizer)
        for split, purpose, remedy in (
            ("train", "train on", "a smaller --shard-tokens"),
            ("val", "validate with", "a larger --val-fraction or --max-tokens"),
        ):
            if not counts[split][: tokenizer.end_of_text].any():
                notes = corpus.notes.in_brackets()
                raise UserError(f"there is no text to {purpose}: use more text, or {remedy}{notes}")
        names = dict(files)
        if tokenizer.spec != "gpt2":
            names["tokenizer"] = ["tokenizer.json"]
            (folder / "tokenizer.json").write_text(tokenizer.spec, encoding="utf-8")
        meta = {
            "files": names,
            "tokenizer": tokenizer.name,
            "n_tokens": tokenizer.n_tokens,
            "splits": {split: statistics(counts[split], tokenizer) for split in SPLITS},
            "source": corpus.source,
            "notes": corpus.notes.lines(),
            "command": command_line(),
            "format_version": 1,
        }
        write_json(folder / "meta.json", meta)
        (folder / "progress.json").unlink(missing_ok=True)
    return [*report(out, files, counts, tokenizer), *corpus.notes.lines(), f"wrote {out}, tokenizer {tokenizer.name}"]


def _resume(folder: Path, settings: list) -> dict[str, Any]:
    """Returns the progress of an interrupted run with equal settings, and cuts its token files to it.

    Without such a run the folder is emptied, and the progress is none.
    """
    state: dict[str, Any] = {"settings": settings, "groups": 0, "checksum": 0, "sizes": {}}
    if (folder / "progress.json").exists() and read_json(folder / "progress.json")["settings"] == settings:
        state = read_json(folder / "progress.json")
    for path in folder.iterdir():
        if path.name in state["sizes"]:
            os.truncate(path, state["sizes"][path.name])
        elif path.name != "progress.json":
            path.unlink()
    return state


def _write(
    groups: Iterator[Group],
    tokenizer: Tokenizer,
    folder: Path,
    state: dict[str, Any],
    workers: int | None,
    shard_tokens: int | None,
    max_tokens: int | None,
    first_shard_val: bool,
) -> None:
    """Tokenizes groups into token files, after those that an interrupted run tokenized. `state` is its progress.

    Every time a shard is complete, the progress is saved. Raises UserError if the text is not that of the progress.
    """
    checksum = 0
    for _, texts, _ in islice(groups, state["groups"]):
        checksum = _checksum(texts, checksum)
    if checksum != state["checksum"]:
        raise UserError(f"the text is not that of the interrupted run: remove {folder} to begin anew")
    files = files_by_split(state["sizes"])
    n_tokens = {split: sum(state["sizes"][name] for name in files[split]) // 2 for split in SPLITS}
    with progress(total=max_tokens, initial=sum(n_tokens.values()), unit=" tokens", unit_scale=True) as bar:
        for (split, texts, _), ids in tokenized(groups, tokenizer, workers or os.cpu_count() or 1):
            state["groups"] += 1
            state["checksum"] = _checksum(texts, state["checksum"])
            if max_tokens:
                ids = ids[: max_tokens - sum(n_tokens.values())]
            bar.update(len(ids))
            n_val = max(0, shard_tokens - n_tokens["val"]) if first_shard_val and shard_tokens else 0
            n_shards = len(list(folder.glob("*.bin")))
            for name, part in (("val", ids[:n_val]), (split, ids[n_val:])):
                append_tokens(folder, name, part, n_tokens[name], shard_tokens)
                n_tokens[name] += len(part)
            if shard_tokens and len(list(folder.glob("*.bin"))) > n_shards:
                flush(folder)
                sizes = {path.name: path.stat().st_size for path in folder.glob("*.bin")}
                write_json(folder / "progress.json", {**state, "sizes": sizes})
            if sum(n_tokens.values()) == max_tokens:
                break


def _checksum(texts: list[str], before: int) -> int:
    return zlib.crc32("".join(texts).encode(), before)


def train_tokenizer(pieces: Iterable[Piece], vocab_size: int) -> Tokenizer:
    """Trains a tokenizer on the training text among the pieces of a corpus."""

    def texts() -> Iterator[str]:
        left = BPE_CHARACTERS
        for split, text, _ in pieces:
            if split == "train":
                yield text[:left]
                left -= len(text)
            if left <= 0:
                return

    return train_bpe(progress(texts(), desc=f"training a tokenizer of {vocab_size:,} tokens"), vocab_size)


def tokenized(groups: Iterable[Group], tokenizer: Tokenizer, workers: int) -> Iterator[tuple[Group, np.ndarray]]:
    """Yields groups in order, each with its ids, uint16 (n,).

    The workers are threads: tiktoken runs outside Python's global lock. Each has its own tokenizer: threads that share
    one wait for its compiled pattern.
    """
    pending: deque[Future[tuple[Group, np.ndarray]]] = deque()
    local = threading.local()

    def start_thread() -> None:
        local.tokenizer = Tokenizer(tokenizer.mergeable_ranks, tokenizer.spec)

    def encode(group: Group) -> tuple[Group, np.ndarray]:
        _, texts, last_goes_on = group
        ids = local.tokenizer.encode_documents(texts)
        return group, ids[:-1] if last_goes_on else ids

    with ThreadPoolExecutor(workers, initializer=start_thread) as pool:
        try:
            for group in groups:
                pending.append(pool.submit(encode, group))
                if len(pending) > workers + 1:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _grouped(pieces: Iterable[Piece]) -> Iterator[Group]:
    """Groups pieces by split."""
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    size = 0
    for split, text, ends in pieces:
        texts[split].append(text)
        size += len(text)
        if size >= CHUNK or not ends:
            yield from ((name, texts[name], name == split and not ends) for name in SPLITS if texts[name])
            texts, size = {name: [] for name in SPLITS}, 0
    yield from ((name, texts[name], False) for name in SPLITS if texts[name])
