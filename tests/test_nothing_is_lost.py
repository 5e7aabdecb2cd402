"""Nothing of a user's is replaced unasked, no resumed run differs silently, and no broken state is saved."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TOY_SHAPE, run_script, succeed
from matplotlib.figure import Figure
from training.checkpointing import Checkpointer, changed_options, claim_output
from training.distributed import Processes
from training.run_report import MARK

import train
from model import GPT, GPTConfig
from system.background import Background
from system.cli import parse, plain
from system.errors import UserError
from system.files import atomic_write, naming
from system.locks import releases_locks
from text.token_files import read_token_meta
from text.tokenizer import load_tokenizer, tokenizer_of_data
from training.config import TrainerConfig
from training.loader import Epochs, Windows
from training.plots import save_figure
from training.state import TrainingState
from training.trainer import Trainer
from weights.loading import load_checkpoint

START = b'{"step": 0, "val_loss": 6.1, "seconds": 0.1}\n{"step": 10, "loss": 6.0, "seconds": 0.2}\n'
LATER = START + b'{"step": 20, "val_loss": 5.9, "seconds": 0.3}\n'
PLOT, REPORT, EXISTS = "plots/a_loss.png", "checkpoints/a.md", "exists: add "
SNAPSHOT = "checkpoints/snapshots/a_step_5.pt"
CLAIMS = [  # files that exist, options, a part of the refusal; None: the run may begin
    ({}, {}, None),
    ({PLOT: b"notes"}, {}, f"the run would draw its plot into {PLOT}, which is no plot"),
    ({PLOT: b"notes"}, {"overwrite": True}, f"the run would draw its plot into {PLOT}"),
    ({PLOT: b"\x89PNG\r\n\x1a\n of a camera"}, {"overwrite": True}, f"the run would draw its plot into {PLOT}"),
    ({PLOT: "plot"}, {}, f"{PLOT} {EXISTS}"),
    ({PLOT: "plot"}, {"overwrite": True}, None),
    ({SNAPSHOT: b"x"}, {"snapshot_every": 5}, f"{SNAPSHOT} {EXISTS}"),
    ({SNAPSHOT: b"x"}, {"snapshot_every": 5, "overwrite": True}, None),
    ({SNAPSHOT: b"x"}, {}, None),  # no snapshot will be written
    ({"checkpoints/a.jsonl": b""}, {}, None),
    ({"checkpoints/a.jsonl": START}, {}, None),
    ({"checkpoints/a.jsonl": START + b'{"ste'}, {}, None),
    ({"checkpoints/a.jsonl": START, "checkpoints/a.pt": 0}, {}, None),
    ({"checkpoints/a.pt": 0}, {}, None),
    ({"checkpoints/a.pt": 7}, {}, f"checkpoints/a.pt {EXISTS}"),
    ({"checkpoints/a.jsonl": START, "checkpoints/a.pt": 7}, {}, f"checkpoints/a.pt {EXISTS}"),
    ({"checkpoints/a.jsonl": LATER, "checkpoints/a.pt": 0}, {}, f"checkpoints/a.pt {EXISTS}"),
    ({"checkpoints/a.jsonl": LATER}, {}, f"checkpoints/a.jsonl {EXISTS}"),
    ({"checkpoints/a.jsonl": b'{"text": "mine"}\n'}, {}, f"checkpoints/a.jsonl {EXISTS}"),
    ({"checkpoints/a.jsonl": b'{"text": "mine"}'}, {}, f"checkpoints/a.jsonl {EXISTS}"),
    ({"checkpoints/a.jsonl": b"notes"}, {}, f"checkpoints/a.jsonl {EXISTS}"),
    ({"checkpoints/a.pt": b"damaged"}, {}, f"checkpoints/a.pt {EXISTS}"),
    ({REPORT: b"my notes"}, {}, f"{REPORT}, which is no report: move that file"),
    ({REPORT: b"my notes"}, {"overwrite": True}, f"{REPORT}, which is no report"),
    ({REPORT: b"my notes", "checkpoints/a.last.pt": b"x"}, {"resume": True}, f"{REPORT}, which is no report"),
    ({REPORT: "report"}, {}, f"{REPORT} {EXISTS}"),
    ({REPORT: "report"}, {"overwrite": True}, None),
    ({"checkpoints/a.last.pt": b"x", "checkpoints/a.pt": 0}, {}, "exists: add --resume to continue that run"),
]


@pytest.mark.parametrize("i", range(len(CLAIMS)))
def test_a_run_replaces_nothing_but_what_a_run_left_that_never_saved(tmp_path, monkeypatch, i):
    files, options, refusal = CLAIMS[i]
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if content == "plot":
            save_figure(Figure(figsize=(1, 1)), Path(name))
        elif content == "report":
            Path(name).write_text(MARK, encoding="utf-8")
        elif isinstance(content, int):
            torch.save({"step": content, "train_config": {}}, name)
        else:
            Path(name).write_bytes(content)
    claim = releases_locks(lambda config: claim_output(config, Processes()))
    config = TrainerConfig(out=Path("checkpoints/a.pt"), **options)
    if refusal is None:
        claim(config)
        return
    with pytest.raises(UserError) as error:
        claim(config)
    assert refusal in str(error.value)


def test_no_run_writes_to_a_snapshot_that_it_reads(tmp_path):
    snapshot = tmp_path / "snapshots/a_step_5.pt"
    snapshot.parent.mkdir()
    snapshot.touch()
    config = TrainerConfig(out=tmp_path / "a.pt", snapshot_every=5, overwrite=True)
    with pytest.raises(UserError, match="which it reads"):
        claim_output(config, Processes(), inputs=[snapshot])


def test_an_input_that_is_a_link_to_itself_costs_no_traceback(tmp_path):
    link = tmp_path / "loop.jsonl"
    link.symlink_to(link)
    claim = releases_locks(lambda config: claim_output(config, Processes(), inputs=[link]))
    assert claim(TrainerConfig(out=tmp_path / "a.pt")) is None


FLAGS = [
    ("--out a.last.pt", "--out a.last.pt: files for --resume end in .last.pt"),
    ("--learning-rate inf", "--learning-rate must be a finite number"),
    ("--weight-decay inf", "--weight-decay must be a finite number"),
    ("--min-lr=-inf", "--min-lr must be a finite number"),
    ("--grad-clip nan", "--grad-clip must be a finite number"),
    ("--dropout nan", "--dropout must be a finite number"),
    ("--target-loss 1e999", "--target-loss must be a finite number"),
]


@pytest.mark.parametrize(("flags", "message"), FLAGS)
def test_flags_that_can_only_break_a_run_are_refused(flags, message):
    with pytest.raises(UserError) as error:
        parse(train.Config, flags.split(), train.PRESETS)
    assert (str(error.value), error.value.status) == (message, 2)


RESUMED = [  # what differs, a part of the refusal; or None and what the run says
    ({}, None, []),
    ({"seed": 2}, None, ["--seed 2 (was 1337)"]),
    ({"learning_rate": 0.1, "max_steps": 9}, None, ["--max-steps 9 (was 80000)", "--learning-rate 0.1 (was 0.0006)"]),
    ({"out": Path("b.pt"), "preset": "demo", "data": Path("moved"), "resume": True}, None, []),
    ({"n_layer": 3}, "a resumed run cannot change --n-layer 3 (was 12): resume with the flags of that run", []),
    ({"optimizer": "muon", "seed": 2}, "cannot change --optimizer muon (was adamw)", []),
    ({"block_size": 5, "n_embd": 24}, "cannot change --block-size 5 (was 1024), --n-embd 24 (was 768)", []),
]


@pytest.mark.parametrize(("change", "refusal", "said"), RESUMED)
def test_a_resumed_run_says_which_options_differ(change, refusal, said):
    before = {"train_config": {**plain(train.Config()), "flag_of_another_version": 1}, "data": ["a", "b"]}
    now = dataclasses.replace(train.Config(), **change)
    if refusal is None:
        assert changed_options(now, before, ["a", "b"]) == said
        assert changed_options(now, {"train_config": {}}, ["a", "b"]) == []  # of an earlier version
        with pytest.raises(UserError, match=r"the data is not what \S+.last.pt was trained on"):
            changed_options(now, before, ["a", "c"])
        return
    with pytest.raises(UserError) as error:
        changed_options(now, before, ["a", "b"])
    assert refusal in str(error.value)


def test_a_fingerprint_tells_data_apart_whatever_the_batches(tmp_path):
    class Sequences(Epochs):
        def __init__(self, rows: list[list[int]], batch_size: int = 1):
            self.rows, self.lengths, self.batch_size = rows, np.array(list(map(len, rows))), batch_size

        def row(self, i):
            return Windows._row(np.array(self.rows[i]))

    def windows(tokens: np.ndarray, block_size: int = 8, batch_size: int = 1) -> Windows:
        path = tmp_path / "tokens.bin"
        path.write_bytes(tokens.astype("<u2").tobytes())
        return Windows([path], block_size, batch_size, seed=0)

    tokens = np.arange(50_000) % 999
    same = windows(tokens).fingerprint()
    assert windows(tokens, 16, 3).fingerprint() == same
    assert windows(tokens[:-1]).fingerprint() != same and windows(np.roll(tokens, 1)).fingerprint() != same
    same = Sequences([[1, 2, 3], [4, 5]]).fingerprint()
    assert Sequences([[1, 2, 3], [4, 5]], batch_size=2).fingerprint() == same
    assert Sequences([[1, 2, 3], [4, 6]]).fingerprint() != same != Sequences([[4, 5], [1, 2, 3]]).fingerprint()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_resumed_run_keeps_the_data_that_its_text_was_prepared_as(toy):
    text, out = toy / "book.txt", ["--out", "checkpoints/book.pt"]
    text.write_text("Once upon a time there was a test. " * 300)
    run = ["--data", "book.txt", *TOY_SHAPE, "--eval-tokens", "64", *out]
    succeed(toy, "train.py", *run, "--vocab-size", "270", "--max-steps", "2")
    before = contents(toy / "data/book")
    text.write_text("Something else altogether. " * 300)
    stdout = succeed(toy, "train.py", *run, "--resume", "--max-steps", "3")  # and without --vocab-size
    assert "reading data/book, which was prepared from book.txt; changes of book.txt since then are ignored" in stdout
    assert "resuming at step 2 with other options than before: --max-steps 3 (was 2), --vocab-size" in stdout
    result = run_script(toy, "train.py", "--data", "data/toy", *run[2:], "--resume", "--max-steps", "3")
    assert result.returncode == 1 and "data/toy was prepared with the tokenizer" in result.stderr.splitlines()[-1]
    assert contents(toy / "data/book") == before


def test_text_for_a_model_to_start_from_is_prepared_with_its_tokenizer(toy, monkeypatch):
    monkeypatch.chdir(toy)
    (toy / "more.txt").write_text("Once upon a time. " * 300)
    tokenizer = load_tokenizer("data/toy/tokenizer.json")
    config = train.Config(data=Path("more.txt"), vocab_size=300)
    train.prepare(config, tokenizer, Path("data/more"), False)
    assert tokenizer_of_data(Path("data/more"), read_token_meta(Path("data/more"))).name == tokenizer.name


DIVERGING = [  # learning rate, weight decay
    (1e38, 0.1),
    (1e30, 0.1),
    (1.0, 1e9),
    (1.0, 1e5),
    (1e-3, 1e30),
    (1e300, 0.1),
]


@pytest.mark.parametrize(("learning_rate", "weight_decay"), DIVERGING)
@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("eval_every", [1, 1000])
def test_weights_that_have_diverged_are_never_saved(toy, tmp_path, learning_rate, weight_decay, keep, eval_every):
    config = TrainerConfig(
        out=tmp_path / "a.pt", device="cpu", batch_size=4, learning_rate=learning_rate, min_lr=0.0, grad_clip=0.0,
        weight_decay=weight_decay, warmup_steps=0, save_every=1, snapshot_every=1, eval_every=eval_every, keep=keep,
        max_steps=20, eval_tokens=200,
    )  # fmt: skip
    shape = GPTConfig(block_size=32, vocab_size=448, n_tokens=403, n_layer=1, n_head=2, n_embd=32)
    data = Windows([toy / "data/toy/train.bin"], 32, 4, 0)
    tokenizer = load_tokenizer(toy / "data/toy/tokenizer.json").spec
    trainer = Trainer(TrainingState.create(GPT(shape), config, Processes()), data, data)
    checkpointer = Checkpointer({"kind": "base", "tokenizer": tokenizer, "template": None}, Background())
    with pytest.raises(UserError, match="the weights have a validation loss of|the loss is not finite"):
        trainer.run([checkpointer])
    saved = [load_checkpoint(path) for path in tmp_path.rglob("*.pt")]
    assert {state["step"] for state in saved} == {0}  # the first step breaks them
    assert all(tensor.isfinite().all() for state in saved for tensor in state["model"].values())


def test_a_full_disk_names_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(OSError) as error, naming(path), open("/dev/full", "w") as file:
        file.write("x")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(path))
    with pytest.raises(OSError) as error, atomic_write(Path("/proc/a.json")):
        pass
    assert error.value.filename == "/proc/a.json"
