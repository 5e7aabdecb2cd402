"""Memorization: how many questions of its training data a chat model answers word for word."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from pathlib import Path

from generation.config import SamplingConfig
from generation.text_model import Chat, TextModel
from text.templates import encode_conversation
from training.loader import Conversations


def trained_questions(questions: Iterable[tuple[str, str]], data: Path, text_model: TextModel) -> list[tuple[str, str]]:
    """Returns those (question, answer) pairs that are conversations in the training split of a data folder."""
    conversations = Conversations(data, "train", text_model.model.config.block_size, batch_size=1, seed=0)
    trained = {tuple(conversations.conversation(i)[0].tolist()) for i in range(len(conversations))}

    def ids(question: str, answer: str) -> tuple[int, ...]:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return tuple(encode_conversation(messages, text_model.tokenizer)[0])

    return [(question, answer) for question, answer in questions if ids(question, answer) in trained]


def reply(text_model: TextModel, question: str, max_new_tokens: int = 100) -> Generator[str, None, None]:
    """Answers a question greedily; yields the answer in pieces."""
    return Chat(text_model, SamplingConfig(greedy=True, max_new_tokens=max_new_tokens)).reply(question)


def is_recalled(text_model: TextModel, question: str, answer: str) -> bool:
    """Whether the model answers a question greedily, word for word. Stops at the first difference."""
    text = ""
    for piece in reply(text_model, question, max_new_tokens=len(answer)):
        text += piece
        if not answer.startswith(text):
            return False
    return text == answer
