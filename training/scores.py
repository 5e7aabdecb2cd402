"""How good a finished language model is: a text over strided windows, HellaSwag, exact match of answers."""

import json
import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from generation.config import SamplingConfig
from generation.text_model import CONFIDENCE_TOKENS, TextModel, confidence
from model import IGNORE_INDEX
from system.cli import progress
from system.device import autocast
from system.errors import UserError
from system.files import read_utf8_lines
from text.sources import hub_rows
from training.config import TrainerConfig
from training.evaluation import bits_per_byte, mean_loss
from training.examples import plain_text
from training.loader import Batch, Conversations, first_exchange, stack, strided
from training.parallel import Processes
from weights import checkpoint
from weights.loading import load_file

Question = tuple[str, list[str], int]
"""HellaSwag's context, its four endings, and the index of the true one."""
FEWEST_RIGHT, RIGHT_MARKED = 20, 0.07  # of `min_confidence`


def evaluate_text(
    text_model: TextModel, ids: np.ndarray, stride: int | None = None, batch_size: int = 8
) -> dict[str, float]:
    """Scores ids (n,), each once and with at least context - stride ids before it, if there are so many.

    The first id is not scored: it is context. Returns loss (nats per token), perplexity, bits per byte, and the counts
    behind them. `stride` is half of the context by default. Raises UserError for fewer than two ids.
    """
    model, tokenizer = text_model.model, text_model.tokenizer
    block_size = model.config.block_size
    stride = stride or max(1, block_size // 2)
    if stride > block_size:
        raise UserError(f"--stride {stride} is longer than the model's context of {block_size} tokens", status=2)
    if len(ids) < 2:
        raise UserError("there is no text to evaluate on")
    windows = progress(strided(ids, block_size, stride), total=math.ceil(len(ids) / stride), unit="window")
    loss = mean_loss(model, windows, batch_size, text_model.dtype, Processes(text_model.device))
    n, scored = len(ids) - 1, ids[1:][ids[1:] < tokenizer.end_of_text]
    n_bytes = int(tokenizer.token_sizes()[0][scored].sum())
    figures = {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits_per_byte(loss, max(1, n_bytes) / n)}
    return {**figures, "tokens": n, "bytes": n_bytes, "stride": stride}


@torch.inference_mode()
def evaluate_hellaswag(text_model: TextModel, questions: Iterable[Question]) -> dict[str, float]:
    """Returns the accuracy on HellaSwag (Zellers et al. 2019): how often the true ending of four is the likeliest.

    `acc` compares the sums of the log-probabilities of the endings' tokens, `acc_norm` their means. The text of a
    question is its context, a space and the ending. Raises UserError without questions.
    """
    model, encode, block_size = text_model.model, text_model.tokenizer.encode, text_model.model.config.block_size
    n = n_right = n_right_by_mean = 0
    for context, endings, label in progress(questions, unit="question"):
        rows = []
        for ending in map(encode, (" " + ending for ending in endings)):
            tokens = torch.tensor([encode(context) + ending])[:, -block_size - 1 :]
            targets = tokens[:, 1:].clone()
            targets[:, : -len(ending)] = IGNORE_INDEX
            rows.append(Batch(tokens[:, :-1], targets))
        batch = stack(rows, block_size).to(text_model.device)
        with autocast(text_model.device, text_model.dtype):
            logits = model(batch.tokens)  # (4, T, V)
        losses = F.cross_entropy(logits.float().mT, batch.targets, reduction="none").sum(dim=1)  # (4,)
        n, n_right = n + 1, n_right + int(losses.argmin() == label)
        n_right_by_mean += int((losses / (batch.targets != IGNORE_INDEX).sum(dim=1)).argmin() == label)
    if not n:
        raise UserError("HellaSwag's file holds no question")
    return {"acc": n_right / n, "acc_norm": n_right_by_mean / n, "questions": n}


def read_hellaswag(path: Path | None = None) -> Iterator[Question]:
    """Yields the questions of a file in the published format, or those of the Hub's validation split.

    Raises UserError, naming file and line, for anything else.
    """
    if path is None:
        for _, row in hub_rows("Rowan/hellaswag", split="validation"):
            yield row["ctx"], row["endings"], int(row["label"])
        return
    for number, line in enumerate(read_utf8_lines(path), 1):
        try:
            row = json.loads(line)
            context, endings, label = str(row["ctx"]), list(map(str, row["endings"])), int(row["label"])
            if len(endings) != 4 or not 0 <= label < 4:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}, line {number}: expected HellaSwag's `ctx`, four `endings` and `label`") from None
        yield context, endings, label


