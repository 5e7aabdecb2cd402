"""Saving in the background: training goes on, one save at a time, no failure is lost, Ctrl-C still ends the run."""

import os
import signal
import threading
import time

import pytest
import torch
from conftest import TOY_SHAPE, log, run_script

from model import GPT, GPTConfig
from system.background import Background
from system.files import atomic_write
from training.checkpointing import Checkpointer
from training.config import TrainerConfig
from training.distributed import Processes
from training.loader import Windows
from training.state import TrainingState
from training.trainer import Trainer
from weights.loading import load_checkpoint


@pytest.fixture()
def run(toy, tmp_path) -> tuple[Trainer, Checkpointer]:
    """A trainer, and a checkpointer that has already saved step 0."""
    shape = GPTConfig(block_size=32, vocab_size=448, n_tokens=403, n_layer=1, n_head=2, n_embd=32)
    config = TrainerConfig(out=tmp_path / "a.pt", device="cpu", batch_size=4)
    data = Windows([toy / "data/toy/train.bin"], 32, 4, 0)
    trainer = Trainer(TrainingState.create(GPT(shape), config, Processes()), data, data)
    tokenizer = load_checkpoint(toy / "checkpoints/toy.pt")["tokenizer"]
    checkpointer = Checkpointer({"kind": "base", "tokenizer": tokenizer, "template": None}, Background())
    checkpointer.on_save(trainer.state)
    return trainer, checkpointer


def take_step(trainer: Trainer) -> None:
    batch = trainer.load_batch(trainer.state.step)
    trainer.forward_backward(batch.micro_batches, batch.total_weight)
    trainer.update_weights(0.1)
    trainer.state.step += 1


def test_training_goes_on_before_a_save_is_written_and_does_not_change_it(run):
    trainer, checkpointer = run
    state, out = trainer.state, trainer.config.out
    example = {"input": "a", "expected": "b", "output": "c"}
    state.history.append({"step": 0, "val_loss": 6.0, "examples": [example]})
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    disk = threading.Event()
    checkpointer.background.start(disk.wait)  # the disk is slow
    checkpointer.on_evaluation(state, state.history[0], is_best=True)
    checkpointer.on_save(state)
    take_step(trainer)
    state.history[0].pop("examples")
    assert not out.exists() and not torch.equal(state.model.wte.weight, before["wte.weight"])
    disk.set()
    checkpointer.close()
    for path in (out, trainer.config.last_path):
        saved = load_checkpoint(path)
        assert saved["step"] == 0 and saved["history"] == [{"step": 0, "val_loss": 6.0, "examples": [example]}]
        assert all(torch.equal(tensor, before[name]) for name, tensor in saved["model"].items())
    assert not torch.load(trainer.config.last_path, weights_only=True)["optimizer"][0]["state"]  # of before the step


def test_a_save_waits_for_that_of_an_earlier_step(run):
    trainer, checkpointer = run
    disk = threading.Event()
    checkpointer.background.start(disk.wait)
    take_step(trainer)
    next_save = threading.Thread(target=checkpointer.on_save, args=(trainer.state,))
    next_save.start()
    next_save.join(timeout=0.3)
    assert next_save.is_alive()
    disk.set()
    next_save.join(timeout=30)
    checkpointer.close()
    assert load_checkpoint(trainer.config.last_path)["step"] == 1


def test_a_failed_save_ends_the_run_before_the_next_save(toy):
    (toy / "checkpoints/snapshots/fails_step_5.pt").mkdir(parents=True)
    result = run_script(
        toy, "train.py", "--data", "data/toy", *TOY_SHAPE, "--out", "checkpoints/fails.pt", "--max-steps", "100000",
        "--log-every", "1", "--snapshot-every", "5", "--save-every", "5", "--overwrite",
    )  # fmt: skip
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "cannot write checkpoints/snapshots/fails_step_5.pt: Is a directory" in result.stderr.splitlines()[-1]
    assert max(entry["step"] for entry in log(toy / "checkpoints/fails.jsonl")) in range(5, 11)
    assert not (toy / "checkpoints/fails.last.pt").exists()  # no file is written after one that failed
    assert not list((toy / "checkpoints").rglob(".fails*tmp"))


def test_a_failed_save_at_the_end_is_reported_too(toy):
    (toy / "checkpoints/snapshots/ends_step_5.pt").mkdir(parents=True)
    arguments = ["--data", "data/toy", *TOY_SHAPE, "--out", "checkpoints/ends.pt", "--max-steps", "5"]
    result = run_script(toy, "train.py", *arguments, "--snapshot-every", "5", "--overwrite")
    assert result.returncode == 1 and "Is a directory" in result.stderr.splitlines()[-1]
    assert "done at step" not in result.stdout


def test_ctrl_c_waits_for_the_file_under_way_and_begins_no_other(tmp_path):
    path, background = tmp_path / "a.pt", Background()
    began, others = threading.Event(), []

    def save() -> None:
        with atomic_write(path) as file:
            began.set()
            time.sleep(0.5)
            file.write(b"new")

    def interrupt() -> None:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    background.start(save)
    background.start(lambda: others.append("written"))
    began.wait()
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        background.close()
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path] and not others
