"""Conversations for fine-tuning: from the Hub, files of chats or instructions, and Python's own documentation."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np

from system.cli import command_line, progress, shorten, without_secrets
from system.errors import UserError
from system.files import atomic_folder, require_no_files, write_json
from text import lessons
from text.chat import Message, encode_conversation
from text.sources import CONVERSATIONS, Notes, Row, draw_held_out, hub_rows, read_rows
from text.token_files import SPLITS
from text.tokenizer import Tokenizer

Conversation = list[Message]
Pairs = Iterable[tuple[str, Conversation]]
"""conversations with their splits, "train" or "val" """

QUESTIONS, ANSWERS = ("instruction", "prompt", "question"), ("output", "response", "answer", "completion")
"""Columns of a table in which each row is one question and its answer."""
COLUMNS = ["messages", *QUESTIONS, "input", *ANSWERS]
VAL_FRACTION, FEW = 0.05, 100  # of fewer than FEW conversations none is held out: the user wants each to be learnt


def prepare_conversations(
    dataset: str,
    file: str | None,
    tokenizer: Tokenizer,
    out: Path,
    *,
    template: str = "chat",
    block_size: int = 1024,
    max_conversations: int | None = None,
    val_fraction: float | None = None,
    seed: int = 1337,
    overwrite: bool = False,
) -> list[str]:
    """Writes tokens, loss masks and offsets of the conversations in a file, or without it of a data set, into `out`.

    Returns lines that say what was written. The files appear together at the end. Raises UserError if there are old
    files and no `overwrite`, or if a split gets no conversation.
    """
    require_no_files(out, ["sft_*.bin", "sft_meta.json"], overwrite)
    notes = Notes()
    joins = template == "chat"
    pairs, is_held_out = open_conversations(dataset, file, max_conversations, val_fraction, seed, notes, joins)
    with atomic_folder(out, last="sft_meta.json") as folder:
        counts = _write(pairs, is_held_out, tokenizer, folder, template, block_size, notes)
        meta = {
            "files": {split: [f"sft_{split}{kind}.bin" for kind in ("", "_mask", "_index")] for split in SPLITS},
            "tokenizer": tokenizer.name,
            "template": template,
            "block_size": block_size,
            "is_held_out": is_held_out,
            "splits": counts,
            "source": without_secrets(file or dataset),
            "notes": notes.lines(),
            "command": command_line(),
            "format_version": 1,
        }
        write_json(folder / "sft_meta.json", meta)
    lines = [
        f"{split}: {n['conversations']:,} conversations, {n['tokens']:,} tokens, {n['counted']:,} of them in answers"
        for split, n in counts.items()
    ]
    if not is_held_out:
        n_joined = counts["train"]["conversations"] - counts["val"]["conversations"]
        lines.append("all conversations are trained on, and the validation loss is theirs (see --val-fraction)")
        if n_joined:
            lines.append(f"{n_joined:,} more are the same, as people might type them, alone or two or three in a row")
    return [*lines, *notes.lines(), f"wrote {out}, tokenizer {tokenizer.name}, template {template}"]


def _write(
    pairs: Pairs, is_held_out: bool, tokenizer: Tokenizer, folder: Path, template: str, block_size: int, notes: Notes
) -> dict[str, dict[str, int]]:
    """Writes conversations; returns counts by split. A long conversation loses its oldest exchanges."""
    rows: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {split: [] for split in SPLITS}
    for i, (split, messages) in enumerate(progress(pairs, unit="conversation"), 1):
        ids, mask = encode_conversation(messages, tokenizer, template)
        if len(ids) > block_size:
            ids, mask = encode_conversation(messages, tokenizer, template, block_size)
            outcome = "lost their oldest turns" if ids else "were dropped, since one exchange alone is too long"
            if is_held_out or split == "val":  # if none is held out, "train" repeats what "val" has
                notes.add(f"conversations longer than {block_size:,} tokens {outcome}", f"conversation {i:,}")
        if ids:
            rows[split].append((np.array(ids, "<u2"), np.array(mask, "u1")))
    counts = {}
    for split, remedy in (("train", "a larger --block-size"), ("val", "a larger --val-fraction or --block-size")):
        if not rows[split]:
            raise UserError(f"no conversation is left for {split}: add more, or use {remedy}{notes.in_brackets()}")
        tokens, masks = (np.concatenate(arrays) for arrays in zip(*rows[split], strict=True))
        offsets = np.cumsum([0, *(len(ids) for ids, _ in rows[split])], dtype="<u8")
        for kind, content in (("", tokens), ("_mask", masks), ("_index", offsets)):
            content.tofile(folder / f"sft_{split}{kind}.bin")
        counts[split] = {"conversations": len(rows[split]), "tokens": len(tokens), "counted": int(masks.sum())}
    return counts


def open_conversations(
    dataset: str,
    file: str | None,
    max_conversations: int | None,
    val_fraction: float | None,
    seed: int,
    notes: Notes,
    joins: bool,
) -> tuple[Pairs, bool]:
    """Returns the conversations of a file, or without it those of a data set, and whether some are held out.

    If none is held out, all are in both splits: so it is with a `val_fraction` of 0, and without one if they are fewer
    than FEW. With `joins`, few conversations of one exchange are also trained as lessons: as people type them, and one
    after another. Raises UserError if only one is usable.
    """
    hub_name = CONVERSATIONS.get(dataset, dataset)
    if not file and dataset == "oasst1":
        return load_oasst1(max_conversations, notes), True
    if not file and not hub_name:
        found_lessons = lessons.lessons(builtins_only=dataset == "builtins-qa")
        return lessons.conversations(list(islice(found_lessons, max_conversations)), seed), True
    rows = read_rows(file, COLUMNS) if file else hub_rows(hub_name or dataset)
    conversations = list(islice(usable(rows, notes), max_conversations))
    if len(conversations) < 2:
        raise UserError(f"{file or dataset} holds fewer than two usable conversations: add more{notes.in_brackets()}")
    if val_fraction is None:
        val_fraction = VAL_FRACTION if len(conversations) >= FEW else 0
    if val_fraction > 0:
        return draw_held_out(conversations, max(val_fraction, 1 / len(conversations)), seed), True
    short = [c for c in conversations if len(c) <= 2] if joins and len(conversations) < FEW else []
    asked = [lessons.Lesson(conversation, [conversation[0]["content"]], []) for conversation in short]
    more = lessons.conversations(asked, seed) if len(short) > 1 else []
    return chain((("val", c) for c in conversations), (("train", c) for c in conversations), more), False


def usable(rows: Iterable[Row], notes: Notes) -> Iterator[Conversation]:
    """Yields the conversations that can be trained on, from rows with their places; `notes` counts the others.

    A row has `messages`, as OpenAI and the Hub write them, or one of QUESTIONS, perhaps `input`, and one of ANSWERS. A
    conversation that repeats another one is dropped: it might be in both splits. Raises UserError for any other row.
    """
    seen: set[str] = set()
    for where, row in rows:
        conversation = check_messages(_messages_of(row, where), where, notes)
        if conversation and _is_new(conversation, seen):
            yield conversation
        elif conversation:
            notes.add("conversations that repeat another one were dropped", where)


def _messages_of(row: object, where: str) -> object:
    """Returns what a row has as `messages`, or a question and its answer. Raises UserError if it has neither."""
    columns = row if isinstance(row, dict) else {}
    if "messages" in columns:
        return columns["messages"]
    questions, answers = ([name for name in names if name in columns] for names in (QUESTIONS, ANSWERS))
    if questions and answers:
        turn = {"role": "user", "content": columns[questions[0]], "input": columns.get("input") or ""}
        return [turn, {"role": "assistant", "content": columns[answers[0]]}]
    found = shorten(", ".join(map(str, columns)), 100) or type(row).__name__
    expected = f"`messages`, or a question ({', '.join(QUESTIONS)}) and its answer ({', '.join(ANSWERS)})"
    raise UserError(f"{where}: expected {expected}, not {found}")


def _is_new(conversation: Conversation, seen: set[str]) -> bool:
    """Whether a conversation is not among those that were `seen`; adds it to them."""
    key, n = json.dumps(conversation), len(seen)
    seen.add(key)
    return len(seen) > n


def load_oasst1(max_conversations: int | None, notes: Notes) -> Pairs:
    """Yields OpenAssistant's English conversations (Köpf et al. 2023) with the Hub's own split."""
    n_train, n_val = None, None
    if max_conversations:
        n_val = max(1, round(max_conversations * VAL_FRACTION))
        n_train = max_conversations - n_val
    seen: set[str] = set()
    for split, split_of_hub, n in (("train", "train", n_train), ("val", "validation", n_val)):
        conversations = oasst1_conversations(hub_rows("OpenAssistant/oasst1", split=split_of_hub), notes)
        new = (conversation for conversation in conversations if _is_new(conversation, seen))
        yield from ((split, conversation) for conversation in islice(new, n))


def oasst1_conversations(rows: Iterable[Row], notes: Notes) -> Iterator[Conversation]:
    """Yields the conversations in OpenAssistant's message trees: from each question down the top-ranked replies.

    English messages are kept, unless they were deleted or half of the reviewers labelled them as spam. `notes` counts
    what is left out.
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

    def paths(question: Row, before: Conversation) -> Iterator[Conversation]:
        where, message = question
        answers = sorted(children[message["message_id"]], key=lambda row: (row[1]["rank"] is None, row[1]["rank"]))
        if not answers:
            notes.add("questions without an answer were left out", where)
            return
        for other, _ in answers[1:]:
            notes.add("answers that reviewers ranked below another one were left out", other)
        best = answers[0][1]  # reviewers gave it rank 0
        turns = [{"role": "user", "content": message["text"]}, {"role": "assistant", "content": best["text"]}]
        longer = [path for row in children[best["message_id"]] for path in paths(row, [*before, *turns])]
        yield from longer or [[*before, *turns]]

    for root in children[None]:
        yield from paths(root, [])


