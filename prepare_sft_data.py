"""Step 4: conversations → tokens with loss masks. Writes sft_*.bin and sft_meta.json, which train_sft.py reads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from system.cli import run
from system.errors import require
from text.sources import CONVERSATIONS


@dataclass(frozen=True)
class Config:
    dataset: str = "oasst1"
    """oasst1, alpaca-gpt4, builtins-qa and pydocs-qa (no download), or a data set of the Hugging Face Hub as org/name,
    with the columns of --input"""
    input: str | None = None
    """a .jsonl, .json, .csv, .tsv or .parquet file, or its URL, perhaps compressed (.gz or .zst): each row has chat
    `messages`, or a question (column prompt, question or instruction, and perhaps input) and its answer (response,
    answer, output or completion)"""
    out: Path = Path("data")
    """output folder"""
    overwrite: bool = False
    """replace the conversations in the output folder"""
    template: Literal["chat", "alpaca"] = "chat"
    """how the text marks turns"""
    tokenizer: Path | None = None
    """the checkpoint whose tokenizer to use, or a tokenizer.json; by default the tokenizer of the data in --out, or
    GPT-2's if there is no data"""
    block_size: int = 1024
    """longest conversation in tokens (the model's context): longer ones lose their oldest exchanges"""
    max_conversations: int | None = None
    """stop after this many conversations; for builtins-qa and pydocs-qa, after this many answers, each of which is in
    many conversations"""
    val_fraction: float | None = None
    """share of the conversations to hold out, by default 0.05. With 0, and by default if there are fewer than 100, all
    are trained on, and the validation loss is theirs. oasst1 has its own split; builtins-qa and pydocs-qa hold out
    paraphrases"""
    seed: int = 1337
    """seed that draws the held-out conversations"""

    def __post_init__(self) -> None:
        require(
            self.dataset in CONVERSATIONS or "/" in self.dataset,
            f"no data set {self.dataset!r}: choose {', '.join(CONVERSATIONS)}, or name one of the Hub as org/name",
        )
        require(
            self.val_fraction is None or self.val_fraction == 0 or 1e-6 <= self.val_fraction <= 0.5,
            "--val-fraction must be 0, or at least 0.000001 and at most 0.5",
        )
        require(self.block_size >= 2, "--block-size must be at least 2")
        require(self.max_conversations is None or self.max_conversations >= 2, "--max-conversations must be at least 2")


def main(config: Config) -> None:
    """Prepares one set of conversations, and prints what was written."""
    from text.conversations import prepare_conversations
    from text.token_files import read_meta
    from text.tokenizer import gpt2, tokenizer_of_data

    tokenizer = gpt2()
    if config.tokenizer:
        from weights.loading import load_tokenizer  # imports torch: a second

        tokenizer = load_tokenizer(config.tokenizer)
    elif (config.out / "meta.json").exists():
        tokenizer = tokenizer_of_data(config.out, read_meta(config.out / "meta.json", "prepare_data.py"))
    lines = prepare_conversations(
        config.dataset,
        config.input,
        tokenizer,
        config.out,
        template=config.template,
        block_size=config.block_size,
        max_conversations=config.max_conversations,
        val_fraction=config.val_fraction,
        seed=config.seed,
        overwrite=config.overwrite,
    )
    print(*lines, sep="\n")


if __name__ == "__main__":
    run(main, Config)
