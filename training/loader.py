"""Token files → batches. Batch `k` is a pure function of (seed, k), whatever ran before and on how many processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import GPTConfig
from system.errors import UserError
from text.token_files import memory_map, read_tokens, require_ids_below

PADDING_MULTIPLE = 64
"""Rows of different lengths are padded to a multiple of this many positions, so that few shapes occur."""


@dataclass(frozen=True)
class Batch:
    """Rows of tokens for one forward pass."""

    tokens: Tensor
    """int64 (B, T)"""
    targets: Tensor
    """int64 (B, T): the token that follows each position"""
    counted: Tensor | None = None
    """int64: indices into the flat B * T positions whose loss counts; None for all"""
    weights: Tensor | None = None
    """float32: a weight of the loss for each counted position; None for 1"""

    @property
    def total_weight(self) -> float:
        """What the summed loss is divided by: the number of counted positions, or the sum of their weights."""
        if self.weights is not None:
            return float(self.weights.sum())
        return self.targets.numel() if self.counted is None else self.counted.numel()

    def to(self, device: torch.device) -> Batch:
        """Moves the batch to a device; on CUDA asynchronously, through pinned memory."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

        return Batch(
            move(self.tokens),
            move(self.targets),
            None if self.counted is None else move(self.counted),
            None if self.weights is None else move(self.weights),
        )


@dataclass(frozen=True)
class StepBatch:
    """What one optimizer step learns from."""

    micro_batches: list[Batch]
    """this rank's share"""
    total_weight: float
    """counted positions of the batch, over all ranks"""
    n_tokens: int
    """tokens of the batch, over all ranks"""


