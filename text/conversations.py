"""Conversations for fine-tuning: the Hub, files of chats or instructions, Python's own documentation."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from system.errors import UserError
from system.untrusted import brief
from text import lessons
from text.corpora import draw_held_out
from text.readers import Notes, Row, hub_rows, load_hub, opened, records
from text.registry import CONVERSATIONS, listed
from text.templates import Message

Conversation = list[Message]

QUESTIONS, ANSWERS = ("instruction", "prompt", "question"), ("output", "response", "answer", "completion")
"""Columns of a table in which each row is one question and its answer."""
COLUMNS = ["messages", *QUESTIONS, "input", *ANSWERS]
VAL_FRACTION, FEW = 0.05, 100
"""The share to hold out by default. Of fewer than FEW conversations none is: the user wants each of them to be learnt.
"""
_INSTEAD = "--dataset pydocs-qa and --input FILE work"
_REPEATED = "conversations that repeat another one were dropped"


class Unusable(Exception):
    """A conversation that cannot be trained on. The message, in the plural, says which conversations were dropped."""


def open_conversations(
    dataset: str,
    path: Path | None,
    max_conversations: int | None,
    val_fraction: float | None,
    seed: int,
    notes: Notes,
    *,
    are_chats: bool = True,
) -> Iterable[tuple[str, Conversation]]:
    """Returns the conversations of a file, or without `path` those of a data set, with their splits ("train", "val").

    With a `val_fraction` of 0, and without one if there are fewer than FEW conversations, each has the split "both". If
    they are few chats, those with one exchange are also `joined`. `notes` counts what is left out. Raises UserError if
    there are fewer than two conversations.
    """
    named = CONVERSATIONS.get(dataset)
    if path is None and dataset == "oasst1":
        share = val_fraction or VAL_FRACTION
        return _first(load_oasst1(share, seed, notes), max_conversations, share)
    if path is None and named and named.split == "wordings":
        found_lessons = lessons.lessons(builtins_only=dataset == "builtins-qa")
        return lessons.conversations(list(islice(found_lessons, max_conversations)), seed)
    usable = read_file(path, notes) if path else from_hub(named.hub if named else dataset, notes)
    conversations = list(islice(usable, max_conversations))
    if len(conversations) < 2:
        raise UserError(f"{path or dataset} holds fewer than two usable conversations: add more{notes.in_brackets()}")
    if val_fraction is None:
        val_fraction = VAL_FRACTION if len(conversations) >= FEW else 0
    if val_fraction == 0:
        found = [("both", conversation) for conversation in conversations]
        short = [conversation for conversation in conversations if len(conversation) <= 2]
        if are_chats and len(conversations) < FEW and len(short) > 1:
            found += [("joined", several) for several in joined(short, seed)]
        return found
    return draw_held_out(conversations, max(val_fraction, 1 / len(conversations)), seed)


def joined(conversations: list[Conversation], seed: int) -> Iterator[Conversation]:
    """Yields conversations of two and of three of the given ones, in random orders, each once in either.

    People ask one question after another. A model that saw only first questions answers the later ones worse.
    """
    rng = random.Random(seed)
    for n in (2, 3):
        shuffled = rng.sample(conversations, len(conversations))
        yield from (list(chain(*shuffled[i : i + n])) for i in range(0, len(shuffled), n))


def _first(
    conversations: Iterable[tuple[str, Conversation]], n: int | None, val_fraction: float
) -> Iterator[tuple[str, Conversation]]:
    """Yields at most `n` conversations, `val_fraction` of them, but at least one, from the split "val"."""
    n_val = None if n is None else max(1, round(n * val_fraction))
    left = {"train": n if n is None or n_val is None else n - n_val, "val": n_val}
    for split, conversation in conversations:
        room = left[split]
        if room is None or room > 0:
            left[split] = None if room is None else room - 1
            yield split, conversation


def read_file(path: Path, notes: Notes) -> Iterator[Conversation]:
    """Yields the conversations of a .json (a list), .jsonl (one object per line), .csv, .tsv or .parquet file, perhaps
    compressed.

    Conversations that cannot be trained on are dropped; `notes` counts them. Raises UserError, naming the place, for
    anything that is not a conversation.
    """
    with opened(path) as (_, stream):
        yield from usable(records(path, stream, COLUMNS), notes)


def from_hub(name: str, notes: Notes) -> Iterator[Conversation]:
    """Yields the conversations in the split "train" of a data set of the Hub, as `read_file` does."""
    rows, _ = load_hub(name, _INSTEAD, split="train")
    yield from usable(hub_rows(name, rows), notes)


def usable(rows: Iterable[Row], notes: Notes) -> Iterator[Conversation]:
    """Yields the conversations that can be trained on, from rows with their places; `notes` counts the others.

    A row has `messages`, as OpenAI and the Hub write them, or one of QUESTIONS and one of ANSWERS, and perhaps
    `input`, as Alpaca's `instruction`, `input` and `output`. A conversation that repeats another one is dropped: it
    might be in both splits. Raises UserError, naming the place, for any other row.
    """
    seen: set[bytes] = set()
    for where, row in rows:
        try:
            conversation = check_messages(_messages_of(row, where), where, notes)
            if not _is_new(conversation, seen):
                raise Unusable(_REPEATED)
            yield conversation
        except Unusable as reason:
            notes.add(str(reason), where)


def _messages_of(row: object, where: str) -> object:
    """Returns what a row has as `messages`, or a question and its answer. Raises UserError if it has neither."""
    columns = row if isinstance(row, dict) else {}
    if "messages" in columns:
        return columns["messages"]
    question = next((name for name in QUESTIONS if name in columns), None)
    answer = next((name for name in ANSWERS if name in columns), None)
    if question and answer:
        turn = {"role": "user", "content": columns[question], "input": columns.get("input") or ""}
        return [turn, {"role": "assistant", "content": columns[answer]}]
    found = ", ".join(map(str, columns))[:100] if columns else f"a {type(row).__name__}"
    raise UserError(
        f"{where}: expected an object or a row with `messages`, or with a question (a column {listed(QUESTIONS)}) and "
        f"its answer ({listed(ANSWERS)}), not {found}"
    )


def _is_new(conversation: Conversation, seen: set[bytes]) -> bool:
    """Whether a conversation is not among those that were `seen`; adds its hash to them."""
    key = hashlib.sha256(json.dumps(conversation, sort_keys=True).encode()).digest()
    is_new = key not in seen
    seen.add(key)
    return is_new


def load_oasst1(val_fraction: float, seed: int, notes: Notes) -> Iterator[tuple[str, Conversation]]:
    """Yields OpenAssistant's English conversations with the Hub's own split; if it has none, split by message tree."""
    name = CONVERSATIONS["oasst1"].hub
    rows, _ = load_hub(name, _INSTEAD)
    trees = oasst1_trees(hub_rows(name, rows["train"]), notes)
    split_trees: Iterator[tuple[str, list[Conversation]]]
    if "validation" in rows:
        val_trees = oasst1_trees(hub_rows(name, rows["validation"]), notes)
        split_trees = chain((("train", tree) for tree in trees), (("val", tree) for tree in val_trees))
    else:
        split_trees = draw_held_out(trees, val_fraction, seed)
    seen: set[bytes] = set()
    for split, tree in split_trees:
        for conversation in tree:
            if _is_new(conversation, seen):
                yield split, conversation
            else:
                notes.add(_REPEATED, name)


def oasst1_trees(rows: Iterable[Row], notes: Notes) -> Iterator[list[Conversation]]:
    """Yields for each message tree of OpenAssistant its conversations: from the question down the top-ranked replies.

    English messages are kept, unless they were deleted or half of the reviewers labelled them as spam (Köpf et al.
    2023). `notes` counts what is left out.
    """
    children: dict[str | None, list[Row]] = defaultdict(list)
    for where, row in rows:
        labels = dict(zip(row["labels"]["name"], row["labels"]["value"], strict=True)) if row.get("labels") else {}
        if row["lang"] != "en":
            notes.add("messages in other languages than English were left out", where)
        elif row["deleted"] or labels.get("spam", 0.0) >= 0.5:
            notes.add("messages that were deleted or marked as spam were left out", where)
        else:
            children[row["parent_id"]].append((where, row))
    for where, root in children[None]:
        paths = _oasst1_paths(root, [], children, notes) if root["role"] == "prompter" else []
        if paths:
            yield list({json.dumps(path): path for path in paths}.values())  # each once
        else:
            notes.add("questions without an answer were left out", where)


def _oasst1_paths(
    message: dict, before: Conversation, children: dict[str | None, list[Row]], notes: Notes
) -> list[Conversation]:
    """Returns the conversations from a message, which follows `before`, down to the last answers below it."""
    role = "user" if message["role"] == "prompter" else "assistant"
    path: Conversation = [*before, {"role": role, "content": message["text"]}]
    replies = [(where, reply) for where, reply in children[message["message_id"]] if reply["role"] != message["role"]]
    if role == "user" and replies:  # rank 0 is the answer that reviewers liked best
        replies.sort(key=lambda reply: math.inf if reply[1]["rank"] is None else reply[1]["rank"])
        for where, _ in replies[1:]:
            notes.add("answers that reviewers ranked below another one were left out", where)
        replies = replies[:1]
    longer = [path_ for _, reply in replies for path_ in _oasst1_paths(reply, path, children, notes)]
    if longer:
        return longer
    if role == "user":  # nobody answered
        path = before
    return [path] if path else []


def check_messages(messages: object, where: str, notes: Notes) -> Conversation:
    """Returns a conversation in which user and assistant alternate, from a user's turn to an assistant's.

    The template has no role for a system message: the text of a leading one is put before the first user's text. A last
    user's turn without an answer is dropped. `notes` counts it, and characters that are not Unicode. Raises Unusable if
    a conversation cannot be brought into this form, and UserError, naming `where`, if `messages` are not a list of
    messages.
    """
    turns = [
        {
            name: notes.clean(turn.get(name) or "", where).strip()
            for name in ("role", "content", "input")
            if name in turn
        }
        for turn in _require_messages(messages, where)
    ]
    roles = [turn["role"] for turn in turns]
    for role in roles:
        if role not in ("system", "user", "assistant"):
            raise Unusable(f"conversations with a role like {brief(role)} (not system, user or assistant) were dropped")
    system = ""
    if roles[:1] == ["system"]:
        system = turns[0]["content"] + "\n\n"
        turns, roles = turns[1:], roles[1:]
    if "assistant" not in roles:
        raise Unusable("conversations without an answer were dropped")
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
        raise Unusable("conversations in which user and assistant do not take turns, the user first, were dropped")
    if not all(turn["content"] for turn in turns):
        raise Unusable("conversations with an empty turn were dropped")
    if roles[-1] == "user":
        notes.add("questions at the end of a conversation, without an answer, were dropped", where)
        turns = turns[:-1]
    return [{**turns[0], "content": system + turns[0]["content"]}, *turns[1:]]


def _require_messages(messages: object, where: str) -> list[dict]:
    """Raises UserError unless `messages` is a list of dicts with a role, a content (a string or null) and perhaps an
    input."""
    if not isinstance(messages, list) or not all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content", 0), str | None)  # 0 is neither: the key must be there
        and isinstance(message.get("input", ""), str)
        for message in messages
    ):
        raise UserError(f"{where}: expected messages with the strings 'role' and 'content', and perhaps 'input'")
    return messages