def answers_exactly(text_model: TextModel, question: list[int], answer: list[int]) -> bool:
    """Returns whether the model, decoding greedily, continues the ids of a question with those of the answer.

    It does if each token of the answer is the likeliest one after those before it, so one forward pass is enough.
    """
    tokens = text_model.score(question + answer, top_logprobs=1)[len(question) :]
    return all(token.candidates[0][0] == token.id for token in tokens)


def min_confidence(text_model: TextModel, conversations: Conversations, n: int = 300) -> tuple[float, str]:
    """Asks the first questions of up to `n` conversations in random order (their batch size is 1).

    Returns the confidence below which an answer is to be marked as a guess, so that RIGHT_MARKED of those that are
    right word for word are marked, and what that marks, in words. Returns 0 if too few are right to tell.
    """
    greedy = SamplingConfig(greedy=True, max_new_tokens=CONFIDENCE_TOKENS)
    right: list[float] = []
    wrong: list[float] = []
    for step in progress(range(min(n, len(conversations))), unit="question"):
        [conversation] = conversations.batch(step)
        question, answer = first_exchange(conversation)
        *_, [sample] = text_model.stream(question, greedy, top_logprobs=0)
        (right if answers_exactly(text_model, question, answer) else wrong).append(confidence(sample.tokens))
        if len(right) < FEWEST_RIGHT <= len(wrong) / 2:
            break
    if len(right) < FEWEST_RIGHT:
        return 0.0, "too few questions are answered word for word to tell guesses from knowledge"
    least = sorted(right)[int(RIGHT_MARKED * len(right))]
    marked = " and ".join(
        f"{sum(value < least for value in values)} of {len(values)} that are {name}"
        for name, values in (("wrong", wrong), ("right", right))
    )
    return least, f"answers with a confidence below {least:.2f} are marked as guesses: {marked}"


def mark_guesses(config: TrainerConfig, questions: Conversations) -> str:
    """Measures and stores `min_confidence` in the chat model of a run that ended; returns what that marks, in words."""
    least, what_it_marks = min_confidence(TextModel.load(config.out, config.device, config.dtype), questions)
    checkpoint.save(config.out, {**load_file(config.out), "min_confidence": least})
    return what_it_marks


def exact_match_report(text_model: TextModel, data: Path, split: str, n: int = 500, n_shown: int = 5) -> str:
    """Asks up to `n` different first questions of the conversations in a folder, in random order.

    Returns how many answers match the data word for word, and the first `n_shown` answers.
    """
    conversations = Conversations(data, split, text_model.model.config.block_size, batch_size=1, seed=0)
    exchanges = conversations.first_exchanges(len(conversations))
    exchanges = list({str(exchange): exchange for exchange in exchanges}.values())
    exchanges = random.Random(0).sample(exchanges, min(n, len(exchanges)))
    n_exact = sum(answers_exactly(text_model, *exchange) for exchange in progress(exchanges, unit="question"))
    share = 100 * n_exact // len(exchanges)
    lines = [f"{n_exact} of {len(exchanges)} answered word for word ({share}%), for example:"]
    for ids, _ in exchanges[:n_shown]:
        answer = text_model.write(ids, SamplingConfig(greedy=True, max_new_tokens=60), strip=True)
        lines.append(f"> {plain_text(ids, text_model.tokenizer)}\n  {answer}")
    return "\n".join(lines)
