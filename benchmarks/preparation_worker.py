"""Runs one method of `benchmarks.preparation`, from `text/` in the current folder to a folder named like the method.

python -m benchmarks.preparation_worker METHOD WORKERS
"""

from __future__ import annotations

import functools
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from text.tokenizer import gpt2

REPOSITORY = Path(__file__).resolve().parent.parent
VAL_FRACTION = 0.0005
END_OF_TEXT = 50256


def run_datasets_map(workers: int) -> None:
    """nanoGPT's method: a data set, shuffled and split, mapped to lists of ids by processes, then a memory map."""
    from datasets import Dataset

    def encode_row(row: dict[str, Any]) -> dict[str, Any]:
        ids = encode(row["text"])
        return {"ids": ids, "len": len(ids)}

    Path("datasets.map").mkdir(exist_ok=True)
    splits = Dataset.from_generator(read_rows).train_test_split(test_size=VAL_FRACTION, seed=2357, shuffle=True)
    for name, rows in splits.map(encode_row, remove_columns=["text"], num_proc=workers).items():
        size = int(np.sum(rows["len"], dtype=np.uint64))
        tokens = np.memmap(f"datasets.map/{name}.bin", dtype=np.uint16, mode="w+", shape=(size,))
        position, shards = 0, min(1024, len(rows))
        for i in range(shards):
            batch = np.concatenate(rows.shard(shards, i, contiguous=True).with_format("numpy")["ids"])
            tokens[position : position + len(batch)] = batch
            position += len(batch)
        tokens.flush()


def run_pool(workers: int) -> None:
    """The obvious pool of processes: each returns lists of ids, one process writes them."""
    Path("pool").mkdir()
    with multiprocessing.Pool(workers) as pool, open("pool/train.bin", "wb") as file:
        for ids in pool.imap(encode_file, sorted(Path("text").iterdir()), chunksize=16):
            file.write(np.array(ids, dtype=np.uint16).tobytes())


def run_ours(workers: int) -> None:
    """`prepare_data.py`, as a user runs it."""
    command = [sys.executable, str(REPOSITORY / "prepare_data.py"), "--input", "text", "--out", "ours", "--overwrite"]
    subprocess.run([*command, "--workers", str(workers), "--val-fraction", str(VAL_FRACTION)], check=True)


def read_rows() -> Iterator[dict[str, str]]:
    """Yields the files as rows of a data set."""
    for path in sorted(Path("text").iterdir()):
        yield {"text": path.read_text(encoding="utf-8")}


def encode_file(path: Path) -> list[int]:
    """Returns the ids of a file; runs in a process of the pool."""
    return encode(path.read_text(encoding="utf-8"))


def encode(text: str) -> list[int]:
    """Returns the ids of a document with `<|endoftext|>` behind it."""
    return [*encoding().encode_ordinary(text), END_OF_TEXT]


@functools.cache
def encoding() -> tiktoken.Encoding:
    """Returns what `tiktoken.get_encoding("gpt2")` returns, without its download."""
    special = {"<|endoftext|>": END_OF_TEXT}
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=gpt2().mergeable_ranks, special_tokens=special
    )


if __name__ == "__main__":
    methods = {"datasets.map": run_datasets_map, "pool": run_pool, "ours": run_ours}
    methods[sys.argv[1]](int(sys.argv[2]))
