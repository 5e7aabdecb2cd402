"""Several processes that train one model, in real ones: equal to one, split to fit, sharded, resumed, killed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, REPOSITORY, TOY_SHAPE, contents, log, run_in_processes, run_script, wait_for_log

from system.errors import UserError
from system.files import locked
from training.parallel import Processes

STEPS = ["--data", "data/toy", *TOY_SHAPE, "--max-steps", "12", "--log-every", "3", "--eval-every", "100"]
TRAIN = [*STEPS, "--optimizer", "muon", "--learning-rate", "3e-3"]
STOP = ["--target-loss", "100"]  # one step after the next line of the log, since losses are looked at that late


def losses(path: Path) -> dict[int, float]:
    """The losses that a run logged, by step."""
    return {entry["step"]: entry.get("loss", entry.get("val_loss")) for entry in log(path)}


def train(folder: Path, name: str, *arguments: str, n: int = 2) -> str:
    """Pre-trains in `n` processes, which must succeed; returns what they print."""
    script = ["train.py", *TRAIN, "--out", f"checkpoints/{name}.pt", *arguments]
    result = run_script(folder, *script) if n == 1 else run_in_processes(folder, *script, n=n)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def whole(toy) -> dict[int, float]:
    """The losses of a run of one process that nothing interrupts."""
    train(toy, "one", n=1)
    return losses(toy / "checkpoints/one.jsonl")


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        ([], 1e-5),
        (["--grad-accum-steps", "2"], 1e-5),
        (["--fsdp", "--grad-accum-steps", "2", "--grad-checkpointing"], 1e-5),
        pytest.param(["--fsdp", "--dtype", "bfloat16"], 3e-3, marks=pytest.mark.slow),
    ],
)
def test_two_processes_give_the_losses_of_one_and_print_each_line_once(toy, whole, flags, tolerance):
    name = "_".join(["two", *flags])
    out = train(toy, name, *flags)
    assert losses(toy / f"checkpoints/{name}.jsonl") == pytest.approx(whole, rel=tolerance)
    assert out.count("step 0: validation loss") == out.count("done at step 12") == 1
    assert contents(toy / f"checkpoints/{name}.pt")["step"] == 12


def test_a_run_goes_on_with_another_number_of_processes_and_sharded_or_not(toy, whole):
    sharded = ["--fsdp", "--grad-accum-steps", "2"]
    out = [train(toy, "moves", *sharded, *STOP), train(toy, "moves", "--resume", *STOP, n=1)]
    out.append(train(toy, "moves", *sharded, "--resume"))
    assert [re.search(r"at step (\d+);", text).group(1) for text in out] == ["4", "7", "12"]
    found = losses(toy / "checkpoints/moves.jsonl")
    assert {step: found[step] for step in whole} == pytest.approx(whole, rel=1e-5)


def test_each_process_holds_a_shard_of_a_sharded_model(toy):
    result = run_in_processes(toy, "tests/workers.py", "shard")
    assert result.stdout.count("sharded") == 2, result.stderr[-3000:]


def test_a_batch_is_split_until_every_process_expects_it_to_fit(toy):
    result = run_in_processes(toy, "tests/workers.py", "fit")
    assert result.returncode == 0, result.stderr[-3000:]
    found = re.findall(r"^(\d+) MB: (\d+)$", result.stdout, re.MULTILINE)
    tight, roomy = ([int(n) for room, n in found if room == megabytes] for megabytes in ("10", "4000"))
    assert len(tight) == 2 and tight[0] == tight[1] > 1, result.stdout  # the second could do without
    assert roomy == [1, 1]


def test_fine_tuning_in_two_processes_prints_each_line_once(here):
    words = ["cat", "dog", "red", "blue"]
    rows = [f"the {words[i % 4]} of {i},{('animal', 'colour')[i % 4 // 2]}" for i in range(60)]
    Path("t.csv").write_text("\n".join(["text,label", *rows, rows[0]]))
    common = ["--max-steps", "2", "--eval-every", "2", "--batch-size", "8", "--device", "cpu"]
    for script, lines in (
        (["train_sft.py", "--data", "data"], ["conversations in batches of 8", "step 0: validation loss", "done at"]),
        (["train_classifier.py", "--input", "t.csv"], ["train: ", "test: ", "1 rows that repeat", "test on 12 texts"]),
    ):
        result = run_in_processes(here, *script, *common)
        assert result.returncode == 0, result.stderr[-3000:]
        assert [result.stdout.count(line) for line in lines] == [1] * len(lines), result.stdout


def test_a_refused_job_of_several_processes_ends_with_one_line(here):
    with locked(here / "checkpoints/a.pt"):
        result = run_in_processes(here, "train.py", "--data", "data", *TOY_SHAPE, "--out", "checkpoints/a.pt")
    assert result.returncode == 1 and "RuntimeError" not in result.stderr
    errors = re.findall(r"^error: .*", result.stderr, re.MULTILINE)
    assert len(errors) == 1 and "is being written by another run" in errors[0], result.stderr
    result = run_in_processes(here, "train.py", "--data", "data", *TOY_SHAPE, "--batch-size", "3", "--out", "b.pt")
    assert "--batch-size 3 does not divide among 2 processes" in result.stderr


@pytest.mark.parametrize("port", ["x", "99999"])
def test_processes_that_cannot_meet_say_so(monkeypatch, port):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^the 2 processes cannot meet \(.*\): start the run with torchrun"):
        Processes.join("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_torchrun_ends_a_job_with_a_dead_process_or_restarts_it(toy, tmp_path, restarts):
    """The same command does both: `--resume` starts a run that has not saved."""
    shutil.copytree(toy / "data", tmp_path / "data")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher += ["--max-restarts", str(restarts), str(REPOSITORY / "train.py"), *TRAIN, "--max-steps", "300"]
    job = subprocess.Popen(
        [*launcher, "--log-every", "1", "--save-every", "5", "--out", "a.pt", "--resume"],
        cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    wait_for_log(tmp_path / "a.jsonl", 12, job)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    stdout, stderr = job.communicate(timeout=240)
    if restarts:
        assert job.returncode == 0, stderr[-3000:]
        assert re.search(r"resuming at step \d+", stdout) and contents(tmp_path / "a.last.pt")["step"] == 300
        steps = [entry["step"] for entry in log(tmp_path / "a.jsonl") if "loss" in entry]
        assert steps == list(range(1, 301))
    else:
        assert job.returncode != 0 and "Signal 9 (SIGKILL)" in stderr
