"""Step 4: conversations → tokens with loss masks. Writes sft_*.bin and sft_meta.json, which train_sft.py reads."""

import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from cli import UserError, require, run

Message = dict[str, str]
Conversations = Iterable[tuple[str, list[Message]]]
"""Pairs of a split, "train" or "val", and a conversation."""


@dataclass(frozen=True)
class Config:
    dataset: Literal["oasst1", "pydocs-qa"] = "oasst1"
    """oasst1: human conversations from the Hub; pydocs-qa: questions about Python and small talk, no download"""
    input: Path | None = None
    """a .json or .jsonl file instead: chat `messages`, or Alpaca's instruction, input and output"""
    out: Path = Path("data")
    """folder to write"""
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
        require(0 < self.val_fraction < 1, "--val-fraction must lie between 0 and 1")
        require(self.block_size >= 2, "--block-size must be at least 2")
        require(self.max_conversations is None or self.max_conversations >= 2, "--max-conversations must be at least 2")


def main(config: Config) -> None:
    """Prepares one set of conversations."""
    tokenizer = choose_tokenizer(config)
    conversations = source(config)
    meta = write_conversations(conversations, tokenizer, config)
    for split, counts in meta["splits"].items():
        print(f"{split}: {counts['conversations']:,} conversations, {counts['tokens']:,} tokens, "
              f"{counts['counted']:,} of them the assistant's")
    if meta["shortened"] or meta["dropped"]:
        print(f"longer than {config.block_size} tokens: {meta['shortened']:,} lost their oldest turns, "
              f"{meta['dropped']:,} were left out")
    print(f"wrote {config.out}, tokenizer {tokenizer.name}, template {config.template}")


def choose_tokenizer(config: Config):
    """Returns the tokenizer to use: the one named, else that of the pre-training data in `out`, else GPT-2's."""
    import tokenizer as tokenizers
    from files import read_meta

    path = config.tokenizer
    if path is None and (config.out / "meta.json").exists():
        if "tokenizer.json" in read_meta(config.out / "meta.json", "prepare_data.py")["files"]:
            path = config.out / "tokenizer.json"
    return tokenizers.load(path) if path else tokenizers.gpt2()


def source(config: Config) -> Conversations:
    """Returns the conversations of a dataset or a file, with their splits."""
    if config.input is None and config.dataset == "oasst1":
        return islice(load_oasst1(), config.max_conversations)
    from prepare_data import draw_held_out
    conversations = list(islice(pydocs_qa() if config.input is None else read_file(config.input), config.max_conversations))
    if len(conversations) < 2:
        raise UserError(f"{config.input} holds fewer than two conversations: one to train on, one to validate with")
    return draw_held_out(conversations, max(config.val_fraction, 1 / len(conversations)), config.seed)


