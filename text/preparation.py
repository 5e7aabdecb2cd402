"""Text and conversations → token files, in order, on all cores and in constant memory."""

import shlex
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from system.errors import UserError
from system.files import atomic_folder, write_json
from text.corpora import CHUNK, Corpus
from text.token_files import TokenFiles, statistics
from text.tokenizer import Tokenizer

Piece = tuple[str, str, bool]
"""A split, "train" or "val", a part of a document's text, and whether the document ends with it."""


def write_corpus(
    pieces: Iterable[Piece],
    corpus: Corpus,
    tokenizer: Tokenizer,
    out: Path,
    facts: dict,
    *,
    workers: int,
    shard_tokens: int | None = None,
    max_tokens: int | None = None,
    first_shard_val: bool = False,
) -> dict[str, np.ndarray]:
    """Tokenizes `pieces` into `out`, each document followed by `<|endoftext|>`; returns how often each id was written.

    Files are train.bin and val.bin, or shards of `shard_tokens` tokens. `max_tokens` in all are written at most; with
    `first_shard_val` the first shard becomes validation data, whatever the pieces say. `facts` go into meta.json.
    The files appear together at the end; whatever happens before, the old ones stay as they were. The bytes depend on
    the text and the tokenizer, never on `workers`. Raises UserError where nothing is left for one of the splits.
    """
    with atomic_folder(out, last="meta.json") as folder:
        splits = {name: TokenFiles(folder, name, tokenizer.n_tokens, shard_tokens) for name in ("train", "val")}
        left = max_tokens or 1 << 62
        with Progress(corpus, max_tokens) as progress:
            for split, ids in tokenized(pieces, tokenizer, workers):
                ids = ids[:left]
                left -= len(ids)
                if first_shard_val:
                    n = shard_tokens - splits["val"].n_tokens
                    splits["val"].write(ids[:n])
                    split, ids = "train", ids[n:]
                splits[split].write(ids)
                progress.show(splits, tokenizer)
                if not left:
                    break
            progress.show(splits, tokenizer, at_once=True)
        for files in splits.values():
            files.close()
        counts = {name: files.counts for name, files in splits.items()}
        _require_text(counts, tokenizer, corpus, shard_tokens if first_shard_val else None)
        names = [name for files in splits.values() for name in files.names]
        if tokenizer.spec != "gpt2":
            (folder / "tokenizer.json").write_text(tokenizer.spec, encoding="utf-8")
            names.append("tokenizer.json")
        meta = {
            "files": names,
            "tokenizer": tokenizer.name,
            "n_tokens": tokenizer.n_tokens,
            "splits": {name: statistics(count, tokenizer) for name, count in counts.items()},
            **facts,
            "notes": corpus.notes.plain(),
            "command": shlex.join(["python", *sys.argv]),
            "format_version": 1,
        }
        write_json(folder / "meta.json", meta)
    return counts


def _require_text(counts, tokenizer, corpus, val_tokens):
    empty = [name for name, count in counts.items() if not count[: tokenizer.end_of_text].any()]
    notes = corpus.notes.in_brackets()
    if "train" in empty and val_tokens and len(empty) == 1:
        raise UserError(
            f"the first {val_tokens:,} tokens are for validation, none is left: try a smaller --shard-tokens"
        )
    if "train" in empty:
        raise UserError(f"there is no text to train on{notes}")
    if empty:
        raise UserError(
            f"nothing is left to validate with: use more text, a larger --val-fraction or a larger --max-tokens{notes}"
        )


def tokenized(pieces: Iterable[Piece], tokenizer: Tokenizer, workers: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (split, ids) of pieces in batches of about CHUNK characters, each split's in order.

    The workers are threads, each with a tokenizer of its own: tiktoken works outside Python's lock, so they use as many
    cores as processes would, and neither text nor ids have to be copied from one process to another.
    """
    pending, own = deque(), threading.local()

    def start():
        own.tokenizer = tokenizer.copy()

    def encode(*batch):
        return own.tokenizer.encode_documents(*batch)

    with ThreadPoolExecutor(workers, initializer=start) as pool:
        try:
            for split, texts, is_open in batches(pieces):
                pending.append((split, pool.submit(encode, texts, is_open)))
                if len(pending) > workers + 1:
                    split, ids = pending.popleft()
                    yield split, ids.result()
            while pending:
                split, ids = pending.popleft()
                yield split, ids.result()
        finally:
            for _, ids in pending:
                ids.cancel()


def batches(pieces: Iterable[Piece]) -> Iterator[tuple[str, list[str], bool]]:
    """Groups pieces to about CHUNK characters, by split; yields (split, texts, whether the last goes on)."""
    texts, size = {"train": [], "val": []}, 0
    for split, text, ends in pieces:
        texts[split].append(text)
        size += len(text)
        if size >= CHUNK or not ends:
            for name in texts:
                if texts[name]:
                    yield name, texts[name], name == split and not ends
            texts, size = {"train": [], "val": []}, 0
    yield from ((name, rest, False) for name, rest in texts.items() if rest)


def in_pieces(chunks: Iterable[str], size: int = CHUNK) -> Iterator[tuple[str, bool]]:
    """Yields a document of any length in pieces of about `size` characters, each with whether it is the last.

    A piece ends where a word ends and white space begins. The pattern that cuts text for the BPE always cuts there, so
    the tokens are those of the whole document. Only where 10,000 characters hold no such place may they differ.
    """
    text = ""
    for chunk in chunks:
        if len(text) >= size:
            end = len(text)
            while end > len(text) - 10_000:
                end = max(text.rfind(" ", 0, end), text.rfind("\n", 0, end))
                if end > 0 and not text[end - 1].isspace():
                    break
            else:
                end = len(text)
            yield text[:end], False
            text = text[end:]
        text += chunk
    yield text, True


class Progress(tqdm):
    """A bar of how far the corpus has been read, with documents, MB of text a second, tokens and the time left."""

    def __init__(self, corpus: Corpus, max_tokens: int | None):
        total = max_tokens or corpus.total
        super().__init__(
            desc="tokenizing",
            total=total,
            bar_format="{desc}: {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}"
            if total
            else "{desc}: {elapsed}{postfix}",
        )
        self.corpus, self.max_tokens, self.started, self.shown = corpus, max_tokens, time.monotonic(), 0.0

    def show(self, splits: dict[str, TokenFiles], tokenizer: Tokenizer, at_once: bool = False) -> None:
        """Redraws the bar, no more than twice a second unless `at_once`."""
        seconds = time.monotonic() - self.started
        if seconds > self.shown + 0.5 or at_once:
            self.shown = seconds
            facts = statistics(sum(files.counts for files in splits.values()), tokenizer)
            self.n = min(facts["tokens"] if self.max_tokens else self.corpus.position, self.total or 1 << 62)
            rate, documents, tokens = facts["bytes"] / 1e6 / seconds, facts["documents"], facts["tokens"]
            self.set_postfix_str(f"{documents:,} documents, {rate:.1f} MB/s, {tokens:,} tokens")
