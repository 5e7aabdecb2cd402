"""Step 4: conversations → tokens with loss masks. Writes sft_*.bin and sft_meta.json, which train_sft.py reads."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path.insert(0, str(Path(__file__).parent))  # `python -I` leaves this folder out

from system.cli import run
from system.errors import require
from text.registry import CONVERSATIONS, listed

if TYPE_CHECKING:
    from text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    dataset: str = "oasst1"
    """oasst1, alpaca-gpt4, builtins-qa and pydocs-qa (no download), or a data set of the Hugging Face Hub as org/name,
    with the columns of --input"""
    input: Path | None = None
    """a .jsonl, .json, .csv, .tsv or .parquet file instead, perhaps compressed (.gz or .zst): each row has chat
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
    wordings"""
    seed: int = 1337
    """seed that draws the held-out conversations"""

    def __post_init__(self) -> None:
        require(
            self.dataset in CONVERSATIONS or "/" in self.dataset,
            f"no data set {self.dataset!r}: choose {listed(CONVERSATIONS)}, or name one of the Hub as org/name",
        )
        require(
            self.val_fraction is None or self.val_fraction == 0 or 1e-6 <= self.val_fraction <= 0.5,
            "--val-fraction must be 0, or at least 0.000001 and at most 0.5",
        )
        require(self.block_size >= 2, "--block-size must be at least 2")
        require(self.max_conversations is None or self.max_conversations >= 2, "--max-conversations must be at least 2")


def main(config: Config, tokenizer: "Tokenizer | None" = None) -> None:
    """Prepares one set of conversations. A `tokenizer` takes the place of the one that the config names."""
    from system.files import require_no_files
    from text.conversations import open_conversations
    from text.preparation import write_conversations
    from text.readers import Notes
    from text.token_files import read_meta
    from text.tokenizer import gpt2, tokenizer_of_data

    require_no_files(config.out, ["sft_*.bin", "sft_meta.json"], config.overwrite)
    if config.tokenizer:
        from weights.loading import load_tokenizer  # imports torch: a second

        tokenizer = load_tokenizer(config.tokenizer)
    elif tokenizer is None and (config.out / "meta.json").exists():
        tokenizer = tokenizer_of_data(config.out, read_meta(config.out / "meta.json", "prepare_data.py"))
    tokenizer = tokenizer or gpt2()
    notes = Notes()
    conversations = open_conversations(
        config.dataset,
        config.input,
        config.max_conversations,
        config.val_fraction,
        config.seed,
        notes,
        are_chats=config.template == "chat",
    )
    meta = write_conversations(
        conversations,
        tokenizer,
        config.out,
        source=str(config.input or config.dataset),
        template=config.template,
        block_size=config.block_size,
        notes=notes,
    )
    for split, counts in meta["splits"].items():
        print(
            f"{split}: {counts['conversations']:,} conversations, {counts['tokens']:,} tokens, "
            f"{counts['counted']:,} of them in the assistant's answers"
        )
    if not meta["is_held_out"]:
        print(
            "all conversations are trained on, and the validation loss is theirs "
            "(prepare_sft_data.py --val-fraction holds some out)"
        )
        if n_joined := meta["splits"]["train"]["conversations"] - meta["splits"]["val"]["conversations"]:
            print(f"{n_joined:,} more join two or three of them: chats go on after the first answer")
    for line in notes.lines():
        print(line)
    print(f"wrote {config.out}, tokenizer {tokenizer.name}, template {config.template}")


if __name__ == "__main__":
    run(main, Config)
