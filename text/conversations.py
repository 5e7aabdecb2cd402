"""Where conversations come from: the Hub, files of chats or instructions, Python's own documentation."""

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from system.errors import UserError
from text import pydocs
from text.corpora import draw_held_out
from text.readers import Notes, hub_rows, load_hub, opened, records
from text.templates import Message

Conversation = list[Message]

_INSTEAD = "--dataset pydocs-qa and --input FILE work"


class Unusable(Exception):
    """A conversation that nothing can be learnt from; the message says what was done to such ones, in the plural."""


def open_conversations(
    dataset: str, path: Path | None, max_conversations: int | None, val_fraction: float, seed: int, notes: Notes
) -> Iterable[tuple[str, Conversation]]:
    """Returns the conversations of a file, or without `path` those of a data set, with their splits, "train" or "val".

    What is left out goes into `notes`. Raises UserError for fewer than two conversations.
    """
    if path is None and dataset == "oasst1":
        return islice(load_oasst1(val_fraction, seed, notes), max_conversations)
    if path:
        found = read_file(path, notes)
    elif dataset == "pydocs-qa":
        found = pydocs_qa(notes)
    else:
        found = from_hub("vicgalle/alpaca-gpt4" if dataset == "alpaca-gpt4" else dataset, notes)
    conversations = list(islice(found, max_conversations))
    if len(conversations) < 2:
        raise UserError(
            f"{path or dataset} holds fewer than two conversations to learn from: one to train on, one to validate "
            f"on{notes.in_brackets()}"
        )
    split = list(draw_held_out(conversations, max(val_fraction, 1 / len(conversations)), seed))
    if path is None and dataset == "pydocs-qa":
        joined = join_exchanges([conversation for name, conversation in split if name == "train"], seed)
        split += [("train", conversation) for conversation in joined]
    return split


def join_exchanges(exchanges: list[Conversation], seed: int) -> list[Conversation]:
    """Joins short conversations to longer ones, since users ask one thing after another.

    Each is part of four random conversations of two or three, so that its answer is learnt from its question and not
    from what came before.
    """
    rng, exchanges, joined = random.Random(seed), exchanges.copy(), []
    for n in (2, 3, 2, 3):
        rng.shuffle(exchanges)
        joined += [sum(exchanges[i : i + n], []) for i in range(0, len(exchanges), n)]
    return joined


def pydocs_qa(notes: Notes) -> Iterator[list[Message]]:
    """Yields the bundled conversations and questions about Python's built-ins, then about the standard library."""

    def ask(pairs):
        return (
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for question, answer in pairs
        )

    samples = Path(__file__).parent.parent / "data" / "samples" / "chat.jsonl"
    built_in = dict(pydocs.questions(builtins_only=True))
    others = ((question, answer) for question, answer in pydocs.questions() if question not in built_in)
    return chain(read_file(samples, notes), ask(built_in.items()), ask(others))


def read_file(path: Path, notes: Notes) -> Iterator[list[Message]]:
    """Yields the conversations of a .json (a list), .jsonl (one object a line) or .parquet file, perhaps compressed.

    What cannot be learnt from is dropped, and noted. Raises UserError, naming the place, for what is no conversation.
    """
    with opened(path) as (_, stream):
        yield from usable(records(path, stream), notes)


def from_hub(name: str, notes: Notes) -> Iterator[list[Message]]:
    """Yields the conversations in the split "train" of a data set of the Hub, as `read_file` does."""
    rows, _ = load_hub(name, _INSTEAD, split="train")
    yield from usable(hub_rows(name, rows), notes)


def usable(rows: Iterable[tuple[str, object]], notes: Notes) -> Iterator[list[Message]]:
    """Yields the conversations in records that come with their places: `messages` as OpenAI and the Hub write them, or
    Alpaca's `instruction`, `input` and `output`."""
    for where, record in rows:
        if isinstance(record, dict) and "instruction" in record:
            question = {"role": "user", "content": record["instruction"], "input": record.get("input") or ""}
            messages = [question, {"role": "assistant", "content": record.get("output")}]
        elif isinstance(record, dict) and "messages" in record:
            messages = record["messages"]
        else:
            raise UserError(f"{where}: wanted an object with `messages`, or with `instruction` and `output`")
        try:
            yield check_messages(messages, where, notes)
        except Unusable as reason:
            notes.add(str(reason), where)


