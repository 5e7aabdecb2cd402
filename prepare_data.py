"""Step 1: text → tokens. Writes train.bin, val.bin (or shards) and meta.json, which train.py reads."""

from dataclasses import dataclass
from pathlib import Path

from system.cli import run
from system.errors import require, require_at_least

DATASETS = ("openwebtext", "fineweb-edu", "shakespeare", "war-and-peace", "pydocs")


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
    from text.corpora import open_corpus, training_text
    from text.preparation import write_corpus
    from text.token_files import count_tokens, report
    from text.tokenizer import gpt2, load_tokenizer, train_bpe

    if config.inspect:
        print(report(*count_tokens(config.inspect), config.inspect))
        return
    claim_folder(config.out, "train*.bin", config.overwrite)
    corpus = open_corpus(config.dataset, config.input, config.text_column, config.config, config.split, config.revision)
    if config.vocab_size:
        pieces = corpus.pieces(config.val_fraction, config.seed)
        tokenizer = train_bpe(training_text(pieces), config.vocab_size)
    else:
        tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else gpt2()
    counts = write_corpus(
        corpus,
        tokenizer,
        config.out,
        source=list(config.input) or config.dataset,
        val_fraction=config.val_fraction,
        seed=config.seed,
        workers=config.workers,
        shard_tokens=config.shard_tokens,
        max_tokens=config.max_tokens,
    )
    print(report(counts, tokenizer, config.out))
    for line in corpus.notes.lines():
        print(line)
    print(f"wrote {config.out}, tokenizer {tokenizer.name}")


if __name__ == "__main__":
    run(main, Config)
