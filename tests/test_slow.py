"""What takes minutes: the demo as its user sees it, the compiled model, large corpora, many kills."""

import copy
import json
import os
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, REPOSITORY, TOY_SHAPE, command, run_fresh
from test_training import after_equal_gradients

from demo import PROMPTS, Config, affordable
from model import GPT, GPTConfig
from system.device import autocast
from system.untrusted import read_json
from training.optim import Muon
from training.run_log import read_log
from weights import checkpoint
from weights.loading import load_checkpoint

pytestmark = pytest.mark.slow


def test_the_demo_keeps_its_promises(tmp_path):
    result = run_fresh(tmp_path, "demo.py", timeout=1800, OMP_NUM_THREADS=str(max(2, torch.get_num_threads())))
    assert result.returncode == 0, result.stderr[-3000:]
    bits = [float(match) for match in re.findall(r"([\d.]+) bits per byte", result.stdout)]
    assert min(bits) <= 1.85
    for words, share in (("words that it was taught", 0.95), ("words that it has never seen", 0.6)):
        right, asked = map(int, re.search(rf"{words}: (\d+) of (\d+) answered", result.stdout).groups())
        assert 140 <= asked <= 500 and right >= share * asked
    assert all(f"> {prompt}" in result.stdout for prompt in PROMPTS)


