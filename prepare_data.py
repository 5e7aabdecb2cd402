"""Step 1: text → tokens. Writes train.bin, val.bin (or shards) and meta.json, which train.py reads."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from system.cli import run
from system.errors import require, require_at_least

DATASETS = ("openwebtext", "fineweb-edu", "shakespeare", "war-and-peace", "pydocs")
BPE_CHARACTERS = 200_000_000  # of the training text are enough to train a tokenizer on


@dataclass(frozen=True)
class Config:
    dataset: str = "openwebtext"
    """openwebtext, fineweb-edu (10 billion tokens), shakespeare, war-and-peace, pydocs (the documentation inside every
    Python, no download), or a data set of the Hugging Face Hub as org/name"""
    input: tuple[str, ...] = ()
    """files, folders or globs instead of a data set: .txt .md .py, and .jsonl .json .csv .tsv .parquet, of which every
    row is a document; each also .gz or .zst"""
    out: Path = Path("data")
    """folder to write"""
    overwrite: bool = False
    """replace the data in that folder"""
    text_column: str = "text"
    """column that holds the text, in tables and on the Hub"""
    config: str | None = None
    """of a data set org/name: its configuration"""
    split: str = "train"
    """of a data set org/name: the split to read"""
    revision: str | None = None
    """of a data set org/name: branch, tag or commit"""
    vocab_size: int | None = None
    """train a byte-level BPE of this many tokens on the training text (its first 200 million characters); without it,
    GPT-2's tokenizer"""
    tokenizer: Path | None = None
    """use this tokenizer.json, such as the one beside the data of a model that is to be trained further"""
    val_fraction: float = 0.1
    """share of the documents held out; of fewer than 20, the last part of each. openwebtext has nanoGPT's split,
    fineweb-edu holds out its first shard"""
    max_tokens: int | None = None
    """stop after this many tokens, those held out included"""
    shard_tokens: int | None = None
    """write files of this many tokens, train_000001.bin and so on; fineweb-edu: 100 million, else one file a split"""
    workers: int | None = None
    """tokenize in this many threads; without it, one a core. The output is the same for any number"""
    seed: int = 1337
    """of the choice of held-out documents"""
    inspect: Path | None = None
    """write nothing; say what the token files in this folder hold"""

    def __post_init__(self):
        on_hub = not self.input and "/" in self.dataset
        require(
            on_hub or self.dataset in DATASETS,
            f"no data set {self.dataset!r}: choose from {', '.join(DATASETS)}, or name one of the Hub's as org/name",
        )
        require(
            on_hub or (self.config, self.split, self.revision) == (None, "train", None),
            "--config, --split and --revision belong to data sets of the Hub, named org/name",
        )
        require(1e-6 <= self.val_fraction <= 0.5, "--val-fraction must be at least 0.000001 and at most 0.5")
        require(
            self.vocab_size is None or 256 < self.vocab_size <= 65_000,
            "--vocab-size must lie between 257 and 65000: 256 bytes and what is merged from them, in 16 bits",
        )
        require(not (self.vocab_size and self.tokenizer), "--vocab-size and --tokenizer exclude each other")
        require_at_least(1, self, "max_tokens", "shard_tokens", "workers")


def main(config: Config) -> None:
    """Prepares one corpus."""
    from system.files import claim_folder
    from text import tokenizer as tokenizers
    from text.preparation import write_corpus
    from text.token_files import count_tokens, report

    if config.inspect:
        print(report(*count_tokens(config.inspect), config.inspect))
        return
    claim_folder(config.out, "train*.bin", config.overwrite)
    corpus = open_corpus(config)
    if config.vocab_size:
        tokenizer = tokenizers.train_bpe(training_text(pieces(corpus, config)), config.vocab_size)
    else:
        tokenizer = tokenizers.load(config.tokenizer) if config.tokenizer else tokenizers.gpt2()
    counts = write_corpus(
        pieces(corpus, config),
        corpus,
        tokenizer,
        config.out,
        {"source": list(config.input) or config.dataset},
        workers=config.workers or available_cores(),
        shard_tokens=config.shard_tokens or (100_000_000 if first_shard_val(config) else None),
        max_tokens=config.max_tokens,
        first_shard_val=first_shard_val(config),
    )
    print(report(counts, tokenizer, config.out))
    for line in corpus.notes.lines():
        print(line)
    print(f"wrote {config.out}, tokenizer {tokenizer.name}")


def open_corpus(config: Config):
    """Returns the documents that a config names, a `Corpus`."""
    from text import corpora, readers

    if config.input:
        return corpora.Files(config.input, config.text_column)
    if config.dataset == "pydocs":
        from text import pydocs

        return corpora.Texts(pydocs.documents())
    if config.dataset in readers.DOWNLOADS:
        return corpora.Files([readers.download(config.dataset, corpora.INSTEAD)])
    if config.dataset == "openwebtext":
        return corpora.OpenWebText()
    if config.dataset == "fineweb-edu":
        return corpora.Hub("HuggingFaceFW/fineweb-edu", "sample-10BT")
    return corpora.Hub(config.dataset, config.config, config.split, config.revision, config.text_column)


def first_shard_val(config: Config) -> bool:
    """Whether the first shard is held out, as is the custom with FineWeb-Edu, instead of a share of the documents."""
    return config.dataset == "fineweb-edu" and not config.input


def pieces(corpus, config: Config) -> Iterator[tuple[str, str, bool]]:
    """Yields the corpus in pieces: split, text, whether a document ends with it."""
    from text.corpora import OpenWebText, hold_out
    from text.preparation import in_pieces

    if isinstance(corpus, OpenWebText):
        rows = zip(corpus, corpus.is_val(), strict=True)
        documents = (("val" if is_val else "train", document) for document, is_val in rows)
    elif first_shard_val(config):
        documents = (("train", document) for document in corpus)
    else:
        documents = hold_out(corpus, config.val_fraction, config.seed)
    for split, document in documents:
        is_empty = True
        for text, ends in in_pieces(document):
            is_empty = is_empty and not text
            if not is_empty:
                yield split, text, ends


def training_text(parts: Iterable[tuple[str, str, bool]]) -> Iterator[str]:
    """Yields the text to train a tokenizer on."""
    left = BPE_CHARACTERS
    for text in (text for split, text, _ in parts if split == "train"):
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    run(main, Config)
