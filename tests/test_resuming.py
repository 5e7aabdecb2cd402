"""What a run may replace, and what a resumed run says, keeps and refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, contents, fine_tune, pretrain

import train
from system.cli import plain
from system.errors import UserError
from system.files import is_locked, locked
from text.token_files import read_token_meta
from text.tokenizer import load_tokenizer, tokenizer_of_data
from training.config import TrainerConfig
from training.parallel import Processes
from training.saving import changed_options, claim_output

A = Path("checkpoints/a.pt")


EXISTS = r"exists: add .*--overwrite to replace it, or choose another --out"
CLAIMS = [  # files that exist, options, a part of the refusal; None: the run may begin
    ([], {}, None),
    ([], {"resume": True}, None),  # starts
    (["checkpoints/a.pt"], {}, EXISTS),
    (["checkpoints/a.jsonl"], {}, EXISTS),
    (["checkpoints/a.md"], {}, EXISTS),
    (["plots/a_loss.png"], {}, EXISTS),
    (["checkpoints/a.last.pt"], {}, r"add --resume to continue that run, --overwrite to replace it"),
    (["checkpoints/a.pt", "plots/a_loss.png"], {"overwrite": True}, None),
    (["checkpoints/a.pt"], {"resume": True}, None),
    (["checkpoints/a.pt"], {"plan": True}, None),
    (["checkpoints/b.pt"], {}, None),
]


@pytest.mark.parametrize(("files", "options", "refusal"), CLAIMS)
def test_a_run_replaces_nothing_unasked(tmp_path, monkeypatch, files, options, refusal):
    monkeypatch.chdir(tmp_path)
    for name in files:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    outcome = pytest.raises(UserError, match=refusal) if refusal else contextlib.nullcontext()
    with outcome, claim_output(TrainerConfig(out=A, **options), Processes()) as resumed:
        assert resumed is None
    assert all(Path(name).exists() for name in files)


@pytest.mark.parametrize("name", ["a.pt", "a.last.pt", "a.jsonl", "a.md", "a_loss.png"])
def test_a_run_never_writes_to_what_it_reads(tmp_path, name):
    (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / name)
    claim = claim_output(TrainerConfig(out=tmp_path / "a.pt", overwrite=True), Processes(), inputs=[tmp_path / "link"])
    with pytest.raises(UserError, match="which it reads: choose another --out"), claim:
        pass


@pytest.mark.parametrize("run", [pretrain, fine_tune])
def test_two_runs_never_write_one_output(here, run):
    with locked(A), pytest.raises(UserError, match=r"checkpoints/a.pt is being written by another run: wait for it"):
        run(out=A, overwrite=True)
    assert not is_locked(A) and not list(Path("checkpoints").glob("*a.*"))


def test_a_lock_ends_with_its_process_however_it_ends(tmp_path):
    path = tmp_path / "a.pt"
    program = "import pathlib, sys, time\nfrom system.files import locked\nwith locked(pathlib.Path(sys.argv[1])):\n"
    program += " print('held', flush=True)\n time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", program, path], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n" and is_locked(path)
    process.kill()
    process.wait()
    assert not is_locked(path)
    with locked(path):
        assert is_locked(path)
    assert not list(tmp_path.iterdir())


CHANGES = [  # what differs, a part of the refusal; or None and what the run says
    ({}, None, []),
    ({"seed": 2}, None, ["--seed 2 (was 1337)"]),
    ({"learning_rate": 0.1, "max_steps": 9}, None, ["--max-steps 9 (was 80000)", "--learning-rate 0.1 (was 0.0006)"]),
    ({"out": Path("b.pt"), "preset": "demo", "data": "moved", "resume": True}, None, []),
    ({"n_layer": 3}, "a resumed run cannot change --n-layer 3 (was 12): resume with the flags of that run", []),
    ({"optimizer": "muon", "seed": 2}, "cannot change --optimizer muon (was adamw)", []),
    ({"block_size": 5, "n_embd": 24}, "cannot change --block-size 5 (was 1024), --n-embd 24 (was 768)", []),
]


@pytest.mark.parametrize(("change", "refusal", "said"), CHANGES)
def test_a_resumed_run_says_which_options_differ(change, refusal, said):
    before = {"train_config": {**plain(train.Config()), "flag_of_another_version": 1}, "data": ["a", "b"]}
    now = dataclasses.replace(train.Config(), **change)
    if refusal is None:
        assert sorted(changed_options(now, before, ["a", "b"])) == sorted(said)
        with pytest.raises(UserError, match=r"the data is not what \S+.last.pt was trained on"):
            changed_options(now, before, ["a", "c"])
        return
    with pytest.raises(UserError) as error:
        changed_options(now, before, ["a", "b"])
    assert refusal in str(error.value)


def test_what_a_resumed_run_says_and_refuses(here, capsys):
    last = A.with_suffix(".last.pt")
    pretrain(max_steps=3, resume=True)  # starts, since nothing is saved
    assert "resuming" not in capsys.readouterr().out
    state = contents(last)
    torch.save({key: value for key, value in state.items() if key != "order"}, last)  # as of version 0.2
    pretrain(max_steps=4, resume=True)
    out = capsys.readouterr().out
    assert "resuming at step 3 with other options than before: --max-steps 4 (was 3), another order of the data" in out
    whole, middle = last.read_bytes(), last.stat().st_size // 2
    for damaged in (whole[:middle], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]):
        last.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            pretrain(max_steps=6, resume=True)
    torch.save({**state, "optimizer": []}, last)
    with pytest.raises(UserError, match="does not fit this run, or is damaged"):
        pretrain(max_steps=6, resume=True)
    torch.save({**state, "kind": "sft"}, last)
    with pytest.raises(UserError, match="is of the kind 'sft'"):
        pretrain(max_steps=6, resume=True)


def test_a_resumed_run_keeps_the_data_that_its_text_was_prepared_as(here, capsys):
    Path("book.txt").write_text("Once upon a time there was a test. " * 300)
    run = {"data": "book.txt", "block_size": 32, "vocab_size": 270, "eval_tokens": 64, "out": A}
    pretrain(**run, max_steps=2)
    before = {path.name: path.read_bytes() for path in Path("data/book").iterdir()}
    Path("book.txt").write_text("Something else altogether. " * 300)
    pretrain(**run, max_steps=3, resume=True)
    out = capsys.readouterr().out
    assert "reading data/book, which was prepared from book.txt; changes of book.txt since then are ignored" in out
    assert {path.name: path.read_bytes() for path in Path("data/book").iterdir()} == before
    with pytest.raises(UserError, match="data was prepared with the tokenizer"):
        pretrain(**{**run, "data": "data"}, max_steps=3, resume=True)
    pretrain(**run, max_steps=2, overwrite=True)  # a new run prepares the new text
    assert {path.name: path.read_bytes() for path in Path("data/book").iterdir()} != before


@pytest.mark.parametrize("preset", ["gpt2", "demo"])
def test_more_text_is_prepared_with_the_tokenizer_of_the_model_to_start_from(here, preset):
    Path("more.txt").write_text("Once upon a time there was another test. " * 300)
    start = {"init_from": "checkpoints/pretrained.pt", "data": "more.txt", "out": Path("more.pt")}
    train.main(dataclasses.replace(train.PRESETS[preset], **start, max_steps=1, batch_size=2, device="cpu"))
    tokenizer = tokenizer_of_data(Path("data/more"), read_token_meta(Path("data/more")))
    assert tokenizer.name == load_tokenizer("data/tokenizer.json").name and Path("more.pt").exists()