def check_messages(messages: object, where: str, notes: Notes) -> Conversation | None:
    """Returns a conversation in which user and assistant alternate, from a user's turn to an assistant's.

    The text of a leading system message is put before the first user's text: the template has no role for it. A last
    question without an answer is dropped. Returns None if a conversation cannot be brought into this form; `notes` says
    why. Raises UserError, naming `where`, if `messages` is no list of messages.
    """
    try:
        turns = [
            {
                name: notes.clean(turn[name] or "", where).strip()
                for name in ("role", "content", "input")
                if name in turn or name == "content"
            }
            for turn in messages  # type: ignore[attr-defined]
        ]
        roles = [turn["role"] for turn in turns]
    except (TypeError, KeyError, AttributeError):
        expected = "expected messages with the strings 'role' and 'content', and perhaps 'input'"
        raise UserError(f"{where}: {expected}") from None
    system = ""
    if roles[:1] == ["system"]:
        system = turns[0]["content"] + "\n\n"
        turns, roles = turns[1:], roles[1:]
    for reason, is_met in {
        "with a role other than system, user and assistant": not set(roles) <= {"user", "assistant", "system"},
        "without an answer": "assistant" not in roles,
        "in which user and assistant do not take turns, the user first": any(
            role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)
        ),
        "with an empty turn": not all(turn["content"] for turn in turns),
    }.items():
        if is_met:
            notes.add(f"conversations {reason} were dropped", where)
            return None
    if roles[-1] == "user":
        notes.add("questions at the end of a conversation, without an answer, were dropped", where)
        turns = turns[:-1]
    return [{**turns[0], "content": system + turns[0]["content"]}, *turns[1:]]
