"""How fast text becomes tokens: `prepare_data.py` against `datasets.map`, as nanoGPT does it, and a process pool.

    python -m benchmarks.preparation                 # 260 MB of Python sources, three rounds in turn
    python -m benchmarks.preparation --input corpus/ --megabytes 1000 --only ours

Every way starts from the same text files and ends with the same number of tokens in .bin files; all run in processes of
their own, in turn.
"""

import functools
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
WAYS = ("datasets.map", "pool", "ours")
HELD_OUT = 0.0005


@dataclass(frozen=True)
class Config:
    input: Path | None = None
    """folder of .py files; without it, the standard library and the installed packages"""
    megabytes: int = 260
    """text to take"""
    rounds: int = 3
    """times to measure each way"""
    workers: int = os.cpu_count() or 1
    """processes or threads"""
    only: Literal["all", "datasets.map", "pool", "ours"] = "all"
    """measure one way only"""
    work: str | None = None
    """internal: the way that this process measures, in the current folder"""

    def __post_init__(self):
        require(self.megabytes >= 1 and self.rounds >= 1, "--megabytes and --rounds must be at least 1")


def main(config: Config) -> None:
    """Measures each way in turn, and prints medians, ratios and the largest memory."""
    if config.work:
        {"datasets.map": with_datasets_map, "pool": with_pool, "ours": with_ours}[config.work](config.workers)
        return
    ways = WAYS if config.only == "all" else (config.only,)
    with tempfile.TemporaryDirectory() as folder:
        size = collect(config, Path(folder) / "text")
        print(f"{size / 1e6:.1f} MB of Python sources, {config.workers} workers, {os.cpu_count()} cores")
        seconds, sizes, memory = {way: [] for way in ways}, {}, {}
        for _ in range(config.rounds):
            for way in ways:
                started = time.monotonic()
                memory[way] = measure(way, folder, config.workers)
                seconds[way].append(time.monotonic() - started)
                sizes[way] = sum(path.stat().st_size for path in (Path(folder) / way).glob("*.bin"))
                print(f"  {way:14}{size / 1e6 / seconds[way][-1]:7.2f} MB/s")
                shutil.rmtree(Path(folder) / way)
        if len(set(sizes.values())) > 1:
            raise UserError(f"the ways wrote different numbers of tokens: {sizes}")
        slowest = statistics.median(seconds[ways[0]])
        for way in ways:
            median = statistics.median(seconds[way])
            print(
                f"{way:14}{size / 1e6 / median:7.2f} MB/s  {slowest / median:5.2f} times {ways[0]}  "
                f"{memory[way] / 1e6:6.0f} MB of memory in one process at most"
            )


def measure(way: str, folder: str, workers: int) -> int:
    """Runs one way in a process of its own; returns the largest resident memory of it and its children, in bytes."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "HF_HOME": str(Path(folder) / way / "cache"),
        "TQDM_DISABLE": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.preparation", "--work", way, "--workers", str(workers)],
        cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"{way} failed")
    return usage.ru_maxrss * 1024


def collect(config: Config, folder: Path) -> int:
    """Copies sources into a folder, one UTF-8 file each, until there are enough, again and again if need be."""
    roots = (
        [config.input] if config.input else [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    )
    size, wanted = 0, config.megabytes * 1_000_000
    folder.mkdir()
    paths = sorted(path for root in roots for path in root.rglob("*.py"))
    for n in range(1_000_000_000):
        path = paths[n % len(paths)]
        text = path.read_bytes()
        try:
            is_text = bool(text.decode()) and b"\0" not in text and b"\r" not in text and b"\xef\xbb\xbf" not in text
        except UnicodeDecodeError:
            is_text = False
        if is_text:
            (folder / f"{n:07}.py").write_bytes(text)
            size += len(text)
        if size >= wanted or (n > len(paths) and not size):
            return size
    return size


def with_datasets_map(workers: int) -> None:
    """nanoGPT's way: a data set, shuffled and split, `map` to lists of ids in processes, then into a memory map."""
    import numpy as np
    from datasets import Dataset

    encoding = tiktokens_own()

    def process(example):
        ids = [*encoding.encode_ordinary(example["text"]), 50256]
        return {"ids": ids, "len": len(ids)}

    Path("datasets.map").mkdir(exist_ok=True)
    splits = Dataset.from_generator(read_texts).train_test_split(test_size=HELD_OUT, seed=2357, shuffle=True)
    for name, rows in splits.map(process, remove_columns=["text"], num_proc=workers).items():
        path, size = f"datasets.map/{name}.bin", int(np.sum(rows["len"], dtype=np.uint64))
        tokens = np.memmap(path, dtype=np.uint16, mode="w+", shape=(size,))
        at, parts = 0, min(1024, len(rows))
        for i in range(parts):
            batch = np.concatenate(rows.shard(parts, i, contiguous=True).with_format("numpy")["ids"])
            tokens[at : at + len(batch)] = batch
            at += len(batch)
        tokens.flush()


def with_pool(workers: int) -> None:
    """The obvious pool of processes, which return lists of ids."""
    import multiprocessing

    import numpy as np

    Path("pool").mkdir()
    with multiprocessing.Pool(workers) as pool, open("pool/train.bin", "wb") as file:
        for ids in pool.imap(encode_file, sorted(Path("text").iterdir()), chunksize=16):
            file.write(np.array(ids, dtype=np.uint16).tobytes())


def encode_file(path: Path) -> list[int]:
    """What a process of the pool does."""
    return [*tiktokens_own().encode_ordinary(path.read_text(encoding="utf-8")), 50256]


@functools.cache
def tiktokens_own():
    """What `tiktoken.get_encoding("gpt2")` returns, without its download."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    from text import tokenizer

    ranks, special = tokenizer.gpt2().mergeable_ranks, {"<|endoftext|>": 50256}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def read_texts():
    """Yields the files as rows of a data set."""
    for path in sorted(Path("text").iterdir()):
        yield {"text": path.read_text(encoding="utf-8")}


def with_ours(workers: int) -> None:
    """`prepare_data.py` as its user runs it."""
    command = [sys.executable, str(REPOSITORY / "prepare_data.py"), "--input", "text", "--out", "ours", "--overwrite"]
    subprocess.run([*command, "--workers", str(workers), "--val-fraction", str(HELD_OUT)], check=True)


if __name__ == "__main__":
    run(main, Config)