def pydocs_qa() -> Iterator[list[Message]]:
    """Yields the bundled conversations and questions about Python's built-ins, then about the standard library."""
    import pydocs

    def ask(pairs):
        return ([{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for question, answer in pairs)

    samples = Path(__file__).parent / "data" / "samples" / "chat.jsonl"
    built_in = dict(pydocs.questions(builtins_only=True))
    others = ((question, answer) for question, answer in pydocs.questions() if question not in built_in)
    return chain(read_file(samples), ask(built_in.items()), ask(others))


def read_file(path: Path) -> Iterator[list[Message]]:
    """Yields the conversations of a .json (a list) or .jsonl file (one object a line).

    An object holds `messages` as OpenAI and the Hub write them, or Alpaca's `instruction`, `input` and `output`.
    Raises UserError, naming the place, for anything else.
    """
    from files import read_text
    from tokenizer import check_messages

    text = read_text(path)
    try:
        if text.lstrip().startswith("["):
            numbered = enumerate(json.loads(text), 1)
        else:
            numbered = ((i, json.loads(line)) for i, line in enumerate(text.splitlines(), 1) if line.strip())
        for i, record in numbered:
            where = f"{path}, record {i}"
            if isinstance(record, dict) and "instruction" in record:
                record = {"messages": [
                    {"role": "user", "content": record["instruction"], "input": record.get("input") or ""},
                    {"role": "assistant", "content": record.get("output")}]}
            if not isinstance(record, dict) or "messages" not in record:
                raise UserError(f"{where}: wanted an object with `messages`, or with `instruction` and `output`")
            yield check_messages(record["messages"], where)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON or JSON lines: {error}") from None


def load_oasst1() -> Conversations:
    """Yields OpenAssistant's English conversations with the Hub's own split."""
    from datasets import load_dataset
    try:
        splits = load_dataset("OpenAssistant/oasst1")
    except Exception as error:  # noqa: BLE001  whatever the Hub's client raises without a network
        raise UserError(f"cannot load oasst1 from the Hugging Face Hub ({type(error).__name__}); without a network, "
                        "--dataset pydocs-qa and --input FILE work") from None
    for split, name in (("train", "train"), ("validation", "val")):
        for conversation in oasst1_conversations(splits[split]):
            yield name, conversation


def oasst1_conversations(rows: Iterable[dict]) -> Iterator[list[Message]]:
    """Yields every path from a root question down the top-ranked replies of OpenAssistant's message trees.

    Kept are English messages that were not deleted (Köpf et al. 2023).
    """
    children = defaultdict(list)
    for row in rows:
        if row["lang"] == "en" and not row["deleted"]:
            children[row["parent_id"]].append(row)

    def paths(row, before):
        role = "user" if row["role"] == "prompter" else "assistant"
        path = [*before, {"role": role, "content": row["text"]}]
        replies = children[row["message_id"]]
        if role == "user":  # rank 0 is the reply that people liked best
            replies = sorted(replies, key=lambda reply: 1 << 30 if reply["rank"] is None else reply["rank"])[:1]
        onward = [path_ for reply in replies for path_ in paths(reply, path)]
        return onward or ([path] if role == "assistant" else [path[:-1]] if len(path) > 2 else [])

    for root in children[None]:
        if root["role"] == "prompter":
            unique = {json.dumps(path): path for path in paths(root, [])}
            yield from unique.values()


def write_conversations(conversations: Conversations, tokenizer, config: Config) -> dict:
    """Writes tokens, loss masks and offsets of the conversations; returns what it wrote into sft_meta.json.

    The files appear together at the end; whatever happens before, the old ones stay as they were.
    """
    import numpy as np
    from tqdm import tqdm

    from files import atomic_folder, write_json
    from tokenizer import encode_conversation

    splits = {name: {"conversations": 0, "tokens": 0, "counted": 0} for name in ("train", "val")}
    shortened = dropped = 0
    with atomic_folder(config.out, last="sft_meta.json") as folder:
        names = {split: [f"sft_{split}{part}.bin" for part in ("", "_mask", "_index")] for split in splits}
        files = {split: [open(folder / name, "wb") for name in names[split]] for split in splits}
        for split, messages in tqdm(conversations, unit=" conversations", desc="tokenizing"):
            ids, mask = encode_conversation(messages, tokenizer, config.template)
            if len(ids) > config.block_size:
                ids, mask = encode_conversation(messages, tokenizer, config.template, config.block_size)
                shortened, dropped = shortened + bool(ids), dropped + (not ids)
            if ids:
                counts, (tokens_file, mask_file, index_file) = splits[split], files[split]
                index_file.write(np.array([counts["tokens"]], "<u8").tobytes())
                tokens_file.write(np.array(ids, "<u2").tobytes())
                mask_file.write(np.array(mask, "u1").tobytes())
                for key, count in (("conversations", 1), ("tokens", len(ids)), ("counted", sum(mask))):
                    counts[key] += count
        for split, counts in splits.items():
            files[split][2].write(np.array([counts["tokens"]], "<u8").tobytes())
            for file in files[split]:
                file.close()
        if not splits["train"]["conversations"]:
            raise UserError("there is no conversation to train on")
        meta = {"files": sum(names.values(), []), "tokenizer": tokenizer.name, "template": config.template,
                "block_size": config.block_size, "splits": splits, "shortened": shortened, "dropped": dropped,
                "source": str(config.input or config.dataset), "command": shlex.join(["python", *sys.argv]),
                "format_version": 1}
        write_json(folder / "sft_meta.json", meta)
    return meta


if __name__ == "__main__":
    run(main, Config)
