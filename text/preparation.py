"""Text and conversations → token files, in order, on all cores and in constant memory."""

import os
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
from text.conversations import Conversation
from text.corpora import CHUNK, Corpus, Piece
from text.readers import Notes
from text.templates import encode_conversation
from text.token_files import ConversationFiles, TokenFiles, statistics
from text.tokenizer import Tokenizer


def write_corpus(
    corpus: Corpus,
    tokenizer: Tokenizer,
    out: Path,
    source: str | list[str],
    *,
    val_fraction: float,
    seed: int,
    workers: int | None = None,
    shard_tokens: int | None = None,
    max_tokens: int | None = None,
) -> dict[str, np.ndarray]:
    """Tokenizes a corpus into `out`, each document followed by `<|endoftext|>`; returns how often each id was written.

    Files are train.bin and val.bin, or shards of `shard_tokens` tokens. `max_tokens` in all are written at most. The
    files appear together at the end; whatever happens before, the old ones stay as they were. `source` goes into
    meta.json. The bytes depend on the text and the tokenizer, never on `workers`, the number of threads (without it,
    one a core). Raises UserError where nothing is left for one of the splits.
    """
    shard_tokens = shard_tokens or corpus.default_shard_tokens
    val_tokens = shard_tokens if corpus.first_shard_val else None
    batches = tokenized(corpus.pieces(val_fraction, seed), tokenizer, workers or available_cores())
    if val_tokens:
        batches = hold_out_first(batches, val_tokens)
    if max_tokens:
        batches = take_tokens(batches, max_tokens)
    with atomic_folder(out, last="meta.json") as folder:
        files = {split: TokenFiles(folder, split, tokenizer.n_tokens, shard_tokens) for split in ("train", "val")}
        with Progress(corpus, max_tokens) as progress:
            for split, ids in batches:
                files[split].write(ids)
                progress.show(files, tokenizer)
            progress.show(files, tokenizer, at_once=True)
        for split in files:
            files[split].close()
        counts = {split: files[split].counts for split in files}
        _require_text(counts, tokenizer, corpus, val_tokens)
        names = files["train"].names + files["val"].names
        if tokenizer.spec != "gpt2":
            (folder / "tokenizer.json").write_text(tokenizer.spec, encoding="utf-8")
            names.append("tokenizer.json")
        meta = {
            "files": names,
            "tokenizer": tokenizer.name,
            "n_tokens": tokenizer.n_tokens,
            "splits": {name: statistics(count, tokenizer) for name, count in counts.items()},
            "source": source,
            "notes": corpus.notes.plain(),
            "command": shlex.join(["python", *sys.argv]),
            "format_version": 1,
        }
        write_json(folder / "meta.json", meta)
    return counts


def hold_out_first(batches: Iterable[tuple[str, np.ndarray]], n: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yields batches of ids (split, ids) with the first `n` tokens as "val" and the others as "train"."""
    for _, ids in batches:
        if n:
            yield "val", ids[:n]
        yield "train", ids[n:]
        n = max(0, n - len(ids))


def take_tokens(batches: Iterable[tuple[str, np.ndarray]], n: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yields batches of ids (split, ids) up to the first `n` tokens."""
    for split, ids in batches:
        yield split, ids[:n]
        n -= len(ids)
        if n <= 0:
            return


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def write_conversations(
    conversations: Iterable[tuple[str, Conversation]],
    tokenizer: Tokenizer,
    out: Path,
    source: str,
    *,
    template: str,
    block_size: int,
    notes: Notes,
) -> dict:
    """Writes tokens, loss masks and offsets of conversations, which come with their splits, into `out`.

    A conversation longer than `block_size` tokens loses its oldest exchanges; `notes` counts those. Returns what was
    written into sft_meta.json. The files appear together at the end; whatever happens before, the old ones stay as
    they were. Raises UserError where there is no conversation to train on.
    """
    with atomic_folder(out, last="sft_meta.json") as folder:
        files = {split: ConversationFiles(folder, split) for split in ("train", "val")}
        for i, (split, messages) in enumerate(tqdm(conversations, unit=" conversations", desc="tokenizing"), 1):
            ids, mask = encode_conversation(messages, tokenizer, template)
            if len(ids) > block_size:
                ids, mask = encode_conversation(messages, tokenizer, template, block_size)
                what = "lost their oldest turns" if ids else "were dropped, since one exchange alone is as long"
                notes.add(f"conversations longer than {block_size:,} tokens {what}", f"conversation {i:,}")
            if ids:
                files[split].write(ids, mask)
        for split in files:
            files[split].close()
        if not files["train"].counts["conversations"]:
            raise UserError(f"there is no conversation to train on{notes.in_brackets()}")
        meta = {
            "files": files["train"].names + files["val"].names,
            "tokenizer": tokenizer.name,
            "template": template,
            "block_size": block_size,
            "splits": {split: files[split].counts for split in files},
            "notes": notes.plain(),
            "source": source,
            "command": shlex.join(["python", *sys.argv]),
            "format_version": 1,
        }
        write_json(folder / "sft_meta.json", meta)
    return meta


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
