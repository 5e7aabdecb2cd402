"""What a model makes of the same few inputs at every evaluation, and prompts to try it with."""

from collections.abc import Iterable

import numpy as np
from torch.nn.utils import parametrize

from generation.config import SamplingConfig
from generation.text_model import TextModel
from system.cli import shorten
from text.tokenizer import Tokenizer
from training.loader import Conversations, Sequences, Windows
from training.state import Entry, Examine, TrainingState

N_PROMPTS = 6
"""Prompts in a checkpoint."""


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
    """Returns the function that answers questions greedily, given the ids of each and of its true answer."""

    def examine(state: TrainingState) -> list[dict[str, str]]:
        if state.processes.rank:
            return []
        text_model = TextModel(state.model, tokenizer, dtype=state.dtype)
        config = SamplingConfig(greedy=True, max_new_tokens=60)
        with parametrize.cached():  # forms each weight with its LoRA correction once
            outputs = [text_model.write(question, config).strip() for question, _ in exchanges]
        return [
            {"input": plain_text(question, tokenizer), "expected": plain_text(answer, tokenizer), "output": output}
            for (question, answer), output in zip(exchanges, outputs, strict=True)
        ]

    return examine


def plain_text(ids: Iterable[int], tokenizer: Tokenizer) -> str:
    """Returns the text of tokens, without control tokens."""
    return tokenizer.decode(i for i in ids if i < tokenizer.end_of_text).strip()


def before_and_after(first: Entry, kept: Entry) -> str:
    """Returns the examples of two evaluations, before training and of the kept weights, as text; "" without answers."""
    pairs = list(zip(first.get("examples", []), kept.get("examples", []), strict=False))
    if not any(after["expected"] for _, after in pairs):
        return ""
    lines = [f"the same examples before, and at step {kept['step']:,}:"]
    for before, after in pairs:
        lines.append(f"> {shorten(after['input'], 160)}")
        for label, text in (("before", before["output"]), ("after", after["output"]), ("wanted", after["expected"])):
            lines.append(f"  {label:7} {shorten(text, 160)}")
    return "\n".join(lines)


def example_prompts(data: Windows | Sequences, tokenizer: Tokenizer) -> list[str]:
    """Returns a few short prompts out of validation data: for a language model beginnings of paragraphs, for a chat
    model questions, for a classifier none."""
    texts: list[str] = []
    if isinstance(data, Windows):
        text = plain_text(np.asarray(data.shards[0][: 2**17]).tolist(), tokenizer)
        paragraphs = text.split("\n\n" if text.count("\n\n") >= N_PROMPTS else "\n")
        lines = [paragraph.strip().partition("\n")[0] for paragraph in paragraphs[1:]]  # the first may begin in a word
        texts = [line if len(line) <= 60 else line[:60].rpartition(" ")[0] for line in lines]
        texts = [text for text in texts if sum(map(str.isalpha, text.split())) >= 2]
    elif isinstance(data, Conversations):
        questions = [plain_text(question, tokenizer) for question, _ in data.first_exchanges(100)]
        texts = [text.removeprefix("### Instruction:").removesuffix("### Response:").strip() for text in questions]
    fitting = [text for text in dict.fromkeys(texts) if 4 <= len(text) <= 80 and text.isprintable()]  # on a button
    n = min(N_PROMPTS, len(fitting))
    return [fitting[i * len(fitting) // n] for i in range(n)]  # evenly spaced
