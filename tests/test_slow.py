"""What takes minutes: the demo as its user sees it, the compiled model, many kills."""

from __future__ import annotations

import random
import re
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, TOY_SHAPE, command, run_fresh, wait_for_log
from test_training import after_equal_gradients

from demo import PROMPTS
from training.optim import Muon
from training.reporting import read_log
from weights import checkpoint
from weights.loading import load_checkpoint

pytestmark = pytest.mark.slow


def test_the_demo_keeps_its_promises(tmp_path):
    result = run_fresh(tmp_path, "demo.py", timeout=1800, OMP_NUM_THREADS=str(max(2, torch.get_num_threads())))
    assert result.returncode == 0, result.stderr[-3000:]
    assert min(float(bits) for bits in re.findall(r"([\d.]+) bits per byte", result.stdout)) <= 1.85
    for words, share in (("that it was taught", 0.95), ("in words that it has never seen", 0.6)):
        right, asked = map(int, re.search(rf"{words}: (\d+) of (\d+) answered", result.stdout).groups())
        assert 140 <= asked <= 500 and right >= share * asked
    assert all(f"> {prompt}" in result.stdout for prompt in PROMPTS)


@pytest.mark.parametrize("script", ["train.py", "train.py --preset modern", "train_sft.py"])
def test_the_compiled_model_trains_like_the_eager_one_and_compiles_once(toy, script):
    start = [*TOY_SHAPE, "--dropout", "0.1"] if script.startswith("train.py") else ["--model", "checkpoints/toy.pt"]
    losses = []
    for how in ("off", "on"):
        result = run_fresh(
            toy, script, "--data", "data/toy", "--out", f"checkpoints/compile_{how}.pt", *start, "--max-steps", "10",
            "--eval-every", "5", "--compile", how, "--overwrite", "--device", "cpu",
            "--batch-size", "8", TORCH_LOGS="recompiles,graph_breaks",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        losses.append(float(re.search(r"step 10: validation loss ([\d.]+)", result.stdout).group(1)))
        assert "Recompiling" not in result.stderr and "Graph break" not in result.stderr, result.stderr[-5000:]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3 if script == "train_sft.py" else 1e-2)  # other dropout draws


def test_compiled_muon_takes_the_steps_of_the_eager_one():
    torch.compiler.reset()
    eager, compiled = after_equal_gradients(lambda ps: Muon(ps, lr=0.02), lambda ps: Muon(ps, lr=0.02, compiled=True))
    for p, q in zip(eager, compiled, strict=True):
        torch.testing.assert_close(q, p, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("part", range(2))
def test_kills_leave_a_checkpoint_that_resumes(toy, part):
    """Ten kills in each part at random moments, at least 3 of them while a checkpoint is being written."""
    last, log = toy / f"checkpoints/kills{part}.last.pt", toy / f"checkpoints/kills{part}.jsonl"
    arguments = [
        "--data", "data/toy", "--out", f"checkpoints/kills{part}.pt", "--n-layer", "2", "--n-head", "4",
        "--n-embd", "256", "--block-size", "32", "--batch-size", "2", "--device", "cpu", "--max-steps", "100000",
        "--warmup-steps", "0", "--save-every", "1", "--eval-every", "5", "--eval-tokens", "64", "--log-every", "1",
        "--resume",
    ]  # fmt: skip

    def half_written() -> list[Path]:
        return list((toy / "checkpoints").glob(f".kills{part}*.tmp"))

    rng, while_writing, step = random.Random(part), 0, 0
    for i in range(10):
        process = subprocess.Popen(
            command("train.py", *arguments), cwd=toy, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, encoding="utf-8",
        )  # fmt: skip
        wait_for_log(log, step + rng.randrange(1, 8), process)
        while i % 2 and not half_written():
            assert process.poll() is None, process.stderr.read()[-2000:]
        process.kill()
        process.wait()
        while_writing += bool(half_written())
        state = load_checkpoint(last, verify=True)
        checkpoint.build(state)
        logged = [entry["step"] for entry in read_log(log) if "loss" in entry]
        assert logged == list(range(1, len(logged) + 1)) and step <= state["step"] <= len(logged)
        step = state["step"]
    assert while_writing >= 3 and step > 5
