"""Text → token files, in order, on all cores and in constant memory."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from system.cli import command_line, progress
from system.errors import UserError
from system.files import atomic_folder, require_no_files, write_json
from text.corpus import CHUNK, Corpus, Piece
from text.sources import Notes
from text.token_files import SPLITS, TokenFiles, read_tokens, statistics
from text.tokenizer import Tokenizer, train_bpe

BPE_CHARACTERS = 200_000_000  # enough training text to train a tokenizer
SHARD_TOKENS = 100_000_000  # for corpora of billions of tokens
SplitIds = tuple[str, np.ndarray]
"""A split and ids for it, uint16 (n,)."""


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer | int,
    out: Path,
    source: str | list[str],
    *,
    val_fraction: float = 0.1,
    seed: int = 1337,
    workers: int | None = None,
    shard_tokens: int | None = None,
    max_tokens: int | None = None,
    overwrite: bool = False,
) -> tuple[dict[str, np.ndarray], Tokenizer]:
    """Tokenizes a corpus into `out`; returns how often each id was written, int64 (ids,) by split, and the tokenizer.

    An integer as `tokenizer` trains a BPE of this size on the training text first. The files are train.bin and val.bin,
    or shards of `shard_tokens` tokens, with at most `max_tokens` tokens in total. They appear together at the end. The
    shards that a killed run with the same settings completed are kept. `workers` is the number of threads, by default
    one per core; it never changes the output. `source` goes into meta.json. Raises UserError if there are old files and
    no `overwrite`, or if a split gets no text.
    """
    is_gpt2 = isinstance(tokenizer, Tokenizer) and tokenizer.spec == "gpt2"
    written = ["train*.bin", "val*.bin", "meta.json"]
    require_no_files(out, written if is_gpt2 else [*written, "tokenizer.json"], overwrite)
    if isinstance(tokenizer, int):
        tokenizer = train_tokenizer(corpus.pieces(val_fraction, seed), tokenizer)
    if corpus.first_shard_val:
        shard_tokens = shard_tokens or SHARD_TOKENS
    settings = None
    if shard_tokens and (corpus.first_shard_val or not max_tokens):  # otherwise max_tokens cuts two splits at once
        settings = [corpus.origin, tokenizer.name, val_fraction, seed, shard_tokens, max_tokens]
    with atomic_folder(out, last="meta.json", settings=settings) as folder:
        files = {split: TokenFiles(folder, split, tokenizer.n_tokens, shard_tokens) for split in SPLITS}
        pieces = corpus.pieces(val_fraction, seed)
        val_tokens = shard_tokens if corpus.first_shard_val else None
        _write(pieces, files, tokenizer, workers or os.cpu_count() or 1, val_tokens, max_tokens)
        counts = {split: files[split].counts for split in SPLITS}
        _require_text(counts, tokenizer, corpus.notes)
        names = {split: files[split].names for split in SPLITS}
        if tokenizer.spec != "gpt2":
            names["tokenizer"] = ["tokenizer.json"]
            (folder / "tokenizer.json").write_text(tokenizer.spec, encoding="utf-8")
        meta = {
            "files": names,
            "tokenizer": tokenizer.name,
            "n_tokens": tokenizer.n_tokens,
            "splits": {split: statistics(counts[split], tokenizer) for split in SPLITS},
            "source": source,
            "notes": corpus.notes.lines(),
            "command": command_line(),
            "format_version": 1,
        }
        write_json(folder / "meta.json", meta)
    return counts, tokenizer


def _write(
    pieces: Iterable[Piece],
    files: dict[str, TokenFiles],
    tokenizer: Tokenizer,
    workers: int,
    val_tokens: int | None,
    max_tokens: int | None,
) -> None:
    """Tokenizes pieces into token files, the first `val_tokens` tokens into those of "val", and at most `max_tokens`.

    What complete shards already hold is left out.
    """
    train, val = files["train"], files["val"]
    groups = {"train": [val, train]} if val_tokens else {"train": [train], "val": [val]}
    finished = {split: _finished(group, tokenizer.end_of_text) for split, group in groups.items()}
    n_tokens = sum(file.n_tokens for file in files.values())
    batches = tokenized(_unfinished(pieces, {split: n for split, (n, _) in finished.items()}), tokenizer, workers)
    with progress(total=max_tokens, initial=n_tokens, unit=" tokens", unit_scale=True) as bar:
        left = {split: n for split, (_, n) in finished.items()}
        for split, ids in batches:
            ids, left[split] = ids[left[split] :], max(0, left[split] - len(ids))
            if max_tokens:
                ids = ids[: max_tokens - n_tokens]
            bar.update(len(ids))
            n_tokens += len(ids)
            if val_tokens:
                n_val = val_tokens - val.n_tokens
                val.write(ids[:n_val])
                ids = ids[n_val:]
            files[split].write(ids)
            if n_tokens == max_tokens:
                break
    for file in files.values():
        file.close()


def _finished(files: list[TokenFiles], separator: int) -> tuple[int, int]:
    """Returns how many documents complete shards hold, and how many tokens of the document that follows."""
    n_documents, n_tokens = 0, 0
    for path in (file.folder / name for file in files for name in file.names):
        ids = read_tokens(path)
        ends = np.flatnonzero(ids == separator)
        n_documents += len(ends)
        n_tokens = len(ids) - 1 - int(ends[-1]) if len(ends) else n_tokens + len(ids)
    return n_documents, n_tokens


def _unfinished(pieces: Iterable[Piece], n_documents: dict[str, int]) -> Iterator[Piece]:
    """Yields the pieces behind the first `n_documents` of each split. They are read, but not tokenized."""
    for split, text, ends in pieces:
        if not n_documents[split]:
            yield split, text, ends
        elif ends:
            n_documents[split] -= 1


def train_tokenizer(pieces: Iterable[Piece], vocab_size: int) -> Tokenizer:
    """Trains a tokenizer on the training text among the pieces of a corpus, and says so."""
    print(f"training a tokenizer of {vocab_size:,} tokens on the text", flush=True)

    def texts() -> Iterator[str]:
        left = BPE_CHARACTERS
        for split, text, _ in pieces:
            if split == "train":
                yield text[:left]
                left -= len(text)
            if left <= 0:
                return

    tokenizer = train_bpe(texts(), vocab_size)
    if tokenizer.end_of_text < vocab_size:
        print(f"the text is too short for that: the tokenizer has {tokenizer.end_of_text:,} tokens")
    return tokenizer


def _require_text(counts: dict[str, np.ndarray], tokenizer: Tokenizer, notes: Notes) -> None:
    """Raises UserError if a split has no token of text."""
    has_text = {split: counts[split][: tokenizer.end_of_text].any() for split in SPLITS}
    if not has_text["train"]:
        remedy = ": try a smaller --shard-tokens, since the first shard is for validation" if has_text["val"] else ""
        raise UserError(f"there is no text to train on{remedy}{notes.in_brackets()}")
    if not has_text["val"]:
        raise UserError(
            "nothing is left to validate with: use more text, a larger --val-fraction or a larger --max-tokens"
            f"{notes.in_brackets()}"
        )


def tokenized(pieces: Iterable[Piece], tokenizer: Tokenizer, workers: int) -> Iterator[SplitIds]:
    """Yields the ids of pieces in batches of about CHUNK characters; within a split, in order.

    The workers are threads, each with its own tokenizer. tiktoken runs outside Python's global lock, so threads use as
    many cores as processes would, and neither text nor ids are copied between processes.
    """
    pending: deque[tuple[str, Future[np.ndarray]]] = deque()
    local = threading.local()

    def start_thread() -> None:
        local.tokenizer = tokenizer.copy()

    def encode(texts: list[str], last_goes_on: bool) -> np.ndarray:
        return local.tokenizer.encode_documents(texts, last_goes_on)

    with ThreadPoolExecutor(workers, initializer=start_thread) as pool:
        try:
            for split, texts, last_goes_on in _grouped(pieces):
                pending.append((split, pool.submit(encode, texts, last_goes_on)))
                if len(pending) > workers + 1:
                    oldest_split, ids = pending.popleft()
                    yield oldest_split, ids.result()
            while pending:
                oldest_split, ids = pending.popleft()
                yield oldest_split, ids.result()
        finally:
            for _, ids in pending:
                ids.cancel()


def _grouped(pieces: Iterable[Piece]) -> Iterator[tuple[str, list[str], bool]]:
    """Groups pieces to about CHUNK characters, by split; yields (split, texts, whether the last text goes on)."""
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    size = 0
    for split, text, ends in pieces:
        texts[split].append(text)
        size += len(text)
        if size >= CHUNK or not ends:
            yield from ((name, texts[name], name == split and not ends) for name in SPLITS if texts[name])
            texts, size = {name: [] for name in SPLITS}, 0
    yield from ((name, texts[name], False) for name in SPLITS if texts[name])
