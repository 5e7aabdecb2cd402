"""The models in `checkpoints/`: the newest that a script can use, their list, and how each is described."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

import classify
import evaluate
import export
import generate
from system.errors import UserError
from weights import describe
from weights.describe import newest, table
from weights.loading import load_file

SAMPLES = REPOSITORY / "tests/samples"
OLDEST_FIRST = ("base.pt", "lora.pt", "sft.pt", "classifier.pt", "snapshots/base_step_9.pt", "bad.pt", "base.last.pt")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with a model of each kind, and files that are no models."""
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "snapshots").mkdir(parents=True)
    for i, name in enumerate(OLDEST_FIRST):
        sample = SAMPLES / ("base.pt" if name.startswith("snapshots") else name)
        (checkpoints / name).write_bytes(b"hello" if name == "bad.pt" else sample.read_bytes())
        os.utime(checkpoints / name, (1e9 + i, 1e9 + i))
    shutil.copy(SAMPLES / "base.pt", tmp_path)  # the base model of the adapter
    monkeypatch.chdir(tmp_path)
    return checkpoints


def test_the_newest_usable_model_is_chosen_and_named(here, capsys):
    assert newest("language model") == newest("chat model") == "checkpoints/sft.pt"
    assert newest("model") == newest("classifier") == "checkpoints/classifier.pt"
    named = "model: checkpoints/sft.pt, the newest language model in checkpoints/\n"
    assert capsys.readouterr().err.startswith(named)
    os.utime(here / "base.pt", (2e9, 2e9))
    assert newest("language model") == "checkpoints/base.pt" and newest("chat model") == "checkpoints/sft.pt"
    (here / "sft.pt").unlink()
    assert newest("chat model") == "checkpoints/lora.pt"


def test_every_script_that_uses_a_model_takes_the_newest(here, capsys):
    (here.parent / "a.txt").write_text("some text")
    for script, config, name in (
        (generate, generate.Config(prompt="x", max_new_tokens=1), "sft.pt"),
        (generate, generate.Config(instruction="x", max_new_tokens=1), "sft.pt"),
        (evaluate, evaluate.Config(text=Path("a.txt")), "sft.pt"),
        (classify, classify.Config(texts=("x",)), "classifier.pt"),
        (export, export.Config(out=Path("out")), "classifier.pt"),
    ):
        script.main(config)
        printed = capsys.readouterr()
        assert f"model: checkpoints/{name}, the newest" in printed.err and "newest" not in printed.out


def test_without_a_usable_model_one_line_says_what_there_is_and_how_to_get_one(here):
    for name in ("sft.pt", "lora.pt", "classifier.pt"):
        (here / name).unlink()
    with pytest.raises(UserError) as error:
        generate.main(generate.Config(chat=True))
    assert str(error.value) == (
        "no chat model in checkpoints/, only checkpoints/bad.pt (damaged), checkpoints/base.pt (base): "
        "make one with python train_sft.py --preset demo --model checkpoints/base.pt --out checkpoints/base-chat.pt, "
        "or name one with --model"
    )
    shutil.rmtree(here)
    with pytest.raises(UserError, match="^no language model in checkpoints/: make one with make demo, or python train"):
        newest("language model")
    assert table().startswith("no model in checkpoints/: make one with make demo, or python train.py")


def test_the_list_has_an_aligned_line_for_every_file(here, capsys):
    generate.main(generate.Config(list=True))
    heading, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [f"checkpoints/{name}" for name in reversed(OLDEST_FIRST[:-1])]
    assert "not a checkpoint of this project, or damaged" in lines[0]
    for i, kind, parent in ((3, "chat", "base.pt"), (4, "chat (LoRA)", "base.pt"), (5, "base", "-")):
        line = lines[i]
        for title, value in (("kind", kind), ("data", "data"), ("made from", parent)):
            assert line[heading.index(title) :].startswith(value), (title, line)
    loss = torch.load(here / "sft.pt", weights_only=True)["history"][-1]["val_loss"]
    assert f" {loss:.4f}  data" in lines[3]


def test_a_model_is_described_by_its_facts():
    state = load_file(SAMPLES / "base.pt")
    facts = describe.facts(state)
    loss = state["history"][-1]["val_loss"]
    assert facts["parameters"] == f"{sum(tensor.numel() for tensor in state['model'].values()):,}"
    assert facts["validation loss"] == f"{loss:.4f}" and facts["perplexity"] == "320.85"
    assert facts["shape"] == "1 layers, 1 heads, 8 wide" and facts["training tokens"] == "256"
    text = f"A GPT-2 with {facts['parameters']} parameters that completes text, trained on data"
    assert describe.introduction(state) == f"{text}, with a validation loss of {loss:.2f}."
    classifier = describe.facts(load_file(SAMPLES / "classifier.pt"))
    assert classifier["labels"] == "a, b" and classifier["test accuracy"] == "0.5000" and "perplexity" not in classifier
    chats = {**load_file(SAMPLES / "sft.pt"), "is_held_out": False}
    assert "validation loss" not in describe.facts(chats)
    assert "with a loss on its training conversations of" in describe.introduction(chats)
