"""Text and conversations → token files, in order, on all cores and in constant memory."""

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
from system.files import atomic_folder, write_json
from text.conversations import Conversation
from text.corpora import CHUNK, Corpus, Piece, training_text
from text.readers import Notes
from text.templates import encode_conversation
from text.token_files import ConversationFiles, TokenFiles, statistics
from text.tokenizer import Tokenizer, train_bpe

SPLITS = ("train", "val")
SplitIds = tuple[str, np.ndarray]
"""A split and ids for it, uint16 (n,)."""


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
    """Tokenizes a corpus into `out`; returns how often each id was written, int64 (ids,) by split.

    `<|endoftext|>` follows every document. The files are train.bin and val.bin, or shards of `shard_tokens` tokens,
    with at most `max_tokens` tokens in total. They appear together at the end; until then the old files stay unchanged.
    `workers` is the number of threads, by default one per core; it never changes the output. `source` goes into
    meta.json. Raises UserError if a split gets no text.
    """
    shard_tokens = shard_tokens or corpus.default_shard_tokens
    val_tokens = shard_tokens if corpus.first_shard_val else None
    batches = tokenized(corpus.pieces(val_fraction, seed), tokenizer, workers or available_cores())
    if val_tokens:
        batches = hold_out_first(batches, val_tokens)
    if max_tokens:
        batches = _first_tokens(batches, max_tokens)
    with atomic_folder(out, last="meta.json") as folder:
        names, counts = write_tokens(batches, corpus, tokenizer, folder, shard_tokens, max_tokens)
        require_text(counts, tokenizer, corpus.notes, val_tokens)
        write_meta(folder, names["train"] + names["val"], counts, tokenizer, source, corpus.notes)
    return counts


def write_tokens(
    batches: Iterable[SplitIds],
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    shard_tokens: int | None,
    max_tokens: int | None = None,
) -> tuple[dict[str, list[str]], dict[str, np.ndarray]]:
    """Writes the ids of a corpus into token files; returns their names by split, and the counts as `write_corpus`."""
    files = {split: TokenFiles(folder, split, tokenizer.n_tokens, shard_tokens) for split in SPLITS}
    with progress(total=max_tokens or corpus.total) as bar:
        for split, ids in batches:
            files[split].write(ids)
            n_tokens = sum(int(files[split].counts.sum()) for split in SPLITS)
            bar.set_postfix_str(f"{n_tokens:,} tokens", refresh=False)
            bar.update((n_tokens if max_tokens else corpus.position) - bar.n)
    for split in SPLITS:
        files[split].close()
    return {split: files[split].names for split in SPLITS}, {split: files[split].counts for split in SPLITS}


def write_meta(
    folder: Path,
    names: list[str],
    counts: dict[str, np.ndarray],
    tokenizer: Tokenizer,
    source: str | list[str],
    notes: Notes,
    **more: str,
) -> None:
    """Writes `meta.json` for the token files `names`, and before it the tokenizer, unless it is GPT-2's."""
    if tokenizer.spec != "gpt2":
        (folder / "tokenizer.json").write_text(tokenizer.spec, encoding="utf-8")
        names = [*names, "tokenizer.json"]
    meta = {
        "files": names,
        "tokenizer": tokenizer.name,
        "n_tokens": tokenizer.n_tokens,
        "splits": {split: statistics(counts[split], tokenizer) for split in SPLITS},
        "source": source,
        **more,
        **_origin(notes),
    }
    write_json(folder / "meta.json", meta)


