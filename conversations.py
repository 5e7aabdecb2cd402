"""Where conversations come from: the Hub, files of chats or instructions, Python's own documentation."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from cli import UserError
from corpora import draw_held_out
from sources import hub_rows, load_hub, opened, records
from tokenizer import Message

_INSTEAD = "--dataset pydocs-qa and --input FILE work"


def pydocs_qa() -> Iterator[list[Message]]:
    """Yields the bundled conversations and questions about Python's built-ins, then about the standard library."""
    import pydocs

    def ask(pairs):
        return (
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for question, answer in pairs
        )

    samples = Path(__file__).parent / "data" / "samples" / "chat.jsonl"
    built_in = dict(pydocs.questions(builtins_only=True))
    others = ((question, answer) for question, answer in pydocs.questions() if question not in built_in)
    return chain(read_file(samples), ask(built_in.items()), ask(others))


def read_file(path: Path) -> Iterator[list[Message]]:
    """Yields the conversations of a .json (a list), .jsonl (one object a line) or .parquet file, perhaps compressed.

    Raises UserError, naming the place, for what is no conversation.
    """
    with opened(path) as (_, stream):
        for where, record in records(path, stream):
            yield from_record(record, where)


def from_hub(name: str) -> Iterator[list[Message]]:
    """Yields the conversations in the split "train" of a data set of the Hub. Raises UserError as `read_file` does."""
    rows, _ = load_hub(name, _INSTEAD, split="train")
    for where, record in hub_rows(name, rows):
        yield from_record(record, where)


def from_record(record: object, where: str) -> list[Message]:
    """Returns the conversation in a record: `messages` as OpenAI and the Hub write them, or Alpaca's columns.

    Alpaca's are `instruction`, `input` and `output`. Raises UserError, naming `where`, for anything else.
    """
    if isinstance(record, dict) and "instruction" in record:
        question = {"role": "user", "content": record["instruction"], "input": record.get("input") or ""}
        return check_messages([question, {"role": "assistant", "content": record.get("output")}], where)
    if not isinstance(record, dict) or "messages" not in record:
        raise UserError(f"{where}: wanted an object with `messages`, or with `instruction` and `output`")
    return check_messages(record["messages"], where)


def load_oasst1(val_fraction: float, seed: int) -> Iterator[tuple[str, list[Message]]]:
    """Yields OpenAssistant's English conversations with the Hub's own split, or split by tree where it has none."""
    splits, _ = load_hub("OpenAssistant/oasst1", _INSTEAD)

    def trees(split):
        return oasst1_trees(row for _, row in hub_rows("OpenAssistant/oasst1", splits[split]))

    if "validation" in splits:
        split_trees = chain((("train", tree) for tree in trees("train")), (("val", t) for t in trees("validation")))
    else:
        split_trees = draw_held_out(trees("train"), val_fraction, seed)
    return ((name, conversation) for name, tree in split_trees for conversation in tree)


def oasst1_trees(rows: Iterable[dict]) -> Iterator[list[list[Message]]]:
    """Yields for each of OpenAssistant's message trees the paths from its question down the top-ranked replies.

    Kept are English messages that were neither deleted nor labelled as spam, by half of the reviewers or more (Köpf et
    al. 2023).
    """
    children = defaultdict(list)
    for row in rows:
        labels = dict(zip(row["labels"]["name"], row["labels"]["value"], strict=True)) if row.get("labels") else {}
        if row["lang"] == "en" and not row["deleted"] and labels.get("spam", 0.0) < 0.5:
            children[row["parent_id"]].append(row)

    def paths(row, before):
        role = "user" if row["role"] == "prompter" else "assistant"
        path = [*before, {"role": role, "content": row["text"]}]
        replies = [reply for reply in children[row["message_id"]] if reply["role"] != row["role"]]
        if role == "user":  # rank 0 is the reply that people liked best
            replies = sorted(replies, key=lambda reply: 1 << 30 if reply["rank"] is None else reply["rank"])[:1]
        onward = [path_ for reply in replies for path_ in paths(reply, path)]
        return onward or ([path] if role == "assistant" else [path[:-1]] if len(path) > 2 else [])

    for root in children[None]:
        if root["role"] == "prompter" and (found := {json.dumps(path): path for path in paths(root, [])}):
            yield list(found.values())


def check_messages(messages: object, where: str) -> list[Message]:
    """Returns a conversation in our form: user and assistant alternate, from a user's turn to an assistant's.

    A leading system message is put before the first user's text, since the template has no such role; a user's turn
    without an answer at the end is dropped. Raises UserError, naming `where`, for anything else.
    """

    def bad(what):
        return UserError(f"{where}: {what}")

    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise bad("wanted a list of messages, each with the strings 'role' and 'content'")
    system = ""
    if messages and messages[0]["role"] == "system":
        system, messages = messages[0]["content"].strip() + "\n\n", messages[1:]
    if messages and messages[-1]["role"] == "user":
        messages = messages[:-1]
    if not messages:
        raise bad("no question with an answer")
    for i, message in enumerate(messages):
        if message["role"] != ("user", "assistant")[i % 2]:
            raise bad(f"turn {i + 1} is by {message['role']!r}: user and assistant must take turns, the user first")
    if not any(message["content"].strip() for message in messages[1::2]):
        raise bad("the assistant says nothing")
    return [{**messages[0], "content": system + messages[0]["content"]}, *messages[1:]]
