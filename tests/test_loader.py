"""Batches: each window and sequence of an epoch once, the same for any number of processes, fixed by (seed, step)."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from model import IGNORE_INDEX
from system.errors import UserError
from training.loader import Batch, Conversations, Sequences, Windows, micro_batches, stack
from training.trainer import step_seed

BLOCK, WINDOWS = 8, 24 + 42  # of the two files below


def write(path: Path, values: object, dtype: str = "<u2") -> Path:
    path.write_bytes(np.asarray(values).astype(dtype).tobytes())
    return path


@pytest.fixture
def shards(tmp_path) -> list[Path]:
    """Two token files whose ids count up, those of the second from 1,000."""
    return [write(tmp_path / "a.bin", range(203)), write(tmp_path / "b.bin", range(1_000, 1_345))]


def epoch_rows(data: Windows, epoch: int) -> list[Batch]:
    """Returns the rows of an epoch, in order. Batches run on into the next epoch."""
    first, last = epoch * WINDOWS // data.batch_size, (epoch + 1) * WINDOWS // data.batch_size
    rows = [row for step in range(first, last + 1) for row in data.batch(step)]
    return rows[epoch * WINDOWS - first * data.batch_size :][:WINDOWS]


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_an_epoch_visits_each_window_of_a_shifted_grid_once_and_none_crosses_a_file(shards, epoch):
    rows = epoch_rows(Windows(shards, BLOCK, batch_size=5, seed=1), epoch)
    for row in rows:
        ids = [*row.tokens[0].tolist(), int(row.targets[0, -1])]
        assert ids == list(range(ids[0], ids[0] + BLOCK + 1)) and (ids[-1] < 203 or ids[0] >= 1_000)
    for low, high, n in ((0, 203, 24), (1_000, 1_345, 42)):
        first = sorted(int(row.tokens[0, 0]) for row in rows if low <= row.tokens[0, 0] < high)
        assert first == list(range(first[0], first[0] + n * BLOCK, BLOCK))  # so each target occurs exactly once
        assert first[0] - low < BLOCK * 2 and high - first[-1] <= 3 * BLOCK


def test_epochs_and_seeds_differ_in_order_and_in_offset(shards):
    data = {seed: Windows(shards, BLOCK, 5, seed) for seed in (1, 2)}
    drawn = [data[seed].epoch(epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert len({tuple(order) for order, _ in drawn}) == len({tuple(offsets) for _, offsets in drawn}) == 3
    covered = {int(i) for epoch in range(60) for row in epoch_rows(data[1], epoch) for i in row.targets[0]}
    assert covered == {*range(1, 203), *range(1_001, 1_345)}  # what one epoch leaves out, others learn


def test_a_batch_follows_from_seed_and_step_alone(shards):
    """As after `--resume`, in the middle of an epoch and of the next."""
    through = Windows(shards, BLOCK, 5, 3)
    batches = [through.batch(step) for step in range(40)]
    for step in (17, 30, 13):  # 13 crosses into the second epoch
        anew = Windows(shards, BLOCK, 5, 3).batch(step)
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(anew, batches[step], strict=True))
    assert len({step_seed(3, step, rank) for step in range(9) for rank in range(3)}) == 27


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 6])
def test_processes_share_a_batch_whatever_their_number(shards, world_size, n):
    rows = Windows(shards, BLOCK, 6, 0).batch(0)
    shares = [micro_batches(rows, n, rank, world_size) for rank in range(world_size)]
    assert all(len(share) == min(n, 6 // world_size) for share in shares)
    first = [batch.tokens[:, 0].tolist() for share in shares for batch in share]
    assert sorted(sum(first, [])) == sorted(int(row.tokens[0, 0]) for row in rows)
    assert sum(batch.total_weight for share in shares for batch in share) == 6 * BLOCK


def test_a_process_without_rows_gets_one_that_does_not_count(shards):
    rows = Windows(shards, BLOCK, 1, 0).batch(0)
    [batch] = micro_batches(rows, 4, rank=1, world_size=2)
    assert batch.tokens.shape[0] == 1 and batch.total_weight == 0 and (batch.targets == IGNORE_INDEX).all()


def test_nine_billion_tokens_are_ordered_in_two_seconds_and_once_an_epoch(tmp_path):
    path = tmp_path / "train.bin"
    with open(path, "wb") as file:
        file.truncate(18 * 10**9)  # takes no space on the disk
    data = Windows([path], 1024, 8, 0)
    assert data.n_tokens == 9 * 10**9
    seconds = []
    for step in range(2):
        start = time.process_time()  # other processes may be busy
        data.batch(step)
        seconds.append(time.process_time() - start)
    assert seconds[0] < 2 and seconds[1] < 0.05


def test_a_text_shorter_than_a_window_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"b.bin has 8 tokens, too few for windows of 8: .* smaller --block-size"):
        Windows([write(tmp_path / "b.bin", range(8))], BLOCK, 1, 0).batch(0)
    [row] = Windows([write(tmp_path / "b.bin", range(9)), tmp_path / "b.bin"], BLOCK, 1, 0).batch(0)
    assert row.targets.tolist() == [list(range(1, 9))]


def test_validation_scores_every_token_once_or_evenly_spaced_windows(shards):
    data = Windows(shards, BLOCK, 5, 0)
    scored = torch.cat([row.targets[0] for row in data.in_order()]).tolist()
    assert scored == [*range(1, 203), *range(1_001, 1_345)]
    few = list(data.in_order(max_tokens=100))
    assert 8 <= len(few) * BLOCK <= 100 and few[-1].tokens[0, 0] > 1_200


def test_a_fingerprint_tells_data_apart_whatever_the_batches(tmp_path):
    def windows(tokens: np.ndarray, block_size: int = 8, batch_size: int = 1) -> str:
        return Windows([write(tmp_path / "tokens.bin", tokens)], block_size, batch_size, seed=0).fingerprint()

    tokens = np.arange(50_000) % 999
    assert windows(tokens) == windows(tokens, 16, 3)
    assert len({windows(tokens), windows(tokens[:-1]), windows(np.roll(tokens, 1))}) == 3
    assert Counting([3, 2]).fingerprint() == Counting([3, 2], batch_size=2).fingerprint()
    assert Counting([3, 2]).fingerprint() != Counting([2, 3]).fingerprint()


class Counting(Sequences):
    """Sequence i consists of the number i."""

    def __init__(self, lengths: list[int], batch_size: int = 1, seed: int = 0):
        self.lengths, self.batch_size, self.seed = np.array(lengths), batch_size, seed

    def row(self, i: int) -> Batch:
        tokens = torch.full((1, int(self.lengths[i])), int(i))
        return Batch(tokens, tokens)


def test_an_epoch_visits_each_sequence_once_grouped_by_length():
    lengths = np.random.default_rng(0).integers(2, 200, size=203).tolist()
    data, orders = Counting(lengths, batch_size=8), []
    for epoch in (0, 1):
        batches = [data.batch(epoch * data.batches_per_epoch + i) for i in range(data.batches_per_epoch)]
        orders.append([int(row.tokens[0, 0]) for batch in batches for row in batch])
        assert sorted(orders[-1]) == list(range(203)) and {len(batch) for batch in batches} == {8, 3}
        padding = sum(max(map(width, batch)) * len(batch) - sum(map(width, batch)) for batch in batches)
        assert padding < 0.1 * sum(lengths)  # random batches would have 70%
    assert orders[0] != orders[1] and data.epoch.cache_info().misses == 2  # an epoch is ordered once
    assert [width(row) for row in data.largest_batch()] == sorted(lengths)[:-9:-1]


def width(row: Batch) -> int:
    return row.tokens.size(1)


def test_rows_of_different_lengths_are_padded_to_few_shapes():
    rows = [Batch(torch.ones(1, n, dtype=torch.int64), torch.ones(1, n, dtype=torch.int64)) for n in (3, 70)]
    for max_length, expected in ((None, 128), (100, 100)):
        batch = stack(rows, max_length)
        assert batch.tokens.shape == (2, expected) and batch.total_weight == 73
        assert (batch.targets[0, 3:] == IGNORE_INDEX).all() and (batch.targets[0, :3] == 1).all()


@pytest.fixture
def conversations(tmp_path) -> Path:
    """Three conversations: their tokens, the loss mask of each token, and the offsets."""
    write(tmp_path / "sft_train.bin", [9, 1, 2, 7, 8, 9, 3, 7, 9, 4, 5, 6, 7, 8])
    write(tmp_path / "sft_train_mask.bin", [0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 1], "u1")
    write(tmp_path / "sft_train_index.bin", [0, 5, 8, 14], "<u8")
    return tmp_path


def test_conversations_have_loss_on_the_assistants_tokens_only(conversations):
    data = Conversations(conversations, "train", 8, 2, 0)
    rows = list(data.in_order())
    assert [row.tokens[0].tolist() for row in rows] == [[9, 1, 2, 7], [9, 3], [9, 4, 5, 6, 7]]
    no = IGNORE_INDEX
    assert [row.targets[0].tolist() for row in rows] == [[no, no, 7, 8], [no, 7], [no, no, no, 7, 8]]
    assert data.first_exchanges(2) == [([9, 1, 2], [7, 8]), ([9, 3], [7])]


def test_noise_replaces_some_tokens_of_questions_and_nothing_else(conversations):
    plain, noisy = (Conversations(conversations, "train", 8, 3, 0, noise, n_text=9) for noise in (0.0, 0.5))
    was_replaced = []
    for step in range(100):
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(noisy.batch(step), noisy.batch(step), strict=True))
        for a, b in zip(plain.batch(step), noisy.batch(step), strict=True):
            is_question = (a.targets == IGNORE_INDEX) & (a.tokens < 9)
            assert torch.equal(a.targets, b.targets) and torch.equal(a.tokens[~is_question], b.tokens[~is_question])
            was_replaced += (a.tokens != b.tokens)[is_question].tolist()
    assert np.mean(was_replaced) == pytest.approx(0.5 * 8 / 9, abs=0.06)


@pytest.mark.parametrize(("index", "message"), [([0, 8, 5, 14], "belong together"), ([0, 14], "of 14 tokens, longer")])
def test_conversations_that_do_not_fit_are_refused(conversations, index, message):
    write(conversations / "sft_train_index.bin", index, "<u8")
    with pytest.raises(UserError, match=message):
        Conversations(conversations, "train", 8, 2, 0)
