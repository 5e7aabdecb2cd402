"""What takes minutes: the demo as its user sees it, and the compiled model."""

import re

import pytest
import torch
from conftest import ENVIRONMENT, TOY_SHAPE, run_script, succeed

from demo import PROMPTS

pytestmark = pytest.mark.slow


def test_the_demo_keeps_its_promises(tmp_path, monkeypatch):
    monkeypatch.setitem(
        ENVIRONMENT, "OMP_NUM_THREADS", str(torch.get_num_threads() if torch.get_num_threads() > 1 else 2)
    )
    result = run_script(tmp_path, "demo.py", timeout=1800)
    assert result.returncode == 0, result.stderr[-3000:]
    bits = [float(match) for match in re.findall(r"([\d.]+) bits per byte", result.stdout)]
    assert min(bits) <= 1.85
    right, asked = map(int, re.search(r"(\d+) of (\d+) questions about Python's built-ins", result.stdout).groups())
    assert asked >= 100 and right >= 0.9 * asked
    assert "The capital of France is Paris." in result.stdout
    assert all(f"> {prompt}" in result.stdout for prompt in PROMPTS)


def test_the_compiled_model_trains_like_the_eager_one(toy):
    losses = []
    for how in ("off", "on"):
        stdout = succeed(
            toy, "train.py", "--data", "data/toy", "--out", f"checkpoints/compile_{how}.pt", *TOY_SHAPE,
            "--max-steps", "10", "--compile", how, "--plot", "plots/compile.png",
        )  # fmt: skip
        losses.append(float(re.search(r"step 10: validation loss ([\d.]+)", stdout).group(1)))
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
