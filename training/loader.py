"""Token files → batches. Batch `k` is a pure function of (seed, k), whatever ran before and on how many processes."""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt_config import GPTConfig
from model import IGNORE_INDEX
from system.errors import UserError
from text.token_files import memory_map, read_tokens, require_ids_below

PADDING_MULTIPLE = 64
"""Rows of different lengths are padded to a multiple of this many positions, so that few shapes occur."""
POOL = 50
"""Batches among which sequences are sorted by length, which keeps the order random and the padding short."""


@dataclass(frozen=True)
class Batch:
    """Rows of tokens for one forward pass."""

    tokens: Tensor
    """int64 (B, T)"""
    targets: Tensor
    """int64 (B, T): the token that follows each position, or IGNORE_INDEX where no loss counts"""
    class_weights: Tensor | None = None
    """float32 (n_classes,): weight of the loss by class; None for 1"""

    @property
    def total_weight(self) -> float:
        """What the summed loss is divided by: the number of targets that count, or the sum of their weights."""
        counted = self.targets[self.targets != IGNORE_INDEX]
        return counted.numel() if self.class_weights is None else float(self.class_weights[counted].sum())

    def to(self, device: torch.device) -> Batch:
        """Moves the batch to a device; on CUDA asynchronously, through pinned memory."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

        weights = None if self.class_weights is None else move(self.class_weights)
        return Batch(move(self.tokens), move(self.targets), weights)


@dataclass(frozen=True)
class StepBatch:
    """What one optimizer step learns from."""

    micro_batches: list[Batch]
    """this rank's share"""
    total_weight: float
    """of the batch, over all ranks"""
    n_tokens: int
    """tokens of the batch, over all ranks"""


