"""Several processes that train one model, in real ones: equal to one, split to fit, sharded, resumed, killed."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, REPOSITORY, TOY_SHAPE, log, run_in_processes, run_script, succeed, wait_for_log

COMMON = ["--data", "data/toy", *TOY_SHAPE]
STOP = ["--target-loss", "100"]  # one step after the first line of the log, since losses are looked at that late


def torchrun_command(script: str, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, str(REPOSITORY / script), *arguments]


def losses(path: Path) -> dict[int, float]:
    """The training losses that a run logged, by step."""
    return {entry["step"]: entry["loss"] for entry in log(path) if "loss" in entry}


@pytest.fixture(scope="module")
def whole(toy) -> dict[int, float]:
    """The losses of a run of one process that nothing interrupts."""
    arguments = [*COMMON, "--max-steps", "16", "--log-every", "4"]
    succeed(toy, "train.py", *arguments, "--out", "checkpoints/one.pt")
    found = losses(toy / "checkpoints/one.jsonl")
    assert found.keys() == {4, 8, 12, 16}
    return found


def test_two_processes_equal_one(toy):
    arguments = [*COMMON, "--max-steps", "20", "--log-every", "1"]
    succeed(toy, "train.py", "--out", "checkpoints/alone.pt", *arguments)
    launched = run_in_processes(toy, "train.py", "--out", "checkpoints/two.pt", *arguments)
    assert launched.returncode == 0, launched.stderr[-3000:]
    one, two = (
        [entry.get("loss", entry.get("val_loss")) for entry in log(toy / f"checkpoints/{name}.jsonl")]
        for name in ("alone", "two")
    )
    assert len(one) >= 22 and one == pytest.approx(two, rel=1e-5)


def test_a_run_resumes_on_another_number_of_processes_and_micro_batches(toy, whole):
    """The rest of a run of one process, on two with micro-batches, gives the losses that the one would have given."""
    arguments = [*COMMON, "--max-steps", "16", "--log-every", "4", "--out", "checkpoints/moves.pt"]
    succeed(toy, "train.py", *arguments, *STOP)
    assert losses(toy / "checkpoints/moves.jsonl").keys() == {4}
    result = run_in_processes(toy, "train.py", *arguments, "--resume", "--grad-accum-steps", "2")
    assert result.returncode == 0, result.stderr[-3000:]
    assert losses(toy / "checkpoints/moves.jsonl") == pytest.approx(whole, rel=1e-5)


def test_a_sharded_run_gives_the_losses_of_a_whole_one_and_resumes_as_either(toy, whole):
    arguments = [*COMMON, "--max-steps", "16", "--log-every", "4", "--out", "checkpoints/sharded.pt"]
    sharded = ["--fsdp", "--grad-accum-steps", "2", "--grad-checkpointing"]
    results = [
        run_in_processes(toy, "train.py", *arguments, *sharded, *STOP),
        run_script(toy, "train.py", *arguments, "--resume", *STOP),
        run_in_processes(toy, "train.py", *arguments, *sharded, "--resume"),
    ]
    assert not any(result.returncode for result in results), [result.stderr[-2000:] for result in results]
    assert [re.search(r"at step (\d+);", result.stdout).group(1) for result in results] == ["5", "9", "16"]
    assert losses(toy / "checkpoints/sharded.jsonl") == pytest.approx(whole, rel=1e-5)


def test_slices_of_two_processes_with_fsdp_are_resumed_by_one_process(toy, whole):
    arguments = [*COMMON, "--max-steps", "16", "--log-every", "4", "--out", "checkpoints/slices.pt"]
    sharded = ["--fsdp", "--grad-accum-steps", "2", "--sharded-saves", "on"]
    first = run_in_processes(toy, "train.py", *arguments, *sharded, *STOP)
    assert first.returncode == 0, first.stderr[-3000:]
    assert len(list((toy / "checkpoints/slices.last/step_5").iterdir())) == 2
    assert not (toy / "checkpoints/slices.last.pt").exists()
    succeed(toy, "train.py", *arguments, "--resume")
    assert (toy / "checkpoints/slices.last.pt").exists() and not (toy / "checkpoints/slices.last").exists()
    assert losses(toy / "checkpoints/slices.jsonl") == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
def test_slices_of_one_process_are_resumed_by_two(toy, whole):
    arguments = [*COMMON, "--max-steps", "16", "--log-every", "4", "--out", "checkpoints/one_slice.pt"]
    in_slices = ["--sharded-saves", "on"]
    succeed(toy, "train.py", *arguments, *in_slices, *STOP)
    last = run_in_processes(toy, "train.py", *arguments, *in_slices, "--resume")
    assert last.returncode == 0, last.stderr[-3000:]
    [folder] = (toy / "checkpoints/one_slice.last").glob("step_*")  # the older slices are gone
    assert folder.name == "step_16" and len(list(folder.iterdir())) == 2
    assert losses(toy / "checkpoints/one_slice.jsonl") == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
def test_a_sharded_run_in_bfloat16_gives_nearly_the_losses_in_float32(toy, whole):
    arguments = [*COMMON, "--max-steps", "16", "--log-every", "4", "--out", "checkpoints/sharded_bf16.pt"]
    result = run_in_processes(toy, "train.py", *arguments, "--fsdp", "--grad-accum-steps", "2", "--dtype", "bfloat16")
    assert result.returncode == 0, result.stderr[-3000:]
    found = losses(toy / "checkpoints/sharded_bf16.jsonl")
    assert found == pytest.approx(whole, rel=2e-3) and found != pytest.approx(whole, rel=1e-6)


@pytest.fixture(scope="module")
def shard_worker(toy) -> str:
    """What two processes print that shard a model: see `tests/workers.py`."""
    result = run_in_processes(toy, "tests/workers.py", "shard")
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_each_process_holds_a_slice_of_a_sharded_model(shard_worker):
    assert shard_worker.count("sharded") == 2


def test_a_step_exchanges_what_the_docstrings_list(shard_worker):
    """Those of `training/distributed.py` and `training/sharding.py`, here for two layers and two micro-batches."""
    ddp, fsdp = (json.loads(re.search(rf"^{name}: (.*)$", shard_worker, re.MULTILINE)[1]) for name in ("DDP", "FSDP"))
    width, n_parameters = 128, 2 + 2 * 12 + 2  # embeddings, layers, last LayerNorm; the head is tied
    block = 12 * width**2 + 13 * width
    root = (448 + 32 + 2) * width
    assert {kind for kind, _ in ddp} == {"allreduce"}
    assert sum(n_bytes for _, n_bytes in ddp) == 4 * (2 * block + root) + 4  # gradients once, and the loss

    def exchanged(prefix: str) -> list[int]:
        return [n_bytes for kind, n_bytes in fsdp if kind.startswith(prefix)]

    assert exchanged("allgather") == 2 * [2 * root, *4 * [2 * block]]  # in bfloat16, for each micro-batch
    assert exchanged("reducescatter") == [4 * block, 4 * block, 4 * root]  # in float32, once
    assert exchanged("allreduce") == [4 * n_parameters, 4]  # the norms of the gradients, and the loss
    of_a_layer = [n * width**2 for n in (3, 1, 4, 4)]  # half of the numbers in two layers, there and back, in bfloat16
    assert sorted(exchanged("alltoall")) == sorted(2 * n for n in 2 * of_a_layer)
    assert len(fsdp) == 10 + 3 + 2 + 8


def test_a_sharded_batch_is_split_until_every_process_expects_it_to_fit(shard_worker):
    found = re.findall(r"^\((\d+), 4000\) MB: (\d+)$", shard_worker, re.MULTILINE)
    tight, roomy = ([int(n) for room, n in found if room == megabytes] for megabytes in ("30", "4000"))
    assert len(tight) == 2 and tight[0] == tight[1] > 1 and roomy == [1, 1]  # the second could do without


def test_a_batch_is_split_until_it_fits_into_every_processs_memory(toy):
    def split(*megabytes):
        launch = run_in_processes if len(megabytes) > 1 else run_script
        result = launch(toy, "tests/workers.py", "fit", *map(str, megabytes))
        return list(map(int, re.findall(r"micro-batches: (\d+)", result.stdout))), result.stderr

    [roomy], _ = split(2000)
    [tight], _ = split(100)
    assert roomy == 1 and tight > 1
    both, stderr = split(50, 2000)  # the second could do without
    assert len(both) == 2 and both[0] == both[1] > 1, stderr[-2000:]
    none, stderr = split(1)
    assert not none and "out of memory even with one sequence at a time" in stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_dead_worker_takes_the_job_down(toy):
    arguments = [*COMMON, "--max-steps", "100000", "--out", "checkpoints/dead.pt", "--log-every", "1"]
    job = subprocess.Popen(
        torchrun_command("train.py", *arguments), cwd=toy, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    wait_for_log(toy / "checkpoints/dead.jsonl", 3, job)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, stderr = job.communicate(timeout=60)
    assert job.returncode != 0 and "Signal 9 (SIGKILL)" in stderr
