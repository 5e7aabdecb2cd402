"""The benchmarks run at toy size; the benchmark of training is tested in test_training.py."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import ENVIRONMENT, REPOSITORY


def benchmark(name: str, *arguments: object) -> str:
    """Runs a benchmark that must succeed; returns its standard output."""
    result = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


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


def test_the_methods_of_the_preparation_benchmark_write_the_same_number_of_tokens():
    stdout = benchmark("preparation", "--megabytes", 1, "--rounds", 1, "--workers", 2)
    assert all(f"\n{method:14}" in stdout for method in ("datasets.map", "pool", "ours"))