def train_tokenizer(pieces: Iterable[Piece], vocab_size: int) -> Tokenizer:
    """Trains a tokenizer on the training text among the pieces of a corpus, and says so."""
    print(f"training a tokenizer of {vocab_size:,} tokens on the text", flush=True)
    tokenizer = train_bpe(training_text(pieces), vocab_size)
    if tokenizer.end_of_text < vocab_size:
        print(f"the text is too short for that: the tokenizer has {tokenizer.end_of_text:,} tokens")
    return tokenizer


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
    """Writes tokens, loss masks and offsets of conversations into `out`; returns the content of sft_meta.json.

    Each conversation comes with its split: "train", "val", "both", or "joined" for one that repeats others of "both",
    to train on. One that is longer than `block_size` tokens loses its oldest exchanges; `notes` counts it, unless it is
    joined. The files appear together at the end; until then the old files stay unchanged. Raises UserError if a
    split gets no conversation.
    """
    with atomic_folder(out, last="sft_meta.json") as folder:
        files, is_held_out = {split: ConversationFiles(folder, split) for split in SPLITS}, True
        for i, (split, messages) in enumerate(progress(conversations, unit="conversation"), 1):
            ids, mask = encode_conversation(messages, tokenizer, template)
            if len(ids) > block_size:
                ids, mask = encode_conversation(messages, tokenizer, template, block_size)
                outcome = "lost their oldest turns" if ids else "were dropped, since one exchange alone is too long"
                if split != "joined":
                    notes.add(f"conversations longer than {block_size:,} tokens {outcome}", f"conversation {i:,}")
            for name in ("train",) if split == "joined" else SPLITS if split == "both" else (split,):
                if ids:
                    files[name].write(ids, mask)
            is_held_out = is_held_out and split != "both"
        for split in SPLITS:
            files[split].close()
        if not files["train"].counts["conversations"]:
            raise UserError(f"there is no conversation to train on{notes.in_brackets()}")
        if not files["val"].counts["conversations"]:
            raise UserError(
                "no conversation is left to validate with: use more conversations, a larger --val-fraction or a larger "
                f"--block-size{notes.in_brackets()}"
            )
        meta = {
            "files": files["train"].names + files["val"].names,
            "tokenizer": tokenizer.name,
            "template": template,
            "block_size": block_size,
            "is_held_out": is_held_out,
            "splits": {split: files[split].counts for split in SPLITS},
            "source": source,
            **_origin(notes),
        }
        write_json(folder / "sft_meta.json", meta)
    return meta


def _origin(notes: Notes) -> dict:
    """Returns what both kinds of meta file say about the run that writes them."""
    return {"notes": notes.as_json(), "command": command_line(), "format_version": 1}


def require_text(counts: dict[str, np.ndarray], tokenizer: Tokenizer, notes: Notes, val_tokens: int | None) -> None:
    """Raises UserError if a split has no token of text. `val_tokens` is the size of a held-out first shard."""
    has_text = {split: counts[split][: tokenizer.end_of_text].any() for split in SPLITS}
    if has_text["train"] and has_text["val"]:
        return
    if has_text["val"] and val_tokens:
        raise UserError(
            f"the first {val_tokens:,} tokens are for validation, and nothing is left to train on: "
            "try a smaller --shard-tokens"
        )
    if not has_text["train"]:
        raise UserError(f"there is no text to train on{notes.in_brackets()}")
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
            for split, texts, last_goes_on in grouped(pieces):
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


def grouped(pieces: Iterable[Piece]) -> Iterator[tuple[str, list[str], bool]]:
    """Groups pieces to about CHUNK characters, by split; yields (split, texts, whether the last text goes on)."""
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    size = 0
    for split, text, ends in pieces:
        texts[split].append(text)
        size += len(text)
        if size >= CHUNK or not ends:
            for name in SPLITS:
                if texts[name]:
                    yield name, texts[name], name == split and not ends
            texts, size = {name: [] for name in SPLITS}, 0
    for name in SPLITS:
        if texts[name]:
            yield name, texts[name], False


def hold_out_first(batches: Iterable[SplitIds], n: int) -> Iterator[SplitIds]:
    """Yields all ids again, the first `n` as "val" and the others as "train"."""
    for _, ids in batches:
        if n:
            yield "val", ids[:n]
        yield "train", ids[n:]
        n = max(0, n - len(ids))


def _first_tokens(batches: Iterable[SplitIds], n: int) -> Iterator[SplitIds]:
    """Yields the first `n` ids."""
    for split, ids in batches:
        yield split, ids[:n]
        n -= len(ids)
        if n <= 0:
            return


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