def test_the_demo_trains_and_teaches_less_if_time_is_short(toy, tmp_path, monkeypatch, capsys):
    shutil.copytree(toy / "data/toy", tmp_path / "data/demo")
    monkeypatch.chdir(tmp_path)
    assert affordable(Config(minutes=1)) == (150, 73)  # a tenth, at least
    assert "To take 1 minutes, it trains 10% of the steps and teaches 10% of the answers" in capsys.readouterr().out
    assert affordable(Config(minutes=1e6)) == (None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


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
        assert "Recompiling" not in result.stderr, result.stderr[-5000:]
        assert "Graph break" not in result.stderr
    assert losses[0] == pytest.approx(losses[1], abs=1e-3 if script == "train_sft.py" else 1e-2)  # other dropout draws


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_loss_serves_every_number_of_counted_positions_without_recompiling(dtype):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    eager = GPT(GPTConfig(block_size=64, vocab_size=448, n_tokens=448, n_layer=2, n_head=2, n_embd=32)).train()
    compiled = copy.deepcopy(eager)
    compiled.compile_training()
    # Micro-batches as in fine-tuning: rows, their padded length, and the positions that count. On the CPU a chunk has
    # 512 positions.
    for i, (B, T, n) in enumerate([(16, 64, 700), (9, 64, 41), (30, 64, 1920), (2, 64, 1), (5, 64, 0), (17, 64, 513)]):
        tokens, targets = torch.randint(448, (2, B, T))
        counted = torch.randperm(B * T)[:n].sort().values
        losses = []
        for model in (eager, compiled):
            model.zero_grad()
            torch._dynamo.maybe_mark_dynamic(tokens, [0, 1])
            with autocast(torch.device("cpu"), dtype), torch._dynamo.config.patch(error_on_recompile=i > 0):
                loss = model(tokens, targets, counted)
                loss.backward()
            losses.append(loss.item())
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        assert losses[0] == pytest.approx(losses[1], rel=tolerance)
        for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
            assert (ours.grad - theirs.grad).norm() <= tolerance * theirs.grad.norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the network, and the loss


def test_compiled_muon_takes_the_steps_of_the_eager_one():
    torch.compiler.reset()
    eager, compiled = after_equal_gradients(lambda ps: Muon(ps, lr=0.02), lambda ps: Muon(ps, lr=0.02, compiled=True))
    for p, q in zip(eager, compiled, strict=True):
        torch.testing.assert_close(q, p, atol=1e-4, rtol=1e-4)


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
    arguments = command(
        "prepare_data.py", "--input", "a.txt", "--out", "data", "--shard-tokens", "500000", "--overwrite"
    )
    subprocess.run(arguments, cwd=tmp_path, env=ENVIRONMENT, check=True, capture_output=True)

    def data() -> dict[str, bytes]:
        """The files, but for the lock that a killed process leaves behind, which the next one takes over."""
        files = (path for path in (tmp_path / "data").iterdir() if path.is_file() and path.suffix != ".lock")
        return {path.name: path.read_bytes() for path in files}

    before = data()
    (tmp_path / "a.txt").write_text("It was the worst of times. " * 2_000_000)  # other files, should any be replaced
    for i in range(20):
        process = subprocess.Popen(
            arguments, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(0.15 * i)
        process.kill()
        if process.wait() == 0:  # it was faster
            assert i > 3
            return
        assert data() == before


@pytest.mark.parametrize("saves", ["file", "slices"])
@pytest.mark.parametrize("part", range(5))
def test_fifty_kills_leave_a_checkpoint_that_resumes(toy, part, saves):
    """Ten kills in each part at random moments, at least 3 of them while a checkpoint is being written."""
    name, in_slices = f"kills_{saves}{part}", saves == "slices"
    folder = toy / f"checkpoints/{name}.last"

    def half_written() -> list[Path]:
        """The temporary files, and the slices that `slices.json` does not name yet."""
        meta = folder / "slices.json"
        whole = read_json(meta)["slices"]["folder"] if meta.exists() else ""
        files = [path for path in folder.glob("step_*/shard-*") if path.parent.name != whole]
        return [*files, *(toy / "checkpoints").glob(f".{name}*.tmp"), *folder.glob(".slices.json.*.tmp")]

    arguments = [
        "--data", "data/toy", "--out", f"checkpoints/{name}.pt", "--n-layer", "2", "--n-head", "4",
        "--n-embd", "256", "--block-size", "32", "--batch-size", "2", "--device", "cpu", "--max-steps", "100000",
        "--warmup-steps", "0", "--save-every", "1", "--eval-every", "5", "--eval-tokens", "64", "--log-every", "1",
        "--sharded-saves", "on" if in_slices else "off",
    ]  # fmt: skip
    last = folder / "slices.json" if in_slices else toy / f"checkpoints/{name}.last.pt"
    log = toy / f"checkpoints/{name}.jsonl"
    rng, while_writing, step = random.Random(part), 0, 0
    for i in range(10):
        resume = ["--resume"] if last.exists() else ["--overwrite"]  # killed before the first save
        process = subprocess.Popen(
            command("train.py", *arguments, *resume), cwd=toy, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, encoding="utf-8",
        )  # fmt: skip
        deadline, before = time.monotonic() + 60, log.stat().st_mtime if log.exists() else 0
        while not log.exists() or log.stat().st_mtime == before:
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()[-2000:]
            time.sleep(0.01)
        enough = len(read_log(log)) + rng.randrange(8)  # lines, not seconds: machines differ
        while len(read_log(log)) < enough:
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()[-2000:]
        time.sleep(rng.random() * 0.1)
        while i % 2 and not half_written():
            assert process.poll() is None
        process.kill()
        process.wait()
        while_writing += bool(left := half_written())
        for path in () if in_slices else left:  # the next run removes unfinished slices
            path.unlink()
        if last.exists():
            state = load_checkpoint(folder if in_slices else last, verify=True)
            checkpoint.build(state)
            assert state["step"] >= step
            step = state["step"]
            logged = [entry["step"] for entry in read_log(log) if "loss" in entry]
            assert logged == list(range(1, len(logged) + 1)) and len(logged) >= step  # the file is never ahead
    assert while_writing >= 3 and step > 5


def test_training_goes_on_while_a_large_checkpoint_is_written(toy):
    process = subprocess.Popen(
        command(
            "train.py", "--data", "data/toy", "--out", "checkpoints/large.pt", "--n-layer", "4", "--n-head", "4",
            "--n-embd", "640", "--block-size", "16", "--batch-size", "1", "--device", "cpu", "--max-steps", "60",
            "--save-every", "20", "--eval-tokens", "64", "--log-every", "1",
        ),
        cwd=toy, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    steps_while_writing = set()
    while process.poll() is None:
        if list((toy / "checkpoints").glob(".large.last.pt.*.tmp")):
            steps_while_writing.update(entry["step"] for entry in read_log(toy / "checkpoints/large.jsonl")[-1:])
        time.sleep(0.005)
    assert process.returncode == 0, process.stderr.read()[-2000:]
    assert len(steps_while_writing & {*range(21, 40), *range(41, 60)}) >= 2
    assert (toy / "checkpoints/large.last.pt").stat().st_size > 200_000_000


@pytest.mark.parametrize("how", [["--greedy"], ["--seed", "1", "--top-k", "50", "--top-p", "0.9"]], ids=" ".join)
def test_compiled_decoding_writes_the_same_and_compiles_once(toy, how):
    arguments = ["--model", "checkpoints/toy.pt", "--prompt", "What is", "--max-new-tokens", "150", *how]
    arguments += ["--device", "cpu", "--compile"]
    logs = "recompiles,graph_breaks"
    results = [run_fresh(toy, "generate.py", *arguments, mode, timeout=600, TORCH_LOGS=logs) for mode in ("off", "on")]
    assert all(result.returncode == 0 for result in results), results[1].stderr[-2000:]
    assert results[0].stdout == results[1].stdout
    assert "Recompiling" not in results[1].stderr and "Graph break" not in results[1].stderr
