"""Runs side by side: one writer for an output, readers or one writer for a data folder, and what kills leave behind."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, REPOSITORY, TOY_SHAPE, command, run_in_processes, run_script, succeed, wait_for_log

from system.errors import UserError
from system.locks import is_locked, locked, output_lock, reading, releases_locks, writing
from training.checkpointing import claim_output
from training.config import TrainerConfig
from training.distributed import Processes

TRAIN = ["--data", "data", *TOY_SHAPE, "--eval-tokens", "64"]
SHORT = ["--max-steps", "1", "--overwrite"]


@pytest.fixture
def here(toy, tmp_path) -> Path:
    """A folder of one's own with the toy's data and base model."""
    shutil.copytree(toy / "data/toy", tmp_path / "data")
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(toy / "checkpoints/toy.pt", tmp_path / "checkpoints/pretrained.pt")
    return tmp_path


@contextlib.contextmanager
def training(folder: Path, name: str) -> Iterator[subprocess.Popen]:
    """Trains in a process, from its first line of the log until the block ends."""
    arguments = [*TRAIN, "--out", f"checkpoints/{name}.pt", "--max-steps", "100000", "--log-every", "1"]
    process = subprocess.Popen(
        command("train.py", *arguments, "--save-every", "1"), cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    try:
        wait_for_log(folder / f"checkpoints/{name}.jsonl", 2, process)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_lock_is_seen_as_long_as_its_process_lives(here):
    lock = output_lock(here / "checkpoints/a.pt")
    assert not is_locked(lock) and not lock.exists()
    with training(here, "a"):
        assert is_locked(lock) and is_locked(lock)  # looking at it does not free it
    assert lock.exists() and not is_locked(lock)  # a killed process leaves the file


def refusal(result: subprocess.CompletedProcess) -> str:
    """Returns the last line on standard error of a run that must have been refused."""
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr[-2000:]
    return result.stderr.splitlines()[-1]


def hidden_files(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


def hold_output(folder: Path, name: str) -> contextlib.AbstractContextManager[bool]:
    """Holds the lock of an output, as a training run does."""
    return locked(folder / f".{name}.pt.lock", "in use", "wait")


def test_a_training_keeps_others_out_until_it_is_killed_and_the_next_run_cleans_up(here):
    checkpoints, prepared = here / "checkpoints", (here / "data/meta.json").read_bytes()
    (here / "text.txt").write_text("Some text. " * 50)
    prepare = "prepare_data.py --input text.txt --out data --overwrite"
    with training(here, "a") as process:
        process.send_signal(signal.SIGSTOP)  # leaves the processor to the others, and keeps its locks
        remedy = "wait for it, or choose another --out"
        result = run_script(here, "train.py", *TRAIN, "--out", "checkpoints/a.pt", "--overwrite")
        assert refusal(result) == (
            f"error: checkpoints/a.pt is being written by another run (process {process.pid}): {remedy}"
        )
        result = run_script(here, prepare)
        reading = f"data is being read by a training run (process {process.pid})"
        assert refusal(result) == f"error: {reading}: {remedy}; --data data reads it too"
        assert (here / "data/meta.json").read_bytes() == prepared
    assert {".a.pt.lock", next(path.name for path in (here / "data").glob(".*"))} <= set(hidden_files(here))
    (checkpoints / "snapshots").mkdir()
    for name in ("a.pt", "a.last.pt", "a.jsonl", "snapshots/a_step_5.pt"):
        (checkpoints / name).with_name(f".{Path(name).name}.4194305.tmp").write_text("half")
    (checkpoints / ".b.pt.4194305.tmp").write_text("half")
    succeed(here, "train.py", *TRAIN, *SHORT, "--out", "checkpoints/a.pt")
    assert hidden_files(checkpoints) == [".b.pt.4194305.tmp"]  # of another output, whose run may be alive
    succeed(here, prepare)
    assert not hidden_files(here / "data")


def test_every_training_script_locks_its_output(here):
    flags = ["--out", "checkpoints/a.pt", "--device", "cpu"]
    with hold_output(here / "checkpoints", "a"):
        for script in ("train_sft.py --data data", "train_classifier.py"):
            result = run_script(here, script, *flags)
            assert result.returncode == 1
            assert f"checkpoints/a.pt is being written by another run (process {os.getpid()})" in result.stderr


def test_a_refused_job_of_several_processes_ends_with_one_line(here):
    (here / "checkpoints/a.pt").touch()
    with hold_output(here / "checkpoints", "a"):
        result = run_in_processes(here, "train.py", *TRAIN, "--out", "checkpoints/a.pt")
    assert result.returncode != 0
    errors = re.findall(r"^error: .*", result.stderr, re.MULTILINE)
    assert len(errors) == 1 and f"is being written by another run (process {os.getpid()})" in errors[0], result.stderr
    assert "RuntimeError" not in result.stderr


def test_data_that_is_being_prepared_is_not_trained_on(here):
    with writing(here / "data", "meta.json"):
        result = run_script(here, "train.py", *TRAIN, *SHORT, "--out", "new/folder/a.pt")
    assert refusal(result) == (
        f"error: data is being written by another run (process {os.getpid()}): wait for it, or choose another --data"
    )
    assert not hidden_files(here) and not (here / "new").exists()


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/sys/kernel").is_dir(), reason="root can write everywhere")
def test_a_read_only_folder_can_be_read(here):
    folder = Path("/sys/kernel")  # nobody can create a file there, not even root
    if os.geteuid():
        folder = here / "data"
        folder.chmod(0o555)
    with pytest.raises(OSError):
        (folder / ".x").touch()
    with reading(folder, "meta.json"), reading(folder, "meta.json"):
        pass


def test_without_locks_in_the_file_system_a_run_goes_on(tmp_path, monkeypatch):
    def flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    @releases_locks
    def main(config: TrainerConfig) -> None:
        assert claim_output(config, Processes()) is None

    half = tmp_path / ".a.pt.4194305.tmp"
    half.write_text("perhaps of a run that is alive")
    with hold_output(tmp_path, "a"), reading(tmp_path, "meta.json"):
        monkeypatch.setattr(fcntl, "flock", flock)
        main(TrainerConfig(out=tmp_path / "a.pt"))
        with writing(tmp_path, "meta.json"):
            pass
        monkeypatch.undo()
    assert hidden_files(tmp_path) == [half.name]


def test_readers_share_a_folder_and_exclude_a_writer(tmp_path):
    with reading(tmp_path, "meta.json"), reading(tmp_path, "meta.json"):
        with pytest.raises(UserError, match=rf"read by a training run \(process {os.getpid()}\)"):
            writing(tmp_path, "meta.json").__enter__()
        with writing(tmp_path, "sft_meta.json"):  # other files of the same folder
            pass
    with writing(tmp_path, "meta.json"), pytest.raises(UserError, match="written by another run"):
        reading(tmp_path, "meta.json").__enter__()
    assert not list(tmp_path.iterdir())


def test_ctrl_c_during_an_import_releases_what_is_held(tmp_path):
    (tmp_path / "slow.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    program = """
import signal, tempfile
from system.interrupts import raised
from system.locks import hold
signal.signal(signal.SIGINT, signal.SIG_DFL)
with raised():
    hold(tempfile.TemporaryDirectory(dir="held"))
    import slow
"""
    (tmp_path / "held").mkdir()
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{REPOSITORY}:{tmp_path}"}
    process = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True)
    assert process.returncode == -signal.SIGINT and not process.stderr and not list((tmp_path / "held").iterdir())
