"""What a model is worth: the same figures as from other people's code, every token scored once."""

import json
import math
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import command, hub_environment, run_script, succeed
from hub_server import HubHandler
from torch._dynamo.testing import CompileCounter
from transformers import GPT2Config, GPT2LMHeadModel

from model import GPT, GPTConfig
from text import tokenizer as tokenizers
from training.config import TrainerConfig
from training.distributed import Processes
from training.evaluation import mean_loss
from training.loader import Windows, strided
from training.state import TrainingState
from training.trainer import Trainer


@pytest.fixture(scope="module")
def reference() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=16, n_layer=2, n_head=2)).eval()


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("evaluation")
    reference.save_pretrained(path / "tiny")
    return path


@pytest.mark.parametrize("stride", [16, 31, 64])
def test_perplexity_over_strided_windows_equals_that_of_transformers(reference, folder, stride):
    text = "It was a bright cold day in April, and the clocks were striking thirteen.\n" * 12 + "日本 🙂"
    (folder / "text.txt").write_text(text, encoding="utf-8")
    ids = torch.tensor([[50256, *tokenizers.gpt2().encode(text)]])
    total, end = 0.0, 1
    while end < ids.size(1):  # the next tokens, with all the context that there is room for
        before, end = end, min(max(65, end + stride), ids.size(1))
        window = ids[:, max(0, end - 65) : end]
        labels = window.clone()
        labels[:, : window.size(1) - (end - before)] = -100
        with torch.no_grad():
            # transformers shifts labels itself; the last position has none, so it may be given one token more
            total += (
                reference(window[:, :64], labels=labels[:, :64]).loss.nan_to_num().item()
                * (labels[0, 1:64] != -100).sum()
            )
            if window.size(1) == 65:
                logits = reference(window[:, :64]).logits[0, -1]
                total -= logits.log_softmax(-1)[window[0, 64]].item()
    total = float(total)
    arguments = ["evaluate.py", "--model", "tiny", "--stride", stride, "--json", "--device", "cpu"]
    figures = json.loads(succeed(folder, *arguments, "--text", "text.txt"))
    assert figures["tokens"] == ids.size(1) - 1 and figures["bytes"] == len(text.encode())
    assert figures["loss"] == pytest.approx(total / figures["tokens"], abs=1e-4)
    assert figures["bits_per_byte"] == pytest.approx(total / math.log(2) / len(text.encode()), abs=1e-4)
    if stride == 31:
        assert json.loads(succeed(folder, *arguments, stdin=text.replace("\n", "\r\n"))) == figures
        np.array(ids[0], dtype="<u2").tofile(folder / "t.bin")
        assert json.loads(succeed(folder, *arguments, "--data", "t.bin")) == figures


@pytest.mark.parametrize(("n", "block_size", "stride"), [(2, 8, 4), (9, 8, 8), (10, 8, 1), (100, 8, 3), (57, 8, 8)])
def test_strided_windows_score_every_token_once(n, block_size, stride):
    scored = []
    for i, row in enumerate(strided(np.arange(n, dtype=np.uint16), block_size, stride)):
        assert row.tokens.size(1) <= block_size and torch.equal(row.tokens + 1, row.targets)
        scored += row.targets[0, row.counted].tolist()
        if i:  # the first of them has all the context that the stride leaves
            assert row.counted[0] >= block_size - stride
    assert scored == list(range(1, n))


