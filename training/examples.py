"""What a model makes of the same few inputs at every evaluation, and prompts to try it with."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch.nn.utils import parametrize

from generation.config import SamplingConfig
from generation.text_model import TextModel
from system.cli import shorten
from text.tokenizer import Tokenizer
from training.loader import Conversations, Sequences, Windows
from training.state import Entry, Examine, TrainingState

MAX_PROMPTS, MAX_PROMPT_LENGTH = 6, 80
"""Prompts in a checkpoint, and characters of each."""
_TOKENS_READ, _EXCHANGES_READ, _BEGINNING = 2**17, 100, 60


def continuations(tokenizer: Tokenizer, template: str | None, prompt: str) -> Examine:
    """Returns the function that continues a prompt, or with a template answers it, in 60 sampled tokens."""

    def examine(state: TrainingState) -> list[dict[str, str]]:
        model = state.sharding.gathered_model(state.model) if state.sharding else state.model
        if model is None or state.processes.rank:
            return []
        text_model = TextModel(model, tokenizer, template, dtype=state.dtype)
        config = SamplingConfig(max_new_tokens=60, seed=state.config.seed)
        messages = [{"role": "user", "content": prompt}]
        ids = text_model.answer_ids(messages, config) if template else text_model.prompt_ids(prompt)
        return [{"input": prompt, "expected": "", "output": text_model.write(ids, config, strip=bool(template))}]

    return examine


def answers(tokenizer: Tokenizer, exchanges: list[tuple[list[int], list[int]]]) -> Examine:
    """Returns the function that answers held-out questions greedily. `exchanges` holds the ids of each question and of
    its true answer."""

    def text(ids: list[int]) -> str:
        return tokenizer.decode(i for i in ids if i < tokenizer.end_of_text).strip()

    def examine(state: TrainingState) -> list[dict[str, str]]:
        if state.processes.rank:
            return []
        text_model = TextModel(state.model, tokenizer, dtype=state.dtype)
        config = SamplingConfig(greedy=True, max_new_tokens=60)
        with parametrize.cached():  # forms each weight with its LoRA correction once
            outputs = [text_model.write(question, config).strip() for question, _ in exchanges]
        return [
            {"input": text(question), "expected": text(answer), "output": output}
            for (question, answer), output in zip(exchanges, outputs, strict=True)
        ]

    return examine


def before_and_after(history: list[Entry], width: int = 160) -> str:
    """Returns the examples before training and those of the best later evaluation, as text; "" if there are none."""
    later = [entry for entry in history if entry["step"]]
    if not later or not all(any(e["expected"] for e in entry.get("examples", [])) for entry in (history[0], *later)):
        return ""
    first, last = history[0], min(later, key=lambda entry: entry["val_loss"])
    lines = [f"the same examples before, and at step {last['step']:,}:"]
    for before, after in zip(first["examples"], last["examples"], strict=False):
        lines.append(f"> {shorten(after['input'], width)}")
        for label, text in (("before", before["output"]), ("after", after["output"]), ("wanted", after["expected"])):
            lines.append(f"  {label:7} {shorten(text, width)}")
    return "\n".join(lines)


def example_prompts(train_data: Windows | Sequences, val_data: Windows | Sequences, tokenizer: Tokenizer) -> list[str]:
    """Returns a few short prompts out of a run's data, held-out ones if possible: for a language model beginnings of
    paragraphs, for a chat model questions, for a classifier none."""
    if isinstance(val_data, Windows):
        ids = np.asarray(val_data.shards[0][:_TOKENS_READ])
        text = tokenizer.decode(ids[ids < tokenizer.end_of_text].tolist())
        separator = "\n\n" if text.count("\n\n") >= MAX_PROMPTS else "\n"
        paragraphs = text.split(separator)
        beginnings = map(_first_words, paragraphs[1:] or paragraphs)  # the first may begin inside a word
        return _spread(text for text in beginnings if sum(word.isalpha() for word in text.split()) >= 2)
    for data in (val_data, train_data):
        if isinstance(data, Conversations):
            exchanges = data.first_exchanges(_EXCHANGES_READ)
            texts = [tokenizer.decode(i for i in ids if i < tokenizer.end_of_text).strip() for ids, _ in exchanges]
            questions = [text.removeprefix("### Instruction:").removesuffix("### Response:").strip() for text in texts]
            if chosen := _spread(questions):
                return chosen
    return []


def _first_words(paragraph: str) -> str:
    line = paragraph.strip().partition("\n")[0]
    return line if len(line) <= _BEGINNING else line[:_BEGINNING].rpartition(" ")[0]


def _spread(texts: Iterable[str]) -> list[str]:
    """Returns a few of the texts that fit onto a button, evenly spaced."""
    fitting = [text for text in dict.fromkeys(texts) if 4 <= len(text) <= MAX_PROMPT_LENGTH and text.isprintable()]
    n = min(MAX_PROMPTS, len(fitting))
    return [fitting[i * len(fitting) // n] for i in range(n)]