def load_oasst1(val_fraction: float, seed: int, notes: Notes) -> Iterator[tuple[str, list[Message]]]:
    """Yields OpenAssistant's English conversations with the Hub's own split, or split by tree where it has none."""
    splits, _ = load_hub("OpenAssistant/oasst1", _INSTEAD)

    def trees(split):
        return oasst1_trees(hub_rows("OpenAssistant/oasst1", splits[split]), notes)

    if "validation" in splits:
        split_trees = chain((("train", tree) for tree in trees("train")), (("val", t) for t in trees("validation")))
    else:
        split_trees = draw_held_out(trees("train"), val_fraction, seed)
    return ((name, conversation) for name, tree in split_trees for conversation in tree)


def oasst1_trees(rows: Iterable[tuple[str, dict]], notes: Notes) -> Iterator[list[list[Message]]]:
    """Yields for each of OpenAssistant's message trees the paths from its question down the top-ranked replies.

    Kept are English messages that were neither deleted nor labelled as spam, by half of the reviewers or more (Köpf et
    al. 2023). What is left out is noted.
    """
    children = defaultdict(list)
    for where, row in rows:
        labels = dict(zip(row["labels"]["name"], row["labels"]["value"], strict=True)) if row.get("labels") else {}
        if row["lang"] != "en":
            notes.add("messages in other languages than English were left out", where)
        elif row["deleted"] or labels.get("spam", 0.0) >= 0.5:
            notes.add("messages that were deleted or marked as spam were left out", where)
        else:
            children[row["parent_id"]].append((where, row))

    def paths(row, before):
        role = "user" if row["role"] == "prompter" else "assistant"
        path = [*before, {"role": role, "content": row["text"]}]
        replies = [(where, reply) for where, reply in children[row["message_id"]] if reply["role"] != row["role"]]
        if role == "user" and replies:  # rank 0 is the reply that people liked best
            replies.sort(key=lambda reply: 1 << 30 if reply[1]["rank"] is None else reply[1]["rank"])
            for where, _ in replies[1:]:
                notes.add("answers that people liked less than another were left out", where)
            replies = replies[:1]
        onward = [path_ for _, reply in replies for path_ in paths(reply, path)]
        return onward or ([path] if role == "assistant" else [path[:-1]] if len(path) > 2 else [])

    for where, root in children[None]:
        if root["role"] == "prompter" and (found := {json.dumps(path): path for path in paths(root, [])}):
            yield list(found.values())
        else:
            notes.add("questions without an answer were left out", where)


def check_messages(messages: object, where: str, notes: Notes) -> list[Message]:
    """Returns a conversation in our form: user and assistant alternate, from a user's turn to an assistant's.

    A leading system message is put before the first user's text, since the template has no such role; a user's turn
    without an answer at the end is dropped, and noted. Raises Unusable for a conversation that has no such form, and
    UserError, naming `where`, for what is not even a list of messages.
    """
    if not isinstance(messages, list) or not all(
        isinstance(m, dict)
        and isinstance(m.get("role"), str)
        and isinstance(m.get("content", 0), str | None)
        and isinstance(m.get("input", ""), str)
        for m in messages
    ):
        raise UserError(f"{where}: wanted messages with the strings 'role' and 'content', and perhaps 'input'")
    messages = [{**message, "content": (message["content"] or "").strip()} for message in messages]
    if strange := next((m["role"] for m in messages if m["role"] not in ("system", "user", "assistant")), None):
        raise Unusable(f"conversations with a role like {strange!r}, none of system, user, assistant, were dropped")
    system = ""
    if messages and messages[0]["role"] == "system":
        system, messages = messages[0]["content"] + "\n\n", messages[1:]
    if not any(message["role"] == "assistant" for message in messages):
        raise Unusable("conversations without an answer were dropped")
    if [message["role"] for message in messages] != (["user", "assistant"] * len(messages))[: len(messages)]:
        raise Unusable("conversations in which user and assistant do not take turns, the user first, were dropped")
    if not all(message["content"] for message in messages):
        raise Unusable("conversations with an empty turn were dropped")
    if messages[-1]["role"] == "user":
        notes.add("questions at the end of a conversation, without an answer, were dropped", where)
        messages = messages[:-1]
    return [{**messages[0], "content": system + messages[0]["content"]}, *messages[1:]]
