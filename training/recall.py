"""Recall: how many questions a chat model answers word for word."""

from __future__ import annotations

import random
from pathlib import Path

from generation.config import SamplingConfig
from generation.text_model import TextModel
from system.cli import progress
from training.loader import Conversations

Exchange = tuple[list[int], list[int]]
"""The ids of a question, up to the role token of its answer, and of the answer that the data holds."""


def is_recalled(text_model: TextModel, exchange: Exchange) -> bool:
    """Whether the model, decoding greedily, answers word for word as in the data.

    It does if each token of the answer is the likeliest one after those before it, so one forward pass is enough.
    """
    question, answer = exchange
    tokens = text_model.score(question + answer, top_logprobs=1)[len(question) :]
    return all(token.candidates[0][0] == token.id for token in tokens)


def recall_report(text_model: TextModel, data: Path, split: str, n: int = 500, n_shown: int = 5) -> str:
    """Asks `n` random first questions of conversations, each once; returns how many answers are recalled, and some."""
    conversations = Conversations(data, split, text_model.model.config.block_size, batch_size=1, seed=0)
    exchanges = conversations.first_exchanges(len(conversations))
    exchanges = list({str(exchange): exchange for exchange in exchanges}.values())
    exchanges = random.Random(0).sample(exchanges, min(n, len(exchanges)))
    asked = progress(exchanges, unit="question")
    n_recalled = sum(is_recalled(text_model, exchange) for exchange in asked)
    n_asked = len(exchanges)
    lines = [f"{n_recalled} of {n_asked} answered word for word ({100 * n_recalled // n_asked}%), for example:"]
    for ids, _ in exchanges[:n_shown]:
        question = text_model.tokenizer.decode(i for i in ids if i < text_model.tokenizer.end_of_text).strip()
        answer = text_model.write(ids, SamplingConfig(greedy=True, max_new_tokens=60), strip=True)
        lines.append(f"> {question}\n  {answer}")
    return "\n".join(lines)
