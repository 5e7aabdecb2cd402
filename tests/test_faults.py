"""Processes that die, hang or lag behind: the run says which one, and torchrun's restart gives the same losses."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import ENVIRONMENT, TOY_SHAPE, log, run_in_processes, succeed, wait_for_log
from test_distributed import losses, torchrun_command

import train
from training.distributed import Processes
from training.restarts import after_restart

COMMON = ["--data", "data/toy", *TOY_SHAPE]


def start(folder: Path, *arguments: str, restarts: int = 0) -> subprocess.Popen:
    """Starts train.py in two processes."""
    launcher, script = torchrun_command("train.py", *arguments)[:3], torchrun_command("train.py", *arguments)[3:]
    return subprocess.Popen(
        [*launcher, "--max-restarts", str(restarts), *script], cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip


def workers(job: subprocess.Popen) -> list[int]:
    """Returns the process ids of rank 0 and rank 1."""
    return list(map(int, Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()))


def test_a_killed_process_is_named_and_torchrun_goes_on_from_the_last_save(toy):
    steps = ["--max-steps", "48", "--log-every", "4", "--eval-every", "48", "--learning-rate", "1e-4"]
    succeed(toy, "train.py", *COMMON, *steps, "--out", "checkpoints/unkilled.pt")
    job = start(toy, *COMMON, *steps, "--out", "checkpoints/killed.pt", restarts=1)
    wait_for_log(toy / "checkpoints/killed.jsonl", 12, job)
    os.kill(workers(job)[1], signal.SIGKILL)
    stdout, stderr = job.communicate(timeout=100)
    assert job.returncode == 0, stderr[-3000:]
    assert stderr.count("does not answer") == 1 and "error: rank 1 does not answer: " in stderr
    assert "restarted by torchrun: the run goes on from its last save\n" in stdout
    assert "resuming at step" in stdout
    found = losses(toy / "checkpoints/killed.jsonl")
    assert list(found) == list(range(4, 49, 4))
    assert found == pytest.approx(losses(toy / "checkpoints/unkilled.jsonl"), rel=1e-4)


@pytest.mark.slow
def test_a_process_that_hangs_is_named_after_the_timeout(toy):
    arguments = [*COMMON, "--max-steps", "100000", "--log-every", "1", "--out", "checkpoints/hangs.pt"]
    job = start(toy, *arguments, "--process-timeout", "10")
    wait_for_log(toy / "checkpoints/hangs.jsonl", 3, job)
    stopped = workers(job)[1]
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    line = next(line for line in job.stderr if "does not answer" in line)
    assert line.startswith("error: rank 1 does not answer: its process was killed or stopped on ")
    assert 4 < time.monotonic() - began < 40
    os.kill(stopped, signal.SIGKILL)  # torchrun would wait for half a minute
    job.communicate(timeout=60)
    assert job.returncode == 1


def test_a_process_that_dies_outside_of_a_collective_call_is_noticed(toy):
    """As with NCCL, whose calls do not fail by themselves: rank 0 computes for a long time, rank 1 is killed."""
    result = run_in_processes(toy, "tests/workers.py", "die")
    assert result.returncode != 0 and "still alone" not in result.stdout
    assert "error: rank 1 does not answer: " in result.stderr, result.stderr[-2000:]


@pytest.mark.slow
def test_a_slow_process_shows_in_the_log(toy):
    result = run_in_processes(toy, "tests/workers.py", "lag", "0.05")
    assert result.returncode == 0, result.stderr[-3000:]
    entries = [entry for entry in log(toy / "checkpoints/lags.jsonl") if "own_seconds" in entry]
    assert [entry["step"] for entry in entries] == [4, 8, 12, 16]
    for entry in entries[1:]:  # the first steps are warm-up
        others = 2 * entry["own_seconds"] - entry["slowest_seconds"]
        assert entry["slowest_rank"] == 1 and entry["slowest_seconds"] > 0.05
        assert others < entry["slowest_seconds"] / 1.5  # the wait for rank 1 does not count
    assert result.stdout.count("rank 1 holds the others up: it needs 0.") == 1


def test_one_process_alone_is_not_watched(toy):
    threads = threading.active_count()
    processes = Processes.join("cpu")
    assert processes.heartbeats is None and threading.active_count() == threads
    assert not any("own_seconds" in entry for entry in log(toy / "checkpoints/toy.jsonl"))


def test_a_restart_takes_up_only_the_runs_own_output(tmp_path, monkeypatch):
    """A run that was refused because another run's files are there is refused again, not resumed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    config, alone = train.Config(out=tmp_path / "a.pt"), Processes()
    torchrun_variables = {
        "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    for name, value in torchrun_variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "a.last.pt").touch()
    store.set("training began", "")
    assert after_restart(config, alone) == config  # not a restart
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert after_restart(config, alone).resume
    (tmp_path / "a.last.pt").unlink()
    assert after_restart(config, alone).overwrite and not after_restart(config, alone).resume
    store.delete_key("training began")
    (tmp_path / "a.last.pt").touch()
    assert after_restart(config, alone) == config