def epoch_random(seed: int, epoch: int) -> np.random.Generator:
    """Returns the random numbers of an epoch."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch]))


class Windows:
    """Windows of `block_size` tokens out of one or more token files; none crosses the end of a file.

    Each epoch lays a grid of windows over every file, shifts it by a random offset, and visits the windows in random
    order. Random windows with replacement, as nanoGPT draws them, would miss a seventh of the text in two epochs.
    """

    is_padded = False
    """whether batches differ in their shape"""
    bytes_per_token: float | None = None
    """UTF-8 bytes of text per token, which turn losses into bits per byte"""

    def __init__(self, paths: list[Path], block_size: int, batch_size: int, seed: int):
        """Raises UserError for files that are missing or damaged."""
        self.paths, self.shards = paths, [read_tokens(path) for path in paths]
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        lengths = np.array([len(shard) for shard in self.shards], dtype=np.int64)
        n_fitting = (lengths - 1) // block_size
        n_windows = np.where(n_fitting > 1, n_fitting - 1, n_fitting).clip(min=0)  # one less: the shift needs its place
        self.n_offsets = (lengths - n_windows * block_size).clip(min=1)
        self.first_window = np.concatenate([[0], np.cumsum(n_windows)])
        self.epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)

    @classmethod
    def from_folder(
        cls, folder: Path, meta: dict[str, Any], split: str, shape: GPTConfig, batch_size: int, seed: int
    ) -> Windows:
        """Opens the "train" or "val" files of a folder with its `read_token_meta`.

        Raises UserError if they do not fit the meta file, or if they hold ids that the model's vocabulary lacks.
        """
        paths = [folder / name for name in meta["files"][split]]
        data = cls(paths, shape.block_size, batch_size, seed)
        counts = meta["splits"].get(split)
        if counts is None:  # files of nanoGPT and others, which have no meta.json
            for path, shard in zip(paths, data.shards, strict=True):
                require_ids_below(shard, shape.vocab_size, path, "prepare the data with the model's tokenizer")
        elif counts["tokens"] != data.n_tokens:
            raise UserError(f"{folder} is damaged, its {split} files do not fit its meta.json: prepare the data again")
        elif counts.get("bytes") and data.n_tokens:
            data.bytes_per_token = counts["bytes"] / data.n_tokens
        return data

    @property
    def n_tokens(self) -> int:
        """Tokens in all files."""
        return sum(map(len, self.shards))

    @property
    def batches_per_epoch(self) -> float:
        """Optimizer steps per epoch."""
        return self.n_tokens / self.batch_size / self.block_size

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the order of all windows, uint32 (windows,), and the offset of each file's grid, int64 (files,)."""
        random = epoch_random(self.seed, epoch)
        order = random.permutation(np.arange(self.first_window[-1], dtype=np.uint32))
        return order, random.integers(self.n_offsets)

    def batch(self, step: int) -> list[Batch]:
        """Returns the global batch of a step, one Batch of one row for each sequence."""
        n = int(self.first_window[-1])
        if n == 0:
            raise UserError(
                f"{self.paths[0]} has {self.n_tokens} tokens, too few for windows of {self.block_size}: "
                "use more text or a smaller --block-size"
            )
        rows = []
        for i in range(step * self.batch_size, (step + 1) * self.batch_size):
            order, offsets = self.epoch(i // n)
            window = int(order[i % n])
            shard = int(np.searchsorted(self.first_window, window, side="right")) - 1
            start = int(offsets[shard]) + (window - int(self.first_window[shard])) * self.block_size
            rows.append(_row(self.shards[shard][start : start + self.block_size + 1]))
        return rows

    def largest_batch(self) -> list[Batch]:
        """Returns a batch that needs the most memory; windows are all of one size."""
        return self.batch(0)

    def in_order(self, max_tokens: int | None = None) -> Iterator[Batch]:
        """Yields the files from end to end as windows that score every token once, except the first of each file.

        `max_tokens` selects evenly spaced windows with about that many tokens. The last window of a file may be short.
        """
        windows = [(shard, start) for shard in self.shards for start in range(0, len(shard) - 1, self.block_size)]
        if max_tokens and len(windows) * self.block_size > max_tokens:
            windows = windows[:: -(-len(windows) * self.block_size // max_tokens)]
        for shard, start in windows:
            yield _row(shard[start : start + self.block_size + 1])

    def fingerprint(self) -> str:
        """Returns a checksum of the files' sizes and of about 1,000 tokens spread over them."""
        stride = max(1, self.n_tokens // 1_000)
        return _checksum([np.array(list(map(len, self.shards))), *(shard[::stride] for shard in self.shards)])


class Sequences(ABC):
    """Whole sequences. Each epoch visits every one once, in random order but grouped by length.

    A subclass sets `lengths`, the tokens of each sequence, `batch_size` and `seed`, and implements `row`.
    """

    is_padded = True
    bytes_per_token = None
    lengths: np.ndarray
    batch_size: int
    seed: int

    @abstractmethod
    def row(self, i: int) -> Batch:
        """Returns sequence `i` as a Batch of one row."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def n_tokens(self) -> int:
        """Tokens in all sequences."""
        return int(self.lengths.sum())

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps per epoch; the last batch may be smaller."""
        return -(-len(self) // self.batch_size)

    @functools.cached_property
    def epoch(self) -> functools._lru_cache_wrapper[list[np.ndarray]]:
        """Returns the batches of an epoch in order, each the indices of its sequences."""
        return functools.lru_cache(maxsize=2)(self._draw_epoch)

    def _draw_epoch(self, epoch: int) -> list[np.ndarray]:
        random, pool = epoch_random(self.seed, epoch), POOL * self.batch_size
        order = random.permutation(len(self))
        pools = np.split(order, range(pool, len(order), pool))
        order = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in pools])
        batches = np.split(order, range(self.batch_size, len(order), self.batch_size))
        return [batches[i] for i in random.permutation(len(batches))]

    def batch(self, step: int) -> list[Batch]:
        """Returns the global batch of a step, one Batch of one row for each sequence."""
        epoch, index = divmod(step, self.batches_per_epoch)
        return [self.row(i) for i in self.epoch(epoch)[index]]

    def largest_batch(self) -> list[Batch]:
        """Returns a batch that needs the most memory: the longest sequences, with loss at every position."""
        rows = [self.row(i) for i in np.argsort(-self.lengths)[: self.batch_size]]
        return [replace(row, targets=torch.zeros_like(row.targets)) for row in rows]

    def in_order(self, max_tokens: int | None = None) -> Iterator[Batch]:
        """Yields every sequence once, in order; `max_tokens` stops after the first that have about as many."""
        before = np.cumsum(self.lengths) - self.lengths
        for i in range(len(self)):
            if max_tokens and before[i] >= max_tokens:
                return
            yield self.row(i)

    def fingerprint(self) -> str:
        """Returns a checksum of all lengths and of about 1,000 sequences."""
        rows = [self.row(i) for i in range(0, len(self), max(1, len(self) // 1_000))]
        return _checksum([self.lengths, *(tensor.numpy() for row in rows for tensor in (row.tokens, row.targets))])


class Conversations(Sequences):
    """Whole conversations, each from position 0, with loss on the assistant's tokens."""

    def __init__(
        self, folder: Path, split: str, block_size: int, batch_size: int, seed: int, noise: float = 0.0, n_text: int = 0
    ):
        """Reads `sft_{split}.bin`, its loss mask and its index. Raises UserError if they do not belong together.

        `noise` is the probability that `batch` replaces a token without loss by one of the first `n_text` ids.
        """
        self.tokens = read_tokens(folder / f"sft_{split}.bin")
        self.mask = memory_map(folder / f"sft_{split}_mask.bin", np.uint8)
        self.offsets = np.array(memory_map(folder / f"sft_{split}_index.bin", np.uint64), dtype=np.int64)
        self.batch_size, self.seed, self.noise, self.n_text = batch_size, seed, noise, n_text
        self.lengths = np.diff(self.offsets)
        n = len(self.tokens)
        if len(self.mask) != n or [*self.offsets[:1], *self.offsets[-1:]] != [0, n] or (self.lengths <= 0).any():
            raise UserError(f"{folder}/sft_{split}*.bin do not belong together: run prepare_sft_data.py again")
        if len(self) and self.lengths.max() > block_size + 1:
            raise UserError(
                f"{folder} has conversations of {self.lengths.max()} tokens, longer than the model's context "
                f"of {block_size}: run prepare_sft_data.py with --block-size {block_size}"
            )

    def row(self, i: int) -> Batch:
        span = slice(self.offsets[i], self.offsets[i + 1])
        row = _row(self.tokens[span])
        is_counted = torch.from_numpy(np.array(self.mask[span][1:], dtype=bool))[None]
        return replace(row, targets=row.targets.where(is_counted, IGNORE_INDEX))

    def batch(self, step: int) -> list[Batch]:
        rows, random = super().batch(step), np.random.default_rng((self.seed, step))
        for i, row in enumerate(rows if self.noise else []):
            is_text = (row.targets == IGNORE_INDEX) & (row.tokens < self.n_text)
            is_replaced = is_text & torch.from_numpy(random.random(row.tokens.shape) < self.noise)
            others = torch.from_numpy(random.integers(self.n_text, size=row.tokens.shape))
            rows[i] = replace(row, tokens=others.where(is_replaced, row.tokens))
        return rows

    def first_exchanges(self, n: int) -> list[tuple[list[int], list[int]]]:
        """Returns, for each of the first `n` conversations, the ids before the assistant's first answer, and the ids of
        that answer."""
        return [first_exchange(self.row(i)) for i in range(min(n, len(self)))]


def first_exchange(conversation: Batch) -> tuple[list[int], list[int]]:
    """Returns the ids of a conversation of one row before the assistant's first answer, and those of that answer."""
    is_counted = conversation.targets[0] != IGNORE_INDEX
    start = int(is_counted.int().argmax())
    n = int(is_counted[start:].int().cumprod(0).sum())
    return conversation.tokens[0, : start + 1].tolist(), conversation.targets[0, start : start + n].tolist()


def _row(ids: np.ndarray) -> Batch:
    row = torch.from_numpy(ids.astype(np.int64))
    return Batch(row[None, :-1], row[None, 1:])


def _checksum(arrays: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.astype("<i8").tobytes())
    return digest.hexdigest()


def strided(ids: np.ndarray, block_size: int, stride: int) -> Iterator[Batch]:
    """Yields windows over ids (n,) that score every id exactly once, except the first.

    The first window scores all of its `block_size` positions. Each later window scores its last `stride` positions; the
    tokens before them are context. `stride` is at most `block_size`.
    """
    scored = 1
    while scored < len(ids):
        end = min(max(block_size + 1, scored + stride), len(ids))
        begin = max(0, end - 1 - block_size)
        row = _row(ids[begin:end])
        is_context = torch.arange(row.targets.size(1)) < scored - 1 - begin
        yield replace(row, targets=row.targets.where(~is_context, IGNORE_INDEX))
        scored = end


def stack(rows: list[Batch], max_length: int | None = None) -> Batch:
    """Stacks one-row batches. Shorter rows are padded at the end, to a multiple of `PADDING_MULTIPLE` positions and at
    most `max_length`, the model's context.

    Padding stands behind all real tokens and does not count, so it changes no loss.
    """
    lengths = [row.tokens.size(1) for row in rows]
    T = lengths[0]
    if len(set(lengths)) > 1 or T % PADDING_MULTIPLE:
        T = min(-(-max(lengths) // PADDING_MULTIPLE) * PADDING_MULTIPLE, max_length or max(lengths) + PADDING_MULTIPLE)
    tokens = torch.zeros(len(rows), T, dtype=torch.int64)
    targets = torch.full((len(rows), T), IGNORE_INDEX)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        tokens[i, :length], targets[i, :length] = row.tokens[0], row.targets[0]
    return Batch(tokens, targets, rows[0].class_weights)


def require_known_ids(rows: list[Batch], shape: GPTConfig) -> None:
    """Raises UserError if rows hold ids that a model of this shape does not have. A classifier's targets are labels."""
    n_targets = shape.n_classes or shape.vocab_size
    if any(int(row.tokens.max()) >= shape.vocab_size or int(row.targets.max()) >= n_targets for row in rows):
        raise UserError("the data holds ids that the model does not have: prepare the data again")


def micro_batches(
    rows: list[Batch], n: int, rank: int = 0, world_size: int = 1, max_length: int | None = None
) -> list[Batch]:
    """Returns this rank's share of a global batch in at most `n` micro-batches.

    A rank without rows gets one fully masked row, so that collective calls match.
    """
    share = rows[rank::world_size] or [replace(rows[0], targets=torch.full_like(rows[0].targets, IGNORE_INDEX))]
    size = -(-len(share) // n) or 1
    return [stack(share[i : i + size], max_length) for i in range(0, len(share), size)]
