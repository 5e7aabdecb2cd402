"""Step 1: text → tokens. Writes train.bin, val.bin and meta.json, which train.py reads."""

import glob
import os
import random
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Literal, TypeVar

from cli import UserError, require, run

Documents = Iterable[tuple[str, str]]
"""Pairs of a split, "train" or "val", and a document's text."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Config:
    dataset: Literal["openwebtext", "pydocs"] = "openwebtext"
    """openwebtext: 8 million web pages from the Hugging Face Hub; pydocs: the documentation inside every Python"""
    input: tuple[str, ...] = ()
    """text files, folders of .txt, .md and .py files, or globs, instead of a dataset; a file is a document"""
    out: Path = Path("data")
    """folder to write"""
    vocab_size: int | None = None
    """train a byte-level BPE of this many tokens on the training text; without it, GPT-2's tokenizer"""
    val_fraction: float = 0.1
    """share of documents held out (openwebtext has its own split); of fewer than 20 documents, the last part of each"""
    seed: int = 1337
    """of the choice of held-out documents"""

    def __post_init__(self):
        require(0 < self.val_fraction < 1, "--val-fraction must lie between 0 and 1")
        require(
            self.vocab_size is None or 256 < self.vocab_size <= 65_000,
            "--vocab-size must lie between 257 and 65000: 256 bytes and what is merged from them",
        )


def main(config: Config) -> None:
    """Prepares one corpus."""
    import tokenizer as tokenizers

    documents = source(config)
    if config.vocab_size:
        tokenizer = tokenizers.train_bpe((text for split, text in documents() if split == "train"), config.vocab_size)
    else:
        tokenizer = tokenizers.gpt2()
    meta = write_tokens(
        documents(), tokenizer, config.out, {"source": config.dataset if not config.input else list(config.input)}
    )
    for split, counts in meta["splits"].items():
        print(f"{split}: {counts['documents']:,} documents, {counts['bytes']:,} bytes, {counts['tokens']:,} tokens")
    print(f"wrote {config.out}, tokenizer {tokenizer.name}")


def source(config: Config) -> Callable[[], Documents]:
    """Returns a function that goes through the corpus from its start, as often as it is called."""
    if config.input:
        paths = find_files(config.input)
        return lambda: hold_out((read_document(path) for path in paths), config.val_fraction, config.seed)
    if config.dataset == "pydocs":
        import pydocs

        corpus = list(pydocs.documents())
        return lambda: hold_out(corpus, config.val_fraction, config.seed)
    splits = load_openwebtext()
    return lambda: ((name, row["text"]) for name, rows in splits.items() for row in rows)


def find_files(patterns: Iterable[str]) -> list[Path]:
    """Returns the text files behind files, folders and globs, each once and sorted. Raises UserError for none."""
    found = set()
    for pattern in patterns:
        matches = [Path(match) for match in glob.glob(os.path.expanduser(pattern), recursive=True)] or [Path(pattern)]
        for path in matches:
            inside = (p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".py") and p.is_file())
            files = set(inside) if path.is_dir() else {path} if path.is_file() else set()
            if not files:
                raise UserError(
                    f"no text in {pattern}: wanted a text file, a folder of .txt, .md or .py files, or a glob"
                )
            found |= files
    return sorted(found)


def read_document(path: Path) -> str:
    """Reads one text file. Raises UserError for one that is not UTF-8 or holds binary data."""
    from files import read_text

    text = read_text(path)
    if "\0" in text:
        raise UserError(f"{path} is not a text file (it has zero bytes)")
    return text


def hold_out(texts: Iterable[str], fraction: float, seed: int) -> Documents:
    """Splits documents into "train" and "val": whole documents, or, of fewer than 20, the last part of each."""
    texts = iter(texts)
    first = list(islice(texts, 20))
    if len(first) == 20:
        yield from draw_held_out(chain(first, texts), fraction, seed)
        return
    for text in first:
        cut = int(len(text) * (1 - fraction))
        yield from (("train", text[:cut]), ("val", text[cut:]))


def draw_held_out(items: Iterable[Item], fraction: float, seed: int) -> Iterator[tuple[str, Item]]:
    """Yields every item with its split: one of each 1/`fraction` in a row, drawn by seed, is "val", the others "train".

    The first 20 items hold at least one of "val", if there are so many.
    """
    rng, size = random.Random(seed), max(2, round(1 / fraction))
    for i, item in enumerate(items):
        if i % size == 0:
            held_out = i + rng.randrange(size if i else min(size, 20))
        yield "val" if i == held_out else "train", item


def load_openwebtext() -> dict:
    """Loads Skylion007/openwebtext from the Hub, split as nanoGPT does, so that validation losses compare."""
    from datasets import load_dataset

    try:
        rows = load_dataset("Skylion007/openwebtext", revision="refs/convert/parquet", split="train")
    except Exception as error:  # whatever the Hub's client raises without a network
        raise UserError(
            f"cannot load openwebtext from the Hugging Face Hub ({type(error).__name__}); without a network, "
            "--dataset pydocs and --input FILE work"
        ) from None
    splits = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    return {"train": splits["train"], "val": splits["test"]}


def write_tokens(documents: Documents, tokenizer, out: Path, facts: dict) -> dict:
    """Tokenizes documents into `out`, each followed by `<|endoftext|>`; returns what it wrote into meta.json.

    The files appear together at the end; whatever happens before, the old ones stay as they were.
    """
    import numpy as np
    from tqdm import tqdm

    from files import atomic_folder, write_json

    splits = {name: {"documents": 0, "tokens": 0, "bytes": 0} for name in ("train", "val")}
    with atomic_folder(out, last="meta.json") as folder, tqdm(unit="B", unit_scale=True, desc="tokenizing") as bar:
        with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
            for batch in batched(documents, characters=1_000_000):
                for (split, text), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch]), strict=True):
                    (train if split == "train" else val).write(np.array([*ids, tokenizer.end_of_text], "<u2").tobytes())
                    n_bytes = len(text.encode("utf-8", errors="replace"))
                    for key, count in (("documents", 1), ("tokens", len(ids) + 1), ("bytes", n_bytes)):
                        splits[split][key] += count
                    bar.update(n_bytes)
        if not splits["train"]["bytes"]:
            raise UserError("there is no text to train on")
        files = ["train.bin", "val.bin"]
        if tokenizer.spec != "gpt2":
            (folder / "tokenizer.json").write_text(tokenizer.spec, encoding="utf-8")
            files.append("tokenizer.json")
        meta = {
            "files": files,
            "tokenizer": tokenizer.name,
            "n_tokens": tokenizer.n_tokens,
            "splits": splits,
            **facts,
            "command": shlex.join(["python", *sys.argv]),
            "format_version": 1,
        }
        write_json(folder / "meta.json", meta)
    return meta


def batched(documents: Documents, characters: int) -> Iterator[list[tuple[str, str]]]:
    """Yields documents in lists of at least so many characters together, the last list perhaps fewer."""
    batch, size = [], 0
    for split, text in documents:
        if text:
            batch.append((split, text))
            size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


if __name__ == "__main__":
    run(main, Config)