def test_hellaswag_takes_the_likeliest_ending(reference, folder):
    endings = [["sleeps.", "runs away fast.", "is a cat, of course, and so on.", "x"], ["a b", "c d", "e", "f g h"]]
    rows = [{"ctx": f"The cat {i}", "endings": e, "label": i} for i, e in enumerate(endings * 2)]
    (folder / "h.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer, expected = tokenizers.gpt2(), {"acc": 0, "acc_norm": 0}
    for row in rows:
        sums, means = [], []
        for ending in row["endings"]:
            before, after = tokenizer.encode(row["ctx"]), tokenizer.encode(" " + ending)
            with torch.no_grad():
                logprobs = reference(torch.tensor([before + after])).logits[0].log_softmax(-1)
            found = [logprobs[len(before) + i - 1, token].item() for i, token in enumerate(after)]
            sums.append(sum(found))
            means.append(sum(found) / len(found))
        expected["acc"] += sums.index(max(sums)) == row["label"]
        expected["acc_norm"] += means.index(max(means)) == row["label"]
    arguments = ["evaluate.py", "--model", "tiny", "--hellaswag", "h.jsonl", "--batch-size", "3", "--device", "cpu"]
    figures = json.loads(succeed(folder, *arguments, "--json"))
    assert figures["questions"] == 4 and {name: figures[name] * 4 for name in expected} == expected
    assert "0.2859" in succeed(folder, *arguments)
    (folder / "h.jsonl").write_text('{"ctx": "a", "endings": ["b"], "label": 0}')
    bad = run_script(folder, *arguments)
    assert bad.returncode == 1 and "h.jsonl, line 1: expected `ctx`" in bad.stderr.splitlines()[-1]


def test_hellaswag_comes_from_the_hub_where_no_file_is_named(serve, folder, tmp_path):
    rows = [{"ctx": f"The cat {i}", "endings": ["a b", "c d", "e", "f g h"], "label": str(i % 4)} for i in range(7)]
    (folder / "local.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = tmp_path / "www/Rowan/hellaswag/main/data"
    data.mkdir(parents=True)
    for split in ("train", "validation"):
        pq.write_table(pa.Table.from_pylist(rows[split == "train" :]), data / f"{split}-00000-of-00001.parquet")
    environment = hub_environment(serve(partial(HubHandler, tmp_path / "www")), tmp_path / "cache")
    arguments = ["evaluate.py", "--model", "tiny", "--json", "--device", "cpu", "--hellaswag"]
    found = subprocess.run(
        command(*arguments), cwd=folder, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == json.loads(succeed(folder, *arguments, "local.jsonl"))
    offline = run_script(folder, *arguments)
    assert offline.returncode == 1 and "--hellaswag FILE works" in offline.stderr.splitlines()[-1]


def test_the_evaluator_is_the_trainers(toy):
    log = [json.loads(line) for line in (toy / "checkpoints/toy.jsonl").read_text().splitlines()]
    best = min(entry["val_loss"] for entry in log if "val_loss" in entry)
    arguments = ["evaluate.py", "--model", "checkpoints/toy.pt", "--device", "cpu"]
    figures = json.loads(succeed(toy, *arguments, "--data", "data/toy", "--stride", "64", "--json"))
    assert figures["loss"] == pytest.approx(best, abs=2e-3)  # its last, short window has no context before it
    for status, message, more in (
        (2, "longer than the model's context", ["--text", "text/00.txt", "--stride", "65"]),
        (1, "there is no text to evaluate on", []),
        (1, "none.txt", ["--text", "none.txt"]),
        (1, "run prepare_data.py first", ["--data", "none"]),
    ):
        result = run_script(toy, *arguments, *more)
        assert result.returncode == status and message in result.stderr.splitlines()[-1], result.stderr


def test_a_compiled_evaluation_gives_the_same_loss_and_compiles_once_whatever_the_last_batch(toy, monkeypatch):
    counter = CompileCounter()  # in place of inductor, which takes long
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    shape = GPTConfig(block_size=32, vocab_size=448, n_tokens=448, n_layer=1, n_head=2, n_embd=32, dropout=0.1)
    config = TrainerConfig(device="cpu", batch_size=4, compile="on")
    data = Windows([toy / "data/toy/val.bin"], 32, 4, 0)
    trainer = Trainer(TrainingState.create(GPT(shape), config, Processes()), data, data)
    model, compiled = trainer.state.model, trainer.compiled_evaluation
    rows = list(data.in_order())
    assert len(rows) > 8 and rows[-1].tokens.size(1) < 32
    for some in (rows[:8], rows[:10], rows):  # full batches; a smaller last batch; a shorter last window
        frames = counter.frame_count
        loss = mean_loss(model, iter(some), 4, compiled=compiled)
        assert counter.frame_count == (2 if frames == 0 else frames)  # the network, and the loss of a chunk
        assert loss == pytest.approx(mean_loss(model, iter(some), 4), rel=1e-5)
        assert model.training and counter.frame_count == 2
    for _ in range(2):
        batch = trainer.load_batch(0)
        trainer.forward_backward(batch.micro_batches, batch.total_weight)
        mean_loss(model, iter(rows), 4, compiled=compiled)
        assert counter.frame_count == 4  # training compiled its own two
