"""Step 1: text → tokens. Writes train.bin, val.bin (or shards) and meta.json, which train.py reads."""

from dataclasses import dataclass
from pathlib import Path

from system.cli import run
from system.errors import require, require_at_least
from text.sources import TEXTS


@dataclass(frozen=True)
class Config:
    dataset: str = "openwebtext"
    """openwebtext, fineweb-edu, climbmix, tinystories, shakespeare, war-and-peace, pydocs (no download), or a data set
    of the Hugging Face Hub as org/name"""
    input: tuple[str, ...] = ()
    """files, folders or globs, also as URLs (https://, s3://, gs://, hf://), instead of a data set: .txt .md .py, or
    tables .jsonl .json .csv .tsv .parquet, in which every row is a document; all may be compressed, .gz or .zst"""
    out: Path = Path("data")
    """output folder"""
    overwrite: bool = False
    """replace the data in the output folder"""
    text_column: str = "text"
    """column that holds the text, in tables and on the Hub"""
    config: str | None = None
    """for a data set org/name: its configuration"""
    split: str = "train"
    """for a data set org/name: the split to read"""
    revision: str | None = None
    """for a data set org/name: branch, tag or commit"""
    vocab_size: int | None = None
    """train a byte-level BPE of this many tokens on the text, instead of using GPT-2's tokenizer"""
    tokenizer: Path | None = None
    """use the tokenizer of this checkpoint, or this tokenizer.json"""
    val_fraction: float = 0.1
    """share of the text to hold out for validation: random documents, or the end of each if there are fewer than 20.
    openwebtext has nanoGPT's split and tinystories its own; fineweb-edu and climbmix hold out their first shard"""
    max_tokens: int | None = None
    """stop after this many tokens, training and validation together"""
    shard_tokens: int | None = None
    """write shards of this many tokens (train_000001.bin and so on), and keep complete ones if the run is interrupted;
    default: 100 million for fineweb-edu and climbmix, otherwise one file per split"""
    workers: int | None = None
    """number of tokenizing threads, by default one per core; it does not change the output"""
    seed: int = 1337
    """seed that draws the held-out documents"""
    inspect: Path | None = None
    """write nothing; print what the token files in this folder hold"""

    def __post_init__(self) -> None:
        on_hub = not self.input and "/" in self.dataset
        require(
            on_hub or self.dataset in TEXTS,
            f"no data set {self.dataset!r}: choose {', '.join(TEXTS)}, or name one of the Hub as org/name",
        )
        has_hub_flags = (self.config, self.split, self.revision) != (None, "train", None)
        require(on_hub or not has_hub_flags, "--config, --split and --revision belong to data sets named org/name")
        require(1e-6 <= self.val_fraction <= 0.5, "--val-fraction must be at least 0.000001 and at most 0.5")
        require(not (self.vocab_size and self.tokenizer), "--vocab-size and --tokenizer exclude each other")
        require_at_least(1, self, "max_tokens", "shard_tokens", "workers")


def main(config: Config) -> None:
    """Prepares one corpus, and prints what its token files hold."""
    from text.corpus import open_corpus
    from text.prepare import prepare
    from text.token_files import inspect
    from text.tokenizer import gpt2

    if config.inspect:
        print(*inspect(config.inspect), sep="\n")
        return
    tokenizer = config.vocab_size or gpt2()
    if config.tokenizer:
        from weights.loading import load_tokenizer  # imports torch: a second

        tokenizer = load_tokenizer(config.tokenizer)
    lines = prepare(
        open_corpus(config.dataset, config.input, config.text_column, config.config, config.split, config.revision),
        tokenizer,
        config.out,
        val_fraction=config.val_fraction,
        seed=config.seed,
        workers=config.workers,
        shard_tokens=config.shard_tokens,
        max_tokens=config.max_tokens,
        overwrite=config.overwrite,
    )
    print(*lines, sep="\n")


if __name__ == "__main__":
    run(main, Config)
