"""Nothing of a user's is lost: what a run may replace, what a kill or a full disk leaves, and how a run goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import resource
import shlex
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENVIRONMENT, TOY_SHAPE, command, contents, fine_tune, log, pretrain, succeed, wait_for_log

import train
import train_classifier
from model import GPT, GPTConfig
from system.cli import plain, stop_signals
from system.errors import UserError
from system.files import is_locked, locked
from training.config import TrainerConfig
from training.parallel import Processes
from training.saving import Checkpointer, changed_options, claim_output
from training.state import TrainingState
from weights.loading import load_checkpoint

A = Path("checkpoints/a.pt")
equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0)  # bit by bit


def classify(**options: Any) -> None:
    words = ["cat", "dog", "red", "blue"]
    rows = [f"the {words[i % 4]} of {i},{('animal', 'colour')[i % 4 // 2]}" for i in range(60)]
    Path("t.csv").write_text("\n".join(["text,label", *rows]))
    steps = {"max_steps": 6, "batch_size": 8, "warmup_steps": 0, "log_every": 1, "eval_every": 3, "save_every": 3}
    train_classifier.main(train_classifier.Config(**{**steps, "input": Path("t.csv"), "device": "cpu", **options}))


RESUMED = {  # the function that trains, its options
    "adamw": (pretrain, {"dropout": 0.1}),
    "muon": (pretrain, {"optimizer": "muon", "rotary": True, "tie_weights": False, "learning_rate": 1e-2}),
    "bfloat16": (pretrain, {"dtype": "bfloat16"}),
    "sft": (fine_tune, {"dropout": 0.1}),
    "lora": (fine_tune, {"lora_rank": 4, "optimizer": "muon"}),
    "classifier": (classify, {"class_weights": True}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_bit_exact(here, name):
    run, options = RESUMED[name]
    run(**options, out=Path("whole.pt"), keep="last")
    run(**options, out=Path("b.pt"), keep="last", target_loss=1e6, log_every=2)  # stops early
    assert contents("b.last.pt")["step"] == 3
    options.pop("dtype", None)  # `auto` does not measure again: the rest of a run in bfloat16 is in bfloat16
    run(**options, out=Path("b.pt"), keep="last", resume=True)
    whole, resumed = contents("whole.last.pt"), contents("b.last.pt")
    equal([resumed["model"], resumed["optimizer"]], [whole["model"], whole["optimizer"]])
    equal(contents("b.pt")["model"], contents("whole.pt")["model"])
    assert all(resumed[key] == whole[key] for key in ("step", "tokens", "prompts", "data"))
    assert resumed["train_config"]["dtype"] == whole["train_config"]["dtype"]


RUN = [*TOY_SHAPE, "--max-steps", "60", "--dropout", "0.1", "--eval-every", "20", "--save-every", "15"]


@pytest.fixture(scope="module")
def uninterrupted(toy) -> Path:
    """The run that the interrupted ones have to equal."""
    succeed(toy, "train.py", "--data", "data/toy", *RUN, "--out", "checkpoints/whole.pt")
    return toy / "checkpoints/whole.pt"


@contextlib.contextmanager
def started(*arguments: str, step: int = 2):
    """Starts a script with `--out checkpoints/a.pt` in a process of its own; begins when it has logged a step."""
    process = subprocess.Popen(
        command(*arguments, "--out", str(A)), env=ENVIRONMENT, encoding="utf-8", stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        wait_for_log(A.with_suffix(".jsonl"), step, process)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_run_ended_by_a_signal_goes_on_as_if_nothing_had_happened(here, uninterrupted, how):
    with started("train.py", "--data", "data", *RUN, step=20) as process:
        process.send_signal(how)
        stdout, stderr = process.communicate(timeout=60)
    assert not is_locked(A)
    if how == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        arguments = ["python", "train.py", "--data", "data", *RUN, "--out", str(A), "--resume"]
    else:
        assert process.returncode == 0 and "interrupted at step" in stdout, stderr[-2000:]
        arguments = shlex.split(stdout.strip().splitlines()[-1])  # the command that it tells its user to type
        assert arguments[0] == "python" and arguments[-1] == "--resume"
    assert 15 <= contents(A.with_suffix(".last.pt"))["step"] < 60
    succeed(here, "train.py", *arguments[2:])
    assert log(A.with_suffix(".jsonl")) == log(uninterrupted.with_suffix(".jsonl"))
    resumed, whole = (contents(path.with_suffix(".last.pt")) for path in (A, uninterrupted))
    equal([resumed["model"], resumed["optimizer"]], [whole["model"], whole["optimizer"]])
    assert all(resumed[key] == whole[key] for key in ("step", "best_val_loss", "history"))
    equal(contents(A)["model"], contents(uninterrupted)["model"])
    assert not list(Path("checkpoints").glob(".*"))  # neither temporary files nor locks


def test_ctrl_c_ends_a_classifier_without_its_test(here):
    classify(max_steps=1, out=Path("checkpoints/b.pt"))
    run = ["--input", "t.csv", "--max-steps", "100000", "--batch-size", "8", "--eval-every", "5", "--log-every", "1"]
    with started("train_classifier.py", *run, step=12) as process:
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume" in stdout.splitlines()[-1], stderr[-2000:]
    assert "test on" not in stdout and not Path("plots/a_confusion.png").exists()
    assert "test" not in contents(A) and "test" in contents("checkpoints/b.pt")


def test_a_second_ctrl_c_acts_at_once():
    with pytest.raises(KeyboardInterrupt), stop_signals() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_which_files_a_run_writes_and_when(here):
    pretrain(max_steps=7, eval_every=3, save_every=2, snapshot_every=5, keep="best")
    assert sorted(path.name for path in Path("checkpoints").rglob("*.*") if path.stem.startswith("a")) == [
        "a.jsonl", "a.last.pt", "a.md", "a.pt", "a_step_5.pt",
    ]  # fmt: skip
    assert contents(A.with_suffix(".last.pt"))["step"] == 7
    assert contents("checkpoints/snapshots/a_step_5.pt")["step"] == 5
    best = min((entry for entry in contents(A)["history"] if entry["step"]), key=lambda entry: entry["val_loss"])
    assert contents(A)["best_val_loss"] == best["val_loss"] and contents(A)["step"] == best["step"]


def new_state(folder: Path, out: Path) -> tuple[TrainingState, Checkpointer]:
    shape = GPTConfig(block_size=32, vocab_size=448, n_tokens=403, n_layer=1, n_head=2, n_embd=32)
    tokenizer = load_checkpoint(folder / "checkpoints/toy.pt")["tokenizer"]
    state = TrainingState.create(GPT(shape), TrainerConfig(out=out, device="cpu"), Processes())
    return state, Checkpointer({"kind": "base", "tokenizer": tokenizer, "template": None})


@pytest.mark.parametrize(("keep", "kept"), [("best", 1), ("last", 2)])
def test_the_best_or_the_last_weights_are_kept_and_never_random_ones(toy, tmp_path, keep, kept):
    state, checkpointer = new_state(toy, tmp_path / "a.pt")
    state.config = dataclasses.replace(state.config, keep=keep)
    for state.step, is_best in ((0, False), (1, True), (2, False)):
        checkpointer.on_evaluation(state, {"step": state.step, "val_loss": 1.0}, is_best)
        checkpointer.wait()
        assert state.config.out.exists() == (state.step > 0)
    checkpointer.close()
    assert contents(state.config.out)["step"] == kept


def test_training_goes_on_before_a_save_is_written_and_does_not_change_it(toy, tmp_path):
    state, checkpointer = new_state(toy, tmp_path / "a.pt")
    before, disk = state.model.wte.weight.detach().clone(), threading.Event()
    checkpointer.writer.submit(disk.wait)  # the disk is slow
    checkpointer.on_save(state)
    torch.nn.init.zeros_(state.model.wte.weight)
    state.step = 1
    next_save = threading.Thread(target=checkpointer.write, args=(state, tmp_path / "b.pt"))
    next_save.start()
    next_save.join(timeout=0.3)
    assert next_save.is_alive() and not list(tmp_path.iterdir())  # memory holds the copies of one step only
    disk.set()
    next_save.join(timeout=30)
    checkpointer.close()
    equal(load_checkpoint(state.config.last_path)["model"]["wte.weight"], before)
    assert load_checkpoint(tmp_path / "b.pt")["step"] == 1


def test_a_save_that_fails_ends_the_run_and_no_later_file_is_written(here):
    Path("checkpoints/snapshots/a_step_5.pt").mkdir(parents=True)
    for max_steps in (1_000, 5):  # at the end too
        with pytest.raises((OSError, UserError), match="checkpoints/snapshots/a_step_5.pt"):
            pretrain(max_steps=max_steps, snapshot_every=5, save_every=5, eval_every=1_000, overwrite=True)
        assert max(entry["step"] for entry in log(A.with_suffix(".jsonl"))) <= 10
        assert not A.with_suffix(".last.pt").exists() and not list(Path("checkpoints").rglob(".*tmp"))


def test_a_full_disk_costs_one_line_and_keeps_the_former_checkpoint(here):
    pretrain(max_steps=2, block_size=64)
    before = {path.name: path.read_bytes() for path in Path("checkpoints").glob("a*.pt")}
    result = subprocess.run(
        command("train.py", "--data", "data", *TOY_SHAPE, "--max-steps", "40", "--out", A, "--resume"),
        env=ENVIRONMENT, capture_output=True, encoding="utf-8",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )  # fmt: skip
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "checkpoints/a" in result.stderr.splitlines()[-1] and "File too large" in result.stderr.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in Path("checkpoints").glob("a*.pt")} == before
    assert not list(Path("checkpoints").glob(".*tmp"))


def test_a_plot_that_cannot_be_drawn_is_a_warning(here, capsys):
    Path("plots/a_loss.png").mkdir(parents=True)
    assert pretrain(max_steps=2, overwrite=True)["step"] == 2
    assert "warning: no plot or report of checkpoints/a.pt: " in capsys.readouterr().out


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


CHANGES = [  # what differs, what the run says, or how it is refused
    ({}, []),
    ({"seed": 2, "learning_rate": 0.1}, ["--learning-rate 0.1 (was 0.0006)", "--seed 2 (was 1337)"]),
    ({"out": Path("b.pt"), "preset": "demo", "data": "moved", "resume": True}, []),
    ({"n_layer": 3}, r"a resumed run cannot change --n-layer 3 \(was 12\): resume with the flags of that run"),
    ({"optimizer": "muon", "seed": 2}, r"cannot change --optimizer muon \(was adamw\)"),
]


@pytest.mark.parametrize(("change", "outcome"), CHANGES)
def test_a_resumed_run_says_which_options_differ(change, outcome):
    before = {"train_config": {**plain(train.Config()), "flag_of_another_version": 1}, "data": ["a", "b"]}
    now = dataclasses.replace(train.Config(), **change)
    with pytest.raises(UserError, match=outcome) if isinstance(outcome, str) else contextlib.nullcontext():
        assert sorted(changed_options(now, before, ["a", "b"])) == outcome
    with pytest.raises(UserError, match=r"the data is not what \S+.last.pt was trained on|cannot change"):
        changed_options(now, before, ["a", "c"])


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
    torch.save({**state, "optimizer": []}, last)
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for damaged in (whole[:middle], flipped, last.read_bytes()):
        last.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            pretrain(max_steps=6, resume=True)


def test_a_resumed_run_keeps_the_data_that_its_text_was_prepared_as(here, capsys):
    Path("book.txt").write_text("Once upon a time there was a test. " * 300)
    run = {"data": "book.txt", "block_size": 32, "vocab_size": 270, "eval_tokens": 64, "out": A}
    pretrain(**run, max_steps=2)
    before = {path.name: path.read_bytes() for path in Path("data/book").iterdir()}
    Path("book.txt").write_text("Something else altogether. " * 300)
    pretrain(**run, max_steps=3, resume=True)
    out = capsys.readouterr().out
    assert "reading data/book, which was prepared from book.txt; later changes of book.txt are ignored" in out
    assert {path.name: path.read_bytes() for path in Path("data/book").iterdir()} == before
    with pytest.raises(UserError, match="data was prepared with the tokenizer"):
        pretrain(**{**run, "data": "data"}, max_steps=3, resume=True)
    pretrain(**run, max_steps=2, overwrite=True)  # a new run prepares the new text
    assert {path.name: path.read_bytes() for path in Path("data/book").iterdir()} != before
