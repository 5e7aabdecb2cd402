"""What a busy processor costs: training and generation alone, beside a busy process, and beside a second training.

    python -m benchmarks.busy

Measures the project's setting of OpenMP (`system/threads.py`) and OpenMP's own default in turn, each run in a process
of its own. Figures are medians over the rounds.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from system.cli import run
from system.errors import UserError, require_at_least
from system.threads import GENERATION, TRAINING, spin_count

REPOSITORY = Path(__file__).resolve().parent.parent
BUSY_LOOP = [sys.executable, "-c", "while True: pass"]
TASKS = {"train": TRAINING, "generate": GENERATION}
DEFAULT, OURS = "OpenMP's default", "this project"
GOALS = {"alone": "goal: at most 1.05", "one busy process": "goal: at most 2.5"}


@dataclass(frozen=True)
class Config:
    rounds: int = 3
    """measurements of each case"""
    steps: int = 50
    """training steps, or tokens generated, per measurement"""

    def __post_init__(self) -> None:
        require_at_least(1, self, "rounds", "steps")


def main(config: Config) -> None:
    """Measures every case and prints it beside its goal."""
    cases = {"alone": [], "one busy process": [BUSY_LOOP], "a second training": [worker("train", 10**9)]}
    print(f"milliseconds per step or token (ratio to OpenMP's default, alone), {os.cpu_count()} cores")
    for task, microseconds in TASKS.items():
        environments = {DEFAULT: environment(None), OURS: environment(spin_count(microseconds))}
        times: dict[tuple[str, str], list[float]] = {}
        for _ in range(config.rounds):
            for case, others in cases.items():
                for setting, env in environments.items():
                    times.setdefault((case, setting), []).append(measure(task, config.steps, env, others))
        print_table(task, {key: statistics.median(values) for key, values in times.items()})


def print_table(task: str, medians: dict[tuple[str, str], float]) -> None:
    """Prints the times of a task in every case and with both settings."""
    for case in dict.fromkeys(case for case, _ in medians):
        cells = []
        for setting in (DEFAULT, OURS):
            milliseconds = medians[case, setting]
            cells.append(f"{setting} {milliseconds:8.1f} ({milliseconds / medians['alone', DEFAULT]:.2f})")
        print(f"{task:10}{case:20}{'    '.join(cells)}    {GOALS.get(case, '')}", flush=True)


def worker(task: str, steps: int) -> list[str]:
    """Returns the command that trains or generates for a number of steps."""
    return [sys.executable, "-m", "benchmarks.busy_worker", task, str(steps)]


def environment(spins: int | None) -> dict[str, str]:
    """Returns the environment in which waiting threads spin for a number of rounds; None is OpenMP's default."""
    others = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    return others if spins is None else {**others, "GOMP_SPINCOUNT": str(spins)}


def measure(task: str, steps: int, env: dict[str, str], others: list[list[str]]) -> float:
    """Returns the milliseconds per step of a worker beside other processes. Raises UserError if it fails."""
    with running(others, env):
        result = subprocess.run(worker(task, steps), cwd=REPOSITORY, env=env, capture_output=True, encoding="utf-8")
    if result.returncode:
        raise UserError(f"the task {task} failed: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")
    return float(result.stdout)


@contextmanager
def running(commands: list[list[str]], env: dict[str, str]) -> Iterator[None]:
    """Runs commands in the background, and ends them at the end."""
    processes = [subprocess.Popen(c, cwd=REPOSITORY, env=env, stdout=subprocess.DEVNULL) for c in commands]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    run(main, Config)
