"""The loader's batches: a pure function of seed and step."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch

from training.loader import Batch, Conversations, Prefetcher, Windows, micro_batches, stack


def write_tokens(path: Path, tokens) -> Path:
    np.asarray(tokens, dtype="<u2").tofile(path)
    return path


def test_windows_are_a_pure_function_of_seed_and_step_and_stay_inside_files(tmp_path):
    paths = [
        write_tokens(tmp_path / "a.bin", range(100)),
        write_tokens(tmp_path / "b.bin", range(1000, 1040)),
        write_tokens(tmp_path / "short.bin", range(5)),
    ]
    data = Windows(paths, block_size=16, batch_size=8, seed=3)
    seen = set()
    for step in range(60):
        batch = stack(data.batch(step))
        assert torch.equal(batch.tokens + 1, batch.targets)  # no window crosses from one file to the next
        seen |= set(batch.targets.flatten().tolist())
    assert seen == set(range(1, 100)) | set(range(1001, 1040))
    again = Windows(paths, block_size=16, batch_size=8, seed=3)
    assert torch.equal(stack(again.batch(41)).tokens, stack(data.batch(41)).tokens)
    assert not torch.equal(stack(data.batch(41)).tokens, stack(data.batch(42)).tokens)
    assert not torch.equal(stack(Windows(paths, 16, 8, seed=4).batch(41)).tokens, stack(data.batch(41)).tokens)


def test_every_split_of_a_batch_is_the_same_batch(tmp_path):
    data = Windows([write_tokens(tmp_path / "a.bin", range(500))], block_size=8, batch_size=12, seed=0)
    rows = data.batch(5)
    whole = {tuple(row) for row in stack(rows).tokens.tolist()}
    for n, world_size in ((1, 1), (4, 1), (2, 3), (5, 2), (1, 16)):
        parts = [micro for rank in range(world_size) for micro in micro_batches(rows, n, rank, world_size)]
        assert sum(micro.total_weight for micro in parts) == 12 * 8
        assert {tuple(row) for micro in parts if micro.total_weight for row in micro.tokens.tolist()} == whole


def test_evaluation_scores_every_token_once(tmp_path):
    data = Windows([write_tokens(tmp_path / "a.bin", range(101))], block_size=16, batch_size=1, seed=0)
    assert [t for batch in data.in_order() for t in batch.targets.flatten().tolist()] == list(range(1, 101))
    assert sum(batch.targets.numel() for batch in data.in_order(max_tokens=48)) <= 48


def test_an_epoch_visits_every_conversation_once_grouped_by_length(toy):
    data = Conversations(toy / "data/toy", "train", block_size=64, batch_size=8, seed=0)
    starts = lambda epoch: Counter(  # noqa: E731
        tuple(row.tokens[0].tolist())
        for k in range(data.batches_per_epoch)
        for row in data.batch(epoch * data.batches_per_epoch + k)
    )
    every = Counter(tuple(row.tokens[0].tolist()) for row in data.in_order())
    assert starts(0) == starts(1) == every and sum(every.values()) == len(data)
    assert [b.tokens.tolist() for b in data.batch(0)] != [b.tokens.tolist() for b in data.batch(data.batches_per_epoch)]


def test_only_the_assistants_tokens_count(toy):
    data = Conversations(toy / "data/toy", "train", block_size=64, batch_size=8, seed=0)
    from text import tokenizer

    bpe = tokenizer.load_tokenizer(toy / "data/toy/tokenizer.json")
    batch = stack(data.batch(0))
    assert batch.tokens.size(1) % 64 == 0
    counted = bpe.decode(batch.targets.flatten()[batch.counted].tolist())
    texts = [bpe.decode(row.tokens[0].tolist()) for row in data.batch(0)]
    answers = [
        part.split("<|endoftext|>")[0] + "<|endoftext|>" for text in texts for part in text.split("<|assistant|>")[1:]
    ]
    assert counted == "".join(answers)


def test_stacking_pads_behind_and_counts_the_same():
    rows = [Batch(torch.full((1, n), n), torch.full((1, n), n + 1), None) for n in (3, 70)]
    batch = stack(rows, max_length=100)
    assert batch.tokens.shape == (2, 100) and batch.total_weight == 73
    assert batch.targets.flatten()[batch.counted].tolist() == [4] * 3 + [71] * 70


def test_the_prefetcher_gives_what_was_asked_for():
    with Prefetcher(lambda step: step * 10, 3) as batches:
        assert [batches.get(step) for step in (3, 4, 9, 10)] == [30, 40, 90, 100]
