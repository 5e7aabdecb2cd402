"""What takes minutes: the demo as its user sees it, the compiled model, large corpora, many kills."""

import json
import os
import re
import subprocess
import time

import pytest
import torch
from conftest import ENVIRONMENT, REPOSITORY, TOY_SHAPE, command, run_script, succeed

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


@pytest.mark.parametrize("kind", ["a gigabyte", "a line", "a row"])
def test_memory_stays_under_a_gigabyte_however_large_the_input(tmp_path, kind):
    text = " ".join(path.read_text() for path in sorted(REPOSITORY.glob("*.py"))).replace("\\", "/")
    line = text.replace("\n", " ").replace('"', "'")
    name = "a.jsonl" if kind == "a row" else "a.txt"
    with open(tmp_path / name, "w") as file:
        file.write('{"text": "small"}\n{"text": "' if kind == "a row" else "")
        for _ in range((1_000_000_000 if kind == "a gigabyte" else 200_000_000) // len(text)):
            file.write(text if kind == "a gigabyte" else line)
        file.write('"}\n' if kind == "a row" else "")
    process = subprocess.Popen(
        command("prepare_data.py", "--input", name, "--out", "data"), cwd=tmp_path, env=ENVIRONMENT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    print(f"{kind}: {usage.ru_maxrss / 1024:.0f} MiB at most")
    assert usage.ru_maxrss * 1024 < 1_000_000_000
    splits = json.loads((tmp_path / "data/meta.json").read_text())["splits"]
    assert sum(split["bytes"] for split in splits.values()) > 0.99 * (tmp_path / name).stat().st_size
    used = sum(path.stat().st_size for path in (tmp_path / "data").iterdir())
    assert used < 2.01 * sum(split["tokens"] for split in splits.values())  # the output, and nothing more


def test_kills_at_any_moment_leave_the_old_files(tmp_path):
    (tmp_path / "a.txt").write_text("It was the best of times. " * 2_000_000)
    arguments = command("prepare_data.py", "--input", "a.txt", "--out", "data", "--shard-tokens", "500000")
    subprocess.run(arguments, cwd=tmp_path, env=ENVIRONMENT, check=True, capture_output=True)
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    for i in range(20):
        process = subprocess.Popen(
            arguments, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(0.15 * i)
        process.kill()
        process.wait()
        assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir() if path.is_file()} == before
