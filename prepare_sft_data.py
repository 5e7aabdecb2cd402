"""Step 4: conversations → tokens with loss masks. Writes sft_*.bin and sft_meta.json, which train_sft.py reads."""

import random
import shlex
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from system.cli import run
from system.errors import UserError, require

Conversations = Iterable[tuple[str, list[dict]]]
"""Pairs of a split, "train" or "val", and a conversation: a list of messages."""


@dataclass(frozen=True)
class Config:
    dataset: str = "oasst1"
    """oasst1 (human conversations), alpaca-gpt4 (instructions), pydocs-qa (questions about Python and small talk, no
    download), or a data set of the Hugging Face Hub as org/name, with columns as --input has them"""
    input: Path | None = None
    """a .json, .jsonl or .parquet file instead, perhaps .gz or .zst: chat `messages`, or Alpaca's instruction, input
    and output"""
    out: Path = Path("data")
    """folder to write"""
    overwrite: bool = False
    """replace the conversations in that folder"""
    template: Literal["chat", "alpaca"] = "chat"
    """how turns are marked in the text"""
    tokenizer: Path | None = None
    """a tokenizer.json; without it, that of the data in --out, else GPT-2's"""
    block_size: int = 1024
    """longest conversation in tokens (the model's context): longer ones lose their oldest exchanges"""
    max_conversations: int | None = None
    """stop after so many conversations (of pydocs-qa the chats and built-ins come first)"""
    val_fraction: float = 0.05
    """share of the conversations held out (oasst1 has its own split)"""
    seed: int = 1337
    """of the choice of held-out conversations"""

    def __post_init__(self):
        require(
            self.dataset in ("oasst1", "alpaca-gpt4", "pydocs-qa") or "/" in self.dataset,
            f"no data set {self.dataset!r}: choose oasst1, alpaca-gpt4, pydocs-qa, or one of the Hub's as org/name",
        )
        require(1e-6 <= self.val_fraction <= 0.5, "--val-fraction must be at least 0.000001 and at most 0.5")
        require(self.block_size >= 2, "--block-size must be at least 2")
        require(self.max_conversations is None or self.max_conversations >= 2, "--max-conversations must be at least 2")


def main(config: Config) -> None:
    """Prepares one set of conversations."""
    from system.files import claim_folder
    from text.readers import Notes

    claim_folder(config.out, "sft_train.bin", config.overwrite)
    tokenizer = choose_tokenizer(config)
    notes = Notes()
    meta = write_conversations(source(config, notes), tokenizer, config, notes)
    for split, counts in meta["splits"].items():
        print(
            f"{split}: {counts['conversations']:,} conversations, {counts['tokens']:,} tokens, "
            f"{counts['counted']:,} of them the assistant's"
        )
    for line in notes.lines():
        print(line)
    print(f"wrote {config.out}, tokenizer {tokenizer.name}, template {config.template}")


def choose_tokenizer(config: Config):
    """Returns the tokenizer to use: the one named, else that of the pre-training data in `out`, else GPT-2's."""
    from text import tokenizer as tokenizers
    from text.token_files import read_meta

    meta = config.out / "meta.json"
    if config.tokenizer:
        return tokenizers.load(config.tokenizer)
    return (
        tokenizers.load_beside(config.out, read_meta(meta, "prepare_data.py")) if meta.exists() else tokenizers.gpt2()
    )


def source(config: Config, notes) -> Conversations:
    """Returns the conversations of a data set or a file, with their splits; what is left out goes into `notes`."""
    from text import conversations
    from text.corpora import draw_held_out

    if config.input is None and config.dataset == "oasst1":
        return islice(conversations.load_oasst1(config.val_fraction, config.seed, notes), config.max_conversations)
    if config.input:
        found = conversations.read_file(config.input, notes)
    elif config.dataset == "pydocs-qa":
        found = conversations.pydocs_qa(notes)
    else:
        name = "vicgalle/alpaca-gpt4" if config.dataset == "alpaca-gpt4" else config.dataset
        found = conversations.from_hub(name, notes)
    found = list(islice(found, config.max_conversations))
    if len(found) < 2:
        raise UserError(
            f"{config.input or config.dataset} holds fewer than two conversations to learn from: one to train on, "
            f"one to validate on{notes.in_brackets()}"
        )
    split = list(draw_held_out(found, max(config.val_fraction, 1 / len(found)), config.seed))
    return split + (in_a_row(split, config.seed) if config.input is None and config.dataset == "pydocs-qa" else [])


def in_a_row(split: list, seed: int) -> list:
    """Joins the short training exchanges to longer conversations, since people ask one thing after another.

    Each stands once in four random rows of two or three, so that its answer is learnt from its question and not from
    what came before.
    """
    rng, rows = random.Random(seed), []
    exchanges = [messages for name, messages in split if name == "train"]
    for n in (2, 3, 2, 3):
        rng.shuffle(exchanges)
        rows += [("train", sum(exchanges[i : i + n], [])) for i in range(0, len(exchanges), n)]
    return rows


def write_conversations(conversations: Conversations, tokenizer, config: Config, notes) -> dict:
    """Writes tokens, loss masks and offsets of the conversations; returns what it wrote into sft_meta.json.

    The files appear together at the end; whatever happens before, the old ones stay as they were.
    """
    import numpy as np
    from tqdm import tqdm

    from system.files import atomic_folder, write_json
    from text.templates import encode_conversation

    splits = {name: {"conversations": 0, "tokens": 0, "counted": 0} for name in ("train", "val")}
    with atomic_folder(config.out, last="sft_meta.json") as folder, ExitStack() as stack:
        names = {split: [f"sft_{split}{part}.bin" for part in ("", "_mask", "_index")] for split in splits}
        files = {split: [stack.enter_context(open(folder / name, "wb")) for name in names[split]] for split in splits}
        for i, (split, messages) in enumerate(tqdm(conversations, unit=" conversations", desc="tokenizing"), 1):
            ids, mask = encode_conversation(messages, tokenizer, config.template)
            if len(ids) > config.block_size:
                ids, mask = encode_conversation(messages, tokenizer, config.template, config.block_size)
                what = "lost their oldest turns" if ids else "were dropped, since one exchange alone is as long"
                notes.add(f"conversations longer than {config.block_size:,} tokens {what}", f"conversation {i:,}")
            if ids:
                counts, (tokens_file, mask_file, index_file) = splits[split], files[split]
                index_file.write(np.array([counts["tokens"]], "<u8").tobytes())
                tokens_file.write(np.array(ids, "<u2").tobytes())
                mask_file.write(np.array(mask, "u1").tobytes())
                for key, count in (("conversations", 1), ("tokens", len(ids)), ("counted", sum(mask))):
                    counts[key] += count
        for split, counts in splits.items():
            files[split][2].write(np.array([counts["tokens"]], "<u8").tobytes())
        stack.close()
        if not splits["train"]["conversations"]:
            raise UserError(f"there is no conversation to train on{notes.in_brackets()}")
        meta = {
            "files": sum(names.values(), []),
            "tokenizer": tokenizer.name,
            "template": config.template,
            "block_size": config.block_size,
            "splits": splits,
            "notes": notes.plain(),
            "source": str(config.input or config.dataset),
            "command": shlex.join(["python", *sys.argv]),
            "format_version": 1,
        }
        write_json(folder / "sft_meta.json", meta)
    return meta


if __name__ == "__main__":
    run(main, Config)
