"""The models in `checkpoints/`: the newest that a script can use, and their list."""

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
from weights.listing import newest, table


@pytest.fixture
def here(toy, tmp_path, monkeypatch) -> Path:
    """A folder with a base model, a newer chat model, a newer adapter, and files that are no models."""
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "snapshots").mkdir(parents=True)
    for name in ("toy.pt", "sft.pt", "toy.last.pt"):
        shutil.copy(toy / "checkpoints" / name, checkpoints)
    shutil.copy(REPOSITORY / "tests/samples/lora.pt", checkpoints)
    shutil.copy(checkpoints / "toy.pt", checkpoints / "snapshots/toy_step_9.pt")
    (checkpoints / "bad.pt").write_bytes(b"hello")
    for i, name in enumerate(("toy.pt", "lora.pt", "sft.pt", "snapshots/toy_step_9.pt", "bad.pt", "toy.last.pt")):
        os.utime(checkpoints / name, (1e9 + i, 1e9 + i))
    monkeypatch.chdir(tmp_path)
    return checkpoints


def make_newest(path: Path) -> None:
    os.utime(path, (2e9, 2e9))


def add_classifier(here: Path) -> None:
    good = torch.load(here / "toy.pt", weights_only=True)
    config = {**good["config"], "n_classes": 2, "tie_weights": False}
    weights = good["model"] | {"lm_head.weight": torch.zeros(2, config["n_embd"])}
    options = {"input": None, "dataset": "sms-spam", "model": "checkpoints/toy.pt"}
    classifier = {"kind": "classifier", "labels": ["a", "b"], "config": config, "model": weights}
    torch.save({**good, **classifier, "train_config": options}, here / "spam.pt")
    make_newest(here / "spam.pt")


def test_the_newest_usable_model_is_chosen_and_named(here, capsys):
    assert newest("language model") == newest("chat model") == "checkpoints/sft.pt"
    assert capsys.readouterr().err == (
        "model: checkpoints/sft.pt, the newest language model in checkpoints/\n"
        "model: checkpoints/sft.pt, the newest chat model in checkpoints/\n"
    )
    make_newest(here / "toy.pt")
    assert newest("language model") == "checkpoints/toy.pt" and newest("chat model") == "checkpoints/sft.pt"
    (here / "sft.pt").unlink()
    assert newest("chat model") == "checkpoints/lora.pt"
    add_classifier(here)
    assert newest("model") == newest("classifier") == "checkpoints/spam.pt"
    assert newest("language model") == "checkpoints/toy.pt"


def test_every_script_that_uses_a_model_takes_the_newest(here, capsys):
    add_classifier(here)
    (here.parent / "a.txt").write_text("some text")
    for script, config, name in (
        (generate, generate.Config(prompt="x", max_new_tokens=1), "sft.pt"),
        (generate, generate.Config(instruction="x", max_new_tokens=1), "sft.pt"),
        (evaluate, evaluate.Config(text=Path("a.txt")), "sft.pt"),
        (classify, classify.Config(texts=("x",)), "spam.pt"),
        (export, export.Config(out=Path("out")), "spam.pt"),
    ):
        script.main(config)
        printed = capsys.readouterr()
        assert f"model: checkpoints/{name}, the newest" in printed.err and "newest" not in printed.out


def test_without_a_usable_model_one_line_says_what_there_is_and_how_to_get_one(here):
    (here / "sft.pt").unlink()
    (here / "lora.pt").unlink()
    with pytest.raises(UserError) as error:
        generate.main(generate.Config(chat=True))
    assert str(error.value) == (
        "no chat model in checkpoints/, only checkpoints/bad.pt (damaged), checkpoints/toy.pt (base): "
        "make one with python train_sft.py --preset demo --model checkpoints/toy.pt --out checkpoints/toy-chat.pt, or "
        "name one with --model"
    )
    shutil.rmtree(here)
    with pytest.raises(UserError, match="^no language model in checkpoints/: make one with make demo, or python train"):
        newest("language model")
    assert (
        table() == "no model in checkpoints/: make one with make demo, or python train.py --preset demo --data TEXT.txt"
    )


def test_the_list_has_an_aligned_line_for_every_file(here, capsys):
    add_classifier(here)
    generate.main(generate.Config(list=True))
    heading, *lines = capsys.readouterr().out.splitlines()
    names = ["spam", "bad", "snapshots/toy_step_9", "sft", "lora", "toy"]
    assert [line.split()[0] for line in lines] == [f"checkpoints/{name}.pt" for name in names]
    assert "not a checkpoint of this project, or damaged" in lines[1]
    cells = {line.split()[0]: line for line in lines if "damaged" not in line}
    for name, kind, data, parent in (
        ("toy", "base", "data/toy", "-"),
        ("sft", "chat", "data/toy", "checkpoints/toy.pt"),
        ("spam", "classifier", "sms-spam", "checkpoints/toy.pt"),
    ):
        line = cells[f"checkpoints/{name}.pt"]
        for title, value in (("kind", kind), ("data", data), ("made from", parent)):
            assert line[heading.index(title) :].startswith(value), (title, line)
    loss = torch.load(here / "sft.pt", weights_only=True)["history"][-1]["val_loss"]
    assert f" {loss:.4f}  data/toy" in cells["checkpoints/sft.pt"]


def test_a_name_with_line_breaks_or_control_characters_stays_on_its_line(here, capsys):
    good = torch.load(here / "toy.pt", weights_only=True)
    torch.save({**good, "train_config": {"data": "a\nb", "model": "c\u2028d\x1b[2J"}}, here / "odd.pt")
    odd = (here / "odd.pt").rename(here / "new\nline\x1b[2J.pt")
    make_newest(odd)
    assert newest("model") == f"checkpoints/{odd.name}"
    assert capsys.readouterr().err == "model: checkpoints/new line\\x1b[2J.pt, the newest model in checkpoints/\n"
    _, first, *others = table().splitlines()
    assert first.startswith("checkpoints/new line\\x1b[2J.pt  ") and "  a b  " in first
    assert first.endswith("  c d\\x1b[2J") and all(line.startswith("checkpoints/") for line in others)
