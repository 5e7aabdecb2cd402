"""The conversations of `--dataset builtins-qa` and `pydocs-qa`: an answer, and many paraphrases of its question.

Two paraphrases are never trained on. They show whether the model knows a question in other words.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from text import pydocs
from text.chat import Message
from text.sources import read_rows

BUNDLED = Path(__file__).parent.parent / "data" / "samples" / "chat.jsonl"
EXCHANGES = 15 * (1, 2, 3)
"""Each lesson is part of this many conversations, joined from so many lessons each."""

_TAUGHT_FOR_ALL = (
    "What is {}?", "What's {}?", "What is {} for?", "What does {} do?", "How do I use {}?",
    "How can I use {} in my program?", "What is the purpose of {}?", "Explain {}.", "{}?", "{}: what is it?",
    "Tell me about {}.", "Describe {} briefly.", "Define {}.", "I need help with {}.", "In Python, what is {}?",
    "Do you know {}?", "How does {} work?", "When would I use {}?", "Why does Python have {}?",
    "What can I do with {}?", "What can you tell me about {}?", "Can you explain {} to me?",
    "Help me understand {}, please.", "Give me a short description of {}.", "{} is new to me. What is it good for?",
    "Hi, could you help me with {}?", "Remind me what {} does, please.", "What does the documentation say about {}?",
    "My teacher mentioned {}. What is that?", "Could you say in one sentence what {} does?",
    "I read about {} today, but I forgot what it was.", "In this program there is {}, and I do not understand it.",
    "Somebody told me to learn {}, but I have no idea why.", "For my homework I must explain {}, so please help me.",
    "My program has a line with {} in it. What does that mean?",
    "The next chapter of my book is about {}. Is that important?",
    "We talked about {} yesterday, and now I want to know more.", "You surely know {}, so tell me a little about it.",
    "Which problem does {} solve?", "Please show me how {} behaves.", "The name {} means what?",
    "So what is the idea behind {}?", "If you had to teach {} to a child, what would you say?",
    "I came across {} while reading. What is it good for?", "I keep seeing {} everywhere, so tell me what it is.",
    "I never understood {}. Can you explain it?", "I would like to understand {}.", "I wonder what {} is.",
    "I am not sure what {} is for.", "{} confuses me.", "Have you heard of {}?", "Could you sum up {}?",
    "A colleague uses {} all the time, and I do not know why.", "An example in my book uses {}. What for?",
    "People talk about {}. What is that?", "What role does {} play?", "When somebody writes {}, what follows?",
    "What would I do with {}?", "Is there anything to know about {}?", "What is the point of {}?", "Why {}?",
    "The name {} stands in a file that I opened, and I ask myself what it does.", "Let us talk about {}.",
)  # fmt: skip
_TAUGHT = {
    "function": ("What does {} return?", "Why would I need {}?", "I want to use {}. How?"),
    "class": ("What is a {}?", "What does {} mean?", "I got a {}. What is that?", "When do I get a {}?"),
    "attribute": ("What is in {}?", "What does {} tell me?", "What is the value of {}?"),
    "module": ("What is in {}?", "Why would I import {}?", "What is the module {} for?"),
}
_HELD_OUT = {
    "function": ("What happens when I call {}?", "I found {} in some code and wonder what its job is."),
    "class": ("What do people mean by {}?", "I have never heard of {}, can you sum it up?"),
    "attribute": ("What do I find in {}?", "I saw {} somewhere and wonder how it helps me."),
    "module": ("What do I find in {}?", "I saw {} somewhere and wonder how it helps me."),
}
# What people write around a question. It teaches the model to find the question.
_BEFORE = (
    "Hi, ", "Hello! ", "Please tell me: ", "Quick question: ", "I have a question. ", "I am new here. ",
    "I am stuck. ", "Sorry to ask, but ", "Now I would like to know: ", "Maybe you can help me. ", "So ",
    "My friend asked me: ", "Next question: ", "I was just thinking, ",
)  # fmt: skip
_AFTER = (
    " Thanks!", " Please tell me.", " I have no idea.", " I forgot.", " I need it for school.",
    " You know that, right?", " I am curious.", " Just a short answer, please.",
)  # fmt: skip


@dataclass(frozen=True)
class Lesson:
    """A conversation and paraphrases of its first question."""

    conversation: list[Message]
    taught: list[str]
    """paraphrases to train on"""
    held_out: list[str]
    """paraphrases for validation only"""

    def asked(self, question: str) -> list[Message]:
        """Returns the conversation with another first question."""
        return [{**self.conversation[0], "content": question}, *self.conversation[1:]]


def as_typed(question: str, rng: random.Random) -> str:
    """Returns a question as people type it: perhaps in lower case, without an apostrophe or without the last mark."""
    case = rng.random()
    if case < 0.25:
        question = question.lower()
    elif case < 0.5:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.2:
        question = question.replace("'", "")
    return question.rstrip("?.!") if rng.random() < 0.4 else question


def in_a_sentence(question: str, rng: random.Random) -> str:
    """Returns a question as it is, or with other words before or after it."""
    if question.endswith("?") and rng.random() < 0.4:
        question = rng.choice(_BEFORE) + question
    if question.endswith("?") and rng.random() < 0.2:
        question += rng.choice(_AFTER)
    return question


def lessons(builtins_only: bool = False) -> Iterator[Lesson]:
    """Yields the lessons in a fixed order: small talk and Python's entries in turn, until either is used up."""
    for pair in zip_longest(_small_talk(), _entries(builtins_only)):
        yield from filter(None, pair)


def _small_talk() -> Iterator[Lesson]:
    """Yields the lessons that come with the project."""
    for _, row in read_rows(str(BUNDLED)):
        first_question = row["messages"][0]["content"]
        yield Lesson(row["messages"], [first_question, *row["paraphrases"]], row["held_out"])


def _entries(builtins_only: bool) -> Iterator[Lesson]:
    """Yields a lesson for each built-in, and perhaps for each entry of the standard library.

    Functions such as `len` come first, then methods and functions of modules, then classes.
    """
    entries = pydocs.answers(builtins_only)
    for entry, answer in sorted(entries, key=lambda pair: (pair[0].kind != "function", "." in pair[0].name)):
        forms = [entry.name, f"{entry.name}()"] if entry.kind == "function" else [entry.name]
        taught = [pattern.format(form) for pattern in (*_TAUGHT_FOR_ALL, *_TAUGHT[entry.kind]) for form in forms]
        messages = [{"role": "user", "content": taught[0]}, {"role": "assistant", "content": answer}]
        yield Lesson(messages, taught, [pattern.format(entry.name) for pattern in _HELD_OUT[entry.kind]])


def conversations(lessons: list[Lesson], seed: int) -> Iterator[tuple[str, list[Message]]]:
    """Yields conversations with their splits: "train" asks in random taught paraphrases, "val" in the held-out ones.

    Users ask one question after another, so most conversations for training join two or three lessons in random order.
    The model learns each answer from the question, not from what came before.
    """
    rng = random.Random(seed)
    for n in EXCHANGES:
        parts = [lesson.asked(as_typed(in_a_sentence(rng.choice(lesson.taught), rng), rng)) for lesson in lessons]
        rng.shuffle(parts)
        yield from (("train", list(chain(*parts[i : i + n]))) for i in range(0, len(parts), n))
    for lesson in lessons:
        yield from (("val", lesson.asked(as_typed(question, rng))) for question in lesson.held_out)
