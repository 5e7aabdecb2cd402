"""Where conversations come from: the Hub, files of chats or instructions, Python's own documentation."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from cli import UserError
from files import read_text
from tokenizer import Message


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
    """Yields the conversations of a .json (a list) or .jsonl file (one object a line).

    An object holds `messages` as OpenAI and the Hub write them, or Alpaca's `instruction`, `input` and `output`.
    Raises UserError, naming the place, for anything else.
    """
    text = read_text(path)
    try:
        if text.lstrip().startswith("["):
            numbered = enumerate(json.loads(text), 1)
        else:
            numbered = ((i, json.loads(line)) for i, line in enumerate(text.splitlines(), 1) if line.strip())
        for i, record in numbered:
            where = f"{path}, record {i}"
            if isinstance(record, dict) and "instruction" in record:
                record = {
                    "messages": [
                        {"role": "user", "content": record["instruction"], "input": record.get("input") or ""},
                        {"role": "assistant", "content": record.get("output")},
                    ]
                }
            if not isinstance(record, dict) or "messages" not in record:
                raise UserError(f"{where}: wanted an object with `messages`, or with `instruction` and `output`")
            yield check_messages(record["messages"], where)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON or JSON lines: {error}") from None


def load_oasst1() -> Iterator[tuple[str, list[Message]]]:
    """Yields OpenAssistant's English conversations with the Hub's own split."""
    from datasets import load_dataset

    try:
        splits = load_dataset("OpenAssistant/oasst1")
    except Exception as error:  # whatever the Hub's client raises without a network
        raise UserError(
            f"cannot load oasst1 from the Hugging Face Hub ({type(error).__name__}); without a network, "
            "--dataset pydocs-qa and --input FILE work"
        ) from None
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
