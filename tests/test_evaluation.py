"""How good a model is: the same figures as from other people's code, every token scored once."""

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

from model import GPT, IGNORE_INDEX, GPTConfig
from text import tokenizer as tokenizers
from training.evaluation import compile_evaluation, mean_loss
from training.loader import Windows, stack, strided

EVALUATE = ["evaluate.py", "--model", "tiny", "--device", "cpu"]


@pytest.fixture(scope="module")
def reference() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=16, n_layer=2, n_head=2)).eval()


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("evaluation")
    reference.save_pretrained(path / "tiny")
    return path


@torch.no_grad()
def logprobs(reference: GPT2LMHeadModel, ids: list[int], n: int) -> torch.Tensor:
    """The log-probabilities of the last n of ids (at most 65), by `transformers`."""
    of_all = reference(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    return of_all.gather(-1, torch.tensor(ids[1:])[:, None])[-n:, 0]


@pytest.mark.parametrize("stride", [16, 31, 64])
def test_perplexity_over_strided_windows_equals_that_of_transformers(reference, folder, stride):
    text = "It was a bright cold day in April, and the clocks were striking thirteen.\n" * 12 + "日本 🙂"
    (folder / "text.txt").write_text(text, encoding="utf-8")
    ids = [50256, *tokenizers.gpt2().encode(text)]
    total, scored = 0.0, 1
    while scored < len(ids):  # the next tokens, with all the context that there is room for
        end = min(max(65, scored + stride), len(ids))
        total -= logprobs(reference, ids[max(0, end - 65) : end], end - scored).sum().item()
        scored = end
    arguments = [*EVALUATE, "--stride", stride, "--json"]
    figures = json.loads(succeed(folder, *arguments, "--text", "text.txt"))
    assert figures["tokens"] == len(ids) - 1 and figures["bytes"] == len(text.encode())
    assert figures["loss"] == pytest.approx(total / figures["tokens"], abs=1e-4)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert figures["bits_per_byte"] == pytest.approx(total / math.log(2) / len(text.encode()), abs=1e-4)
    if stride == 31:
        assert json.loads(succeed(folder, *arguments, stdin=text.replace("\n", "\r\n"))) == figures
        np.array(ids, dtype="<u2").tofile(folder / "t.bin")
        assert json.loads(succeed(folder, *arguments, "--data", "t.bin")) == figures


@pytest.mark.parametrize(("n", "block_size", "stride"), [(2, 8, 4), (9, 8, 8), (10, 8, 1), (100, 8, 3), (57, 8, 8)])
def test_strided_windows_score_every_token_once(n, block_size, stride):
    scored = []
    for i, row in enumerate(strided(np.arange(n, dtype=np.uint16), block_size, stride)):
        counted = (row.targets[0] != IGNORE_INDEX).nonzero()[:, 0]
        assert row.tokens.size(1) <= block_size
        assert torch.equal(row.tokens[0, counted] + 1, row.targets[0, counted])
        assert i == 0 or counted[0] >= block_size - stride  # all the context that the stride leaves
        scored += row.targets[0, counted].tolist()
    assert scored == list(range(1, n))


def test_hellaswag_takes_the_likeliest_ending(reference, folder):
    endings = [["sleeps.", "runs away fast.", "is a cat, of course, and so on.", "x"], ["a b", "c d", "e", "f g h"]]
    rows = [{"ctx": f"The cat {i}", "endings": e, "label": i} for i, e in enumerate(endings * 2)]
    rows.append({**rows[1], "ctx": "The cat " * 100})  # longer than the context
    (folder / "h.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer, expected = tokenizers.gpt2(), {"acc": 0, "acc_norm": 0}
    for row in rows:
        ids = [(tokenizer.encode(row["ctx"]), tokenizer.encode(" " + ending)) for ending in row["endings"]]
        found = [logprobs(reference, (context + ending)[-65:], len(ending)) for context, ending in ids]
        expected["acc"] += max(range(4), key=lambda i: found[i].sum()) == row["label"]
        expected["acc_norm"] += max(range(4), key=lambda i: found[i].mean()) == row["label"]
    arguments = [*EVALUATE, "--hellaswag", "h.jsonl"]
    figures = json.loads(succeed(folder, *arguments, "--json"))
    assert figures["questions"] == 5 and {name: figures[name] * 5 for name in expected} == pytest.approx(expected)
    assert "0.2859" in succeed(folder, *arguments)
    for line in ('{"ctx": "a", "endings": ["b"], "label": 0}', '{"ctx": "a"}', "[]", "no JSON"):
        (folder / "h.jsonl").write_text(f"{json.dumps(rows[0])}\n{line}\n")
        bad = run_script(folder, *arguments)
        assert bad.returncode == 1 and "h.jsonl, line 2: expected HellaSwag's `ctx`" in bad.stderr.splitlines()[-1]


def test_hellaswag_comes_from_the_hub_if_no_file_is_named(serve, folder, tmp_path):
    rows = [{"ctx": f"The cat {i}", "endings": ["a b", "c d", "e", "f g h"], "label": str(i % 4)} for i in range(7)]
    (folder / "local.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = tmp_path / "www/Rowan/hellaswag/main/data"
    data.mkdir(parents=True)
    for split, some in (("train", rows[1:]), ("validation", rows)):
        pq.write_table(pa.Table.from_pylist(some), data / f"{split}-00000-of-00001.parquet")
    environment = hub_environment(serve(partial(HubHandler, tmp_path / "www")), tmp_path / "cache")
    arguments = [*EVALUATE, "--json", "--hellaswag"]
    found = subprocess.run(command(*arguments), cwd=folder, env=environment, capture_output=True, encoding="utf-8")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == json.loads(succeed(folder, *arguments, "local.jsonl"))
    offline = run_script(folder, *arguments)
    assert offline.returncode == 1 and "--hellaswag FILE work" in offline.stderr.splitlines()[-1]


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


def test_a_compiled_evaluation_gives_the_same_loss_and_never_recompiles(toy, monkeypatch):
    counter = CompileCounter()  # in place of inductor, which takes long
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    model = GPT(GPTConfig(block_size=32, vocab_size=448, n_tokens=448, n_layer=1, n_head=2, n_embd=32, dropout=0.1))
    model.compile_training()
    compiled, data = compile_evaluation(model), Windows([toy / "data/toy/val.bin"], 32, 4, 0)
    rows = list(data.in_order())
    assert len(rows) > 8 and rows[-1].tokens.size(1) < 32
    for some in (rows[:8], rows[:10], rows):  # full batches; a smaller last batch; a shorter last window
        assert mean_loss(model, some, 4, compiled=compiled) == pytest.approx(mean_loss(model, some, 4), rel=1e-5)
        assert model.training and counter.frame_count == 2  # the network, and the loss of a chunk
    for step in range(2):
        batch = stack(data.batch(step), max_length=32)
        model(batch.tokens, batch.targets).backward()
        mean_loss(model, rows, 4, compiled=compiled)
        assert counter.frame_count == 4  # training compiled its own two
