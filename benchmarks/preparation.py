"""How fast text becomes tokens: `prepare_data.py`, `datasets.map` as nanoGPT uses it, and a pool of processes.

    python -m benchmarks.preparation                 # 260 MB of Python sources, three rounds in turn
    python -m benchmarks.preparation --input corpus/ --megabytes 1000 --only ours

Every method starts from the same text files and ends with the same number of tokens in .bin files. Each round runs
every method once, in a process of its own.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from system.cli import run
from system.errors import UserError, require

REPOSITORY = Path(__file__).resolve().parent.parent
METHODS = ("datasets.map", "pool", "ours")


@dataclass(frozen=True)
class Config:
    input: Path | None = None
    """folder of .py files; by default the standard library and the installed packages"""
    megabytes: int = 260
    """size of the text"""
    rounds: int = 3
    """measurements of each method"""
    workers: int = os.cpu_count() or 1
    """processes or threads"""
    only: Literal["all", "datasets.map", "pool", "ours"] = "all"
    """measure one method only"""

    def __post_init__(self) -> None:
        require(self.megabytes >= 1 and self.rounds >= 1, "--megabytes and --rounds must be at least 1")


def main(config: Config) -> None:
    """Measures each method in turn, and prints medians, ratios and the peak memory."""
    methods = METHODS if config.only == "all" else (config.only,)
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    sizes, memory = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        size = collect(config, Path(folder) / "text")
        print(f"{size / 1e6:.1f} MB of Python sources, {config.workers} workers, {os.cpu_count()} cores")
        for _ in range(config.rounds):
            for method in methods:
                started = time.monotonic()
                memory[method] = run_method(method, Path(folder), config.workers)
                seconds[method].append(time.monotonic() - started)
                sizes[method] = sum(path.stat().st_size for path in (Path(folder) / method).glob("*.bin"))
                print(f"  {method:14}{size / 1e6 / seconds[method][-1]:7.2f} MB/s")
                shutil.rmtree(Path(folder) / method)
    if len(set(sizes.values())) > 1:
        raise UserError(f"the methods wrote different numbers of bytes: {sizes}")
    reference = statistics.median(seconds[methods[0]])
    for method in methods:
        median = statistics.median(seconds[method])
        print(
            f"{method:14}{size / 1e6 / median:7.2f} MB/s  {reference / median:5.2f} times {methods[0]}  "
            f"{memory[method] / 1e6:6.0f} MB of memory in one process at most"
        )


def run_method(method: str, folder: Path, workers: int) -> int:
    """Runs one method in a process of its own; returns the peak resident memory in bytes of it and its children."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "HF_HOME": str(folder / method / "cache"),
        "TQDM_DISABLE": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.preparation_worker", method, str(workers)],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"{method} failed")
    return usage.ru_maxrss * 1024


def collect(config: Config, folder: Path) -> int:
    """Copies Python sources into a folder, each as a UTF-8 file, until they have the size wanted; returns that size.

    Takes the sources again and again if there are too few. Raises UserError if there are none.
    """
    installed = [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    roots = [config.input] if config.input else installed
    paths = sorted(path for root in roots for path in root.rglob("*.py"))
    size = 0
    folder.mkdir()
    for n, path in enumerate(itertools.cycle(paths)):
        content = path.read_bytes()
        if is_clean(content):
            (folder / f"{n:07}.py").write_bytes(content)
            size += len(content)
        if size >= config.megabytes * 1_000_000:
            return size
        if n > len(paths) and not size:
            break
    raise UserError(f"no Python sources in {roots[0]}: choose another --input")


def is_clean(content: bytes) -> bool:
    """Returns whether every method reads a file alike: UTF-8 text, without NUL, carriage return and byte order mark."""
    try:
        return bool(content.decode()) and not any(mark in content for mark in (b"\0", b"\r", b"\xef\xbb\xbf"))
    except UnicodeDecodeError:
        return False


if __name__ == "__main__":
    run(main, Config)
