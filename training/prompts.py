"""Prompts to try a model with: beginnings of held-out texts, and questions. Checkpoints store them for the app."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from text.tokenizer import Tokenizer
from training.loader import Conversations, Epochs, Windows

MAX_PROMPTS, MAX_PROMPT_LENGTH = 6, 80
"""Prompts in a checkpoint, and characters of each."""
_TOKENS_READ = 2**17
_EXCHANGES_READ = 100  # of each split
_LENGTH = 60  # of a beginning, in characters: a model writes better behind a few words than behind one


def prompts(train_data: Windows | Epochs, val_data: Windows | Epochs, tokenizer: Tokenizer) -> list[str]:
    """Returns prompts out of a run's data, held-out ones if possible: for a language model texts to complete, for a
    chat model questions, for a classifier none."""
    if isinstance(val_data, Windows):
        return beginnings(val_data, tokenizer)
    return questions([data for data in (val_data, train_data) if isinstance(data, Conversations)], tokenizer)


def beginnings(data: Windows, tokenizer: Tokenizer) -> list[str]:
    """Returns the first words of a few documents; if the data has few documents, of paragraphs or of lines."""
    ids = np.asarray(data.shards[0][:_TOKENS_READ])
    ends = np.flatnonzero(ids == tokenizer.end_of_text)
    documents = [tokenizer.decode(part[part < tokenizer.end_of_text].tolist()) for part in np.split(ids, ends + 1)]
    documents = [document for document in documents if document.strip()]
    whole = "\n\n".join(documents)
    choices = [_spread(_beginnings(texts)) for texts in (documents, whole.split("\n\n"), whole.split("\n"))]
    return next((texts for texts in choices if len(texts) >= MAX_PROMPTS // 2), max(choices, key=len))


def questions(splits: Iterable[Conversations], tokenizer: Tokenizer) -> list[str]:
    """Returns a few short questions that open conversations: those of the first split that has any."""
    for conversations in splits:
        texts = []
        for question, _ in conversations.first_exchanges(_EXCHANGES_READ):
            text = tokenizer.decode(i for i in question if i < tokenizer.end_of_text).strip()
            texts.append(text.removeprefix("### Instruction:").removesuffix("### Response:").strip())
        if chosen := _spread(texts):
            return chosen
    return []


def _beginnings(texts: list[str]) -> list[str]:
    """Returns the first words of texts, but not of the first one, which may begin in the middle of a word, nor of those
    that begin with a name or with code."""
    beginnings = map(_first_words, texts[1:] or texts)
    return [words for words in beginnings if sum(word.isalpha() for word in words.split()) >= 2]


def _first_words(text: str) -> str:
    line = text.strip().partition("\n")[0]
    if len(line) > _LENGTH:
        line = line[:_LENGTH].rpartition(" ")[0] or line[:_LENGTH]
    return line.strip()


def _spread(texts: Iterable[str]) -> list[str]:
    """Returns a few of the texts that fit into a checkpoint and onto a button, evenly spaced."""
    fitting = [text for text in dict.fromkeys(texts) if 4 <= len(text) <= MAX_PROMPT_LENGTH and text.isprintable()]
    n = min(MAX_PROMPTS, len(fitting))
    return [fitting[i * len(fitting) // n] for i in range(n)]