class Windows:
    """Random windows of `block_size` tokens out of one or more token files; none crosses the end of a file."""

    bytes_per_token: float | None = None
    """UTF-8 bytes of text per token, which turn losses into bits per byte"""

    def __init__(self, paths: list[Path], block_size: int, batch_size: int, seed: int):
        """Raises UserError for files that are missing or damaged."""
        self.paths, self.shards = paths, [read_tokens(path) for path in paths]
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        n_starts = [max(0, len(shard) - block_size) for shard in self.shards]  # positions where a window can start
        self.first_start = np.concatenate([[0], np.cumsum(n_starts)])

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
        """Batches that hold as many tokens as the files."""
        return self.n_tokens / self.batch_size / self.block_size

    def batch(self, step: int) -> list[Batch]:
        """Returns the global batch of a step, one Batch of one row for each sequence."""
        if self.first_start[-1] == 0:
            raise UserError(
                f"{self.paths[0]} has {self.n_tokens} tokens, too few for windows of {self.block_size}: "
                "use more text or a smaller --block-size"
            )
        random = np.random.Generator(np.random.Philox(key=[self.seed, step]))
        starts = random.integers(self.first_start[-1], size=self.batch_size)
        shards = np.searchsorted(self.first_start, starts, side="right") - 1
        return [
            self._row(self.shards[i][start : start + self.block_size + 1])
            for i, start in zip(shards, starts - self.first_start[shards], strict=True)
        ]

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
            yield self._row(shard[start : start + self.block_size + 1])

    def fingerprint(self) -> str:
        """Returns a checksum of the files' sizes and of about 1,000 tokens spread over them."""
        stride = max(1, self.n_tokens // 1_000)
        return _checksum([np.array(list(map(len, self.shards))), *(shard[::stride] for shard in self.shards)])

    @staticmethod
    def _row(window: np.ndarray) -> Batch:
        row = torch.from_numpy(window.astype(np.int64))
        return Batch(row[None, :-1], row[None, 1:])


class Epochs:
    """Sequences in epochs: each epoch visits every sequence once, in random order but grouped by length.

    A subclass sets `lengths` (tokens of each sequence), `batch_size` and `seed`, and implements `row`.
    """

    lengths: np.ndarray
    batch_size: int
    seed: int
    bytes_per_token: float | None = None

    def row(self, i: int) -> Batch:
        """Returns sequence `i` as a Batch of one row."""
        raise NotImplementedError

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

    def batch(self, step: int) -> list[Batch]:
        """Returns the global batch of a step, one Batch of one row for each sequence."""
        epoch, index = divmod(step, self.batches_per_epoch)
        random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        order = random.permutation(len(self))
        pool = 50 * self.batch_size  # sorting inside pools keeps the order random and the padding short
        order = np.concatenate(
            [
                part[np.argsort(self.lengths[part], kind="stable")]
                for part in np.split(order, range(pool, len(order), pool))
            ]
        )
        batches = np.split(order, range(self.batch_size, len(order), self.batch_size))
        return [self.row(i) for i in batches[random.permutation(len(batches))[index]]]

    def fingerprint(self) -> str:
        """Returns a checksum of all lengths and of about 1,000 sequences."""
        rows = [self.row(i) for i in range(0, len(self), max(1, len(self) // 1_000))]
        return _checksum([self.lengths, *(tensor.numpy() for row in rows for tensor in (row.tokens, row.targets))])

    def largest_batch(self) -> list[Batch]:
        """Returns a batch that needs the most memory: the longest sequences, with loss at every position."""
        rows = [self.row(i) for i in np.argsort(-self.lengths)[: self.batch_size]]
        return [Batch(row.tokens, row.targets, torch.arange(row.tokens.size(1))) for row in rows]

    def in_order(self, max_tokens: int | None = None) -> Iterator[Batch]:
        """Yields every sequence once, in order; `max_tokens` stops after the first that have about as many."""
        before = np.cumsum(self.lengths) - self.lengths
        for i in range(len(self)):
            if max_tokens and before[i] >= max_tokens:
                return
            yield self.row(i)


class Conversations(Epochs):
    """Whole conversations, each from position 0, with loss on the assistant's tokens."""

    def __init__(self, folder: Path, split: str, block_size: int, batch_size: int, seed: int):
        """Reads `sft_{split}.bin`, its mask and its index. Raises UserError if they are missing or do not match."""
        self.tokens = read_tokens(folder / f"sft_{split}.bin")
        self.mask = memory_map(folder / f"sft_{split}_mask.bin", np.uint8)
        self.offsets = np.array(memory_map(folder / f"sft_{split}_index.bin", np.uint64), dtype=np.int64)
        self.batch_size, self.seed = batch_size, seed
        self.lengths = np.diff(self.offsets)
        if not self._belong_together():
            raise UserError(f"{folder}/sft_{split}*.bin do not belong together: run prepare_sft_data.py again")
        if len(self) and self.lengths.max() > block_size + 1:
            raise UserError(
                f"{folder} has conversations of {self.lengths.max()} tokens, longer than the model's context "
                f"of {block_size}: run prepare_sft_data.py with --block-size {block_size}"
            )

    def _belong_together(self) -> bool:
        """Whether the conversations follow each other without gaps, and loss counts in each, but not at its start."""
        starts, n = self.offsets[:-1], len(self.tokens)
        is_complete = len(self.mask) == n and [*self.offsets[:1], *self.offsets[-1:]] == [0, n]
        if not is_complete or (starts >= self.offsets[1:]).any():
            return False
        has_loss = np.maximum.reduceat(self.mask, starts) if len(starts) else self.mask
        return bool(has_loss.all() and not self.mask[starts].any())

    def conversation(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens (uint16) and the loss mask (uint8) of conversation `i`."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[span], self.mask[span]

    def first_exchanges(self, n: int) -> list[tuple[list[int], list[int]]]:
        """Returns, for each of the first `n` conversations, the ids before the assistant's first answer, and the ids of
        that answer."""
        exchanges = []
        for tokens, mask in map(self.conversation, range(min(n, len(self)))):
            start = int(np.argmax(mask))
            end = start + int(np.argmin(np.append(mask[start:], 0)))
            exchanges.append((tokens[:start].tolist(), tokens[start:end].tolist()))
        return exchanges

    def row(self, i: int) -> Batch:
        """Returns conversation `i` as a Batch of one row."""
        tokens, mask = self.conversation(i)
        row = torch.from_numpy(tokens.astype(np.int64))
        return Batch(row[None, :-1], row[None, 1:], torch.from_numpy(np.flatnonzero(mask[1:])))


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
        row = torch.from_numpy(ids[begin:end].astype(np.int64))
        yield Batch(row[None, :-1], row[None, 1:], torch.arange(scored - 1 - begin, end - 1 - begin))
        scored = end


def stack(rows: list[Batch], max_length: int | None = None) -> Batch:
    """Stacks one-row batches. Shorter rows are padded at the end, to a multiple of `PADDING_MULTIPLE` positions and at
    most `max_length`, the model's context.

    Padding stands behind all real tokens and is not counted, so it changes no loss.
    """
    lengths = [row.tokens.size(1) for row in rows]
    if all(row.counted is None for row in rows) and len(set(lengths)) == 1:
        return Batch(torch.cat([row.tokens for row in rows]), torch.cat([row.targets for row in rows]))
    T = -(-max(lengths) // PADDING_MULTIPLE) * PADDING_MULTIPLE
    if max_length is not None:
        T = min(T, max_length)
    tokens, targets = (torch.zeros(len(rows), T, dtype=torch.int64) for _ in range(2))
    counted = []
    for i, row in enumerate(rows):
        tokens[i, : lengths[i]], targets[i, : lengths[i]] = row.tokens[0], row.targets[0]
        counted.append(i * T + (torch.arange(lengths[i]) if row.counted is None else row.counted))
    weights = [row.weights for row in rows if row.weights is not None]
    return Batch(tokens, targets, torch.cat(counted), torch.cat(weights) if weights else None)


def require_known_ids(rows: list[Batch], shape: GPTConfig) -> None:
    """Raises UserError if rows hold ids that a model of this shape does not have. A classifier's targets are labels."""
    n_targets = shape.n_classes or shape.vocab_size
    if any(int(row.tokens.max()) >= shape.vocab_size or int(row.targets.max()) >= n_targets for row in rows):
        raise UserError("the data holds ids that the model does not have: prepare the data again")


def micro_batches(
    rows: list[Batch], n: int, rank: int = 0, world_size: int = 1, max_length: int | None = None
) -> list[Batch]:
    """Returns this rank's share of a global batch in at most `n` micro-batches.

    A rank without rows gets one row in which nothing counts, so that collective calls match.
    """
    share = rows[rank::world_size] or [replace(rows[0], counted=torch.zeros(0, dtype=torch.int64), weights=None)]
    size = -(-len(share) // n) or 1
    return [stack(share[i : i + size], max_length) for i in range(0, len(share), size)]


def step_seed(seed: int, step: int, rank: int) -> int:
    """Returns the seed of a step's dropout: like the batch, a function of where the run stands."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


class Prefetcher:
    """Loads the batch of the next step in a thread while the current step computes. A context manager."""

    def __init__(self, load: Callable[[int], StepBatch], step: int):
        """Starts to load the batch of `step`."""
        self.load, self.step = load, step
        self.thread = ThreadPoolExecutor(1)
        self.next = self.thread.submit(load, step)

    def get(self, step: int) -> StepBatch:
        """Returns `load(step)`. It is ready early if steps are asked for in order."""
        result = self.next.result() if step == self.step else self.load(step)
        self.step = step + 1
        self.next = self.thread.submit(self.load, self.step)
        return result

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.thread.shutdown(cancel_futures=True)
