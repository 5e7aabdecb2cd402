"""Token files → batches. Batch `k` is a pure function of (seed, k), whatever ran before and on how many processes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from system.errors import UserError
from text.token_files import memory_map, read_tokens


@dataclass(frozen=True)
class Batch:
    """One micro-batch on its way to the model."""

    tokens: Tensor
    """int64 (B, T)"""
    targets: Tensor
    """int64 (B, T): the token that follows each position."""
    counted: Tensor | None
    """int64: flat indices into B·T of the positions whose loss counts; None for all."""

    @property
    def n_counted(self) -> int:
        """Number of positions whose loss counts."""
        return self.targets.numel() if self.counted is None else self.counted.numel()

    def to(self, device: torch.device) -> "Batch":
        """Moves the batch to a device, asynchronously on CUDA."""

        def move(tensor):
            if tensor is None or device.type != "cuda":
                return tensor if tensor is None else tensor.to(device)
            return tensor.pin_memory().to(device, non_blocking=True)

        return Batch(move(self.tokens), move(self.targets), move(self.counted))


class Windows:
    """Random windows of `block_size` tokens out of one or more token files; none crosses a file's end."""

    def __init__(self, paths: list[Path], block_size: int, batch_size: int, seed: int):
        """Raises UserError for files that are missing, damaged or altogether too short."""
        self.shards = [read_tokens(path) for path in paths]
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        starts = [max(0, len(shard) - block_size) for shard in self.shards]  # first positions a window can have
        self.first = np.concatenate([[0], np.cumsum(starts)])
        self.paths = paths

    @property
    def n_tokens(self) -> int:
        """Tokens in all files."""
        return sum(map(len, self.shards))

    def require_ids_below(self, vocab_size: int) -> None:
        """Reads all files. Raises UserError, naming file and place, for an id that the model's vocabulary lacks."""
        for path, shard in zip(self.paths, self.shards, strict=True):
            for start in range(0, len(shard), 1 << 24):
                part = shard[start : start + (1 << 24)]
                if part.max() >= vocab_size:
                    at = start + int(np.argmax(part >= vocab_size))
                    raise UserError(
                        f"{path} holds the id {shard[at]} (token {at:,}), which a vocabulary of {vocab_size:,} "
                        "does not have: prepare the data with the model's tokenizer"
                    )

    def batch(self, step: int) -> list[Batch]:
        """Returns the global batch of a step, one Batch of one row per sequence."""
        if self.first[-1] == 0:
            raise UserError(
                f"{self.paths[0]} has {self.n_tokens} tokens, too few for windows of {self.block_size}: "
                "use more text or a smaller --block-size"
            )
        random = np.random.Generator(np.random.Philox(key=[self.seed, step]))
        windows = random.integers(self.first[-1], size=self.batch_size)
        shards = np.searchsorted(self.first, windows, side="right") - 1
        return [
            self._row(self.shards[i][start : start + self.block_size + 1])
            for i, start in zip(shards, windows - self.first[shards], strict=True)
        ]

    def largest_batch(self) -> list[Batch]:
        """Returns a batch: all take the same memory."""
        return self.batch(0)

    def in_order(self, max_tokens: int | None = None) -> Iterator[Batch]:
        """Yields the files from end to end as windows that score every token once (but for each file's first).

        With `max_tokens`, evenly spaced windows with about that many tokens. The last window of a file may be short.
        """
        windows = [(shard, start) for shard in self.shards for start in range(0, len(shard) - 1, self.block_size)]
        if max_tokens and len(windows) * self.block_size > max_tokens:
            windows = windows[:: -(-len(windows) * self.block_size // max_tokens)]
        for shard, start in windows:
            yield self._row(shard[start : start + self.block_size + 1])

    @staticmethod
    def _row(window):
        row = torch.from_numpy(window.astype(np.int64))
        return Batch(row[None, :-1], row[None, 1:], None)


class Epochs:
    """Sequences in epochs that visit every one once, in random order but grouped by length.

    To be derived from: `self.lengths` (tokens of each), `batch_size`, `seed`, and `_row(i)`, which gives one as a Batch
    of one row.
    """

    lengths: np.ndarray
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def n_tokens(self) -> int:
        """Tokens in all sequences."""
        return int(self.lengths.sum())

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps in an epoch, the last perhaps on a smaller batch."""
        return -(-len(self) // self.batch_size)

    def batch(self, step: int) -> list[Batch]:
        """Returns the global batch of a step, one Batch of one row per sequence."""
        epoch, index = divmod(step, self.batches_per_epoch)
        random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        order = random.permutation(len(self))
        pool = 50 * self.batch_size  # sorting within pools keeps the order random and the padding low
        order = np.concatenate(
            [
                part[np.argsort(self.lengths[part], kind="stable")]
                for part in np.split(order, range(pool, len(order), pool))
            ]
        )
        batches = np.split(order, range(self.batch_size, len(order), self.batch_size))
        return [self._row(i) for i in batches[random.permutation(len(batches))[index]]]

    def largest_batch(self) -> list[Batch]:
        """Returns a batch of the longest sequences, the longest first, in which all counts: none takes more memory."""
        rows = [self._row(i) for i in np.argsort(-self.lengths)[: self.batch_size]]
        return [replace(row, counted=torch.arange(row.tokens.size(1))) for row in rows]

    def in_order(self, max_tokens: int | None = None) -> Iterator[Batch]:
        """Yields every sequence once, in order; with `max_tokens`, the first that have about as many."""
        before = np.cumsum(self.lengths) - self.lengths
        for i in range(len(self)):
            if max_tokens and before[i] >= max_tokens:
                return
            yield self._row(i)


class Conversations(Epochs):
    """Whole conversations, each from position 0, with loss where the assistant speaks."""

    def __init__(self, folder: Path, split: str, block_size: int, batch_size: int, seed: int):
        """Reads `sft_{split}.bin`, its mask and its index. Raises UserError where they are missing or do not match."""
        self.tokens = read_tokens(folder / f"sft_{split}.bin")
        self.mask = memory_map(folder / f"sft_{split}_mask.bin", np.uint8)
        self.offsets = np.array(memory_map(folder / f"sft_{split}_index.bin", np.uint64), dtype=np.int64)
        if len(self.mask) != len(self.tokens) or len(self.offsets) == 0 or self.offsets[-1] != len(self.tokens):
            raise UserError(f"{folder}/sft_{split}*.bin do not belong together: run prepare_sft_data.py again")
        self.batch_size, self.seed = batch_size, seed
        self.lengths = np.diff(self.offsets)
        if len(self) and self.lengths.max() > block_size + 1:
            raise UserError(
                f"{folder} has conversations of {self.lengths.max()} tokens, longer than the model's context "
                f"of {block_size}: run prepare_sft_data.py with --block-size {block_size}"
            )

    def conversation(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens (uint16) and the loss mask (uint8) of conversation `i`."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[span], self.mask[span]

    def first_exchanges(self, n: int) -> list[tuple[list[int], list[int]]]:
        """Returns of the first `n` conversations the ids before the assistant's first answer, and those of it."""
        exchanges = []
        for tokens, mask in map(self.conversation, range(min(n, len(self)))):
            start = int(np.argmax(mask))
            end = start + int(np.argmin(np.append(mask[start:], 0)))
            exchanges.append((tokens[:start].tolist(), tokens[start:end].tolist()))
        return exchanges

    def _row(self, i):
        tokens, mask = self.conversation(i)
        row = torch.from_numpy(tokens.astype(np.int64))
        return Batch(row[None, :-1], row[None, 1:], torch.from_numpy(np.flatnonzero(mask[1:])))


def strided(ids: np.ndarray, block_size: int, stride: int) -> Iterator[Batch]:
    """Yields windows over ids (n,) in which every one but the first is scored exactly once.

    The first window scores all of its `block_size` positions, each later one its last `stride`, so that what stands
    before them in the window is context; `stride` is at most `block_size`.
    """
    scored = 1
    while scored < len(ids):
        end = min(max(block_size + 1, scored + stride), len(ids))
        begin = max(0, end - 1 - block_size)
        row = torch.from_numpy(ids[begin:end].astype(np.int64))
        yield Batch(row[None, :-1], row[None, 1:], torch.arange(scored - 1 - begin, end - 1 - begin))
        scored = end


def stack(rows: list[Batch], multiple: int = 64, longest: int | None = None) -> Batch:
    """Stacks one-row batches into one; shorter rows are padded at the end, to a multiple of `multiple` positions.

    Padding comes after every real token and is not among `counted`, so it changes no loss. `longest` caps the length
    (the model's context).
    """
    lengths = [row.tokens.size(1) for row in rows]
    if all(row.counted is None for row in rows) and len(set(lengths)) == 1:
        return Batch(torch.cat([row.tokens for row in rows]), torch.cat([row.targets for row in rows]), None)
    T = min(-(-max(lengths) // multiple) * multiple, longest or 1 << 62)
    tokens, targets = (torch.zeros(len(rows), T, dtype=torch.int64) for _ in range(2))
    counted = []
    for i, row in enumerate(rows):
        tokens[i, : lengths[i]], targets[i, : lengths[i]] = row.tokens[0], row.targets[0]
        counted.append(i * T + (torch.arange(lengths[i]) if row.counted is None else row.counted))
    return Batch(tokens, targets, torch.cat(counted))


def micro_batches(
    rows: list[Batch], n: int, rank: int = 0, world_size: int = 1, longest: int | None = None
) -> list[Batch]:
    """Returns this rank's share of a global batch in at most `n` micro-batches.

    A rank for which an epoch's last batch leaves nothing gets a row of which nothing counts, to keep up with the rest.
    """
    share = rows[rank::world_size] or [replace(rows[0], counted=torch.zeros(0, dtype=torch.int64))]
    size = -(-len(share) // n) or 1
    return [stack(share[i : i + size], longest=longest) for i in range(0, len(share), size)]


def step_seed(seed: int, step: int, rank: int) -> int:
    """Returns a seed for what is random in a step beside its batch; like the batch, a function of where a run is."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


class Prefetcher:
    """Calls `load(step)` for one step ahead of the consumer, in a thread."""

    def __init__(self, load, step: int):
        self.load, self.step = load, step
        self.thread = ThreadPoolExecutor(1)
        self.next = self.thread.submit(load, step)

    def __call__(self, step: int):
        """Returns `load(step)`; asking for the steps in order is what makes it fast."""
        result = self.next.result() if step == self.step else self.load(step)
        self.step = step + 1
        self.next = self.thread.submit(self.load, self.step)
        return result

    def close(self) -> None:
        """Ends the thread."""
        self.thread.shutdown(cancel_futures=True)
