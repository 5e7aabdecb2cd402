"""How good a language model is: mean loss, bits per byte, perplexity over strided windows, HellaSwag."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from generation.text_model import TextModel
from model import GPT, ChunkLoss, chunk_loss
from system.cli import progress
from system.device import autocast
from system.errors import UserError
from text.readers import hub_rows, load_hub, opened, records
from training.loader import Batch, micro_batches, require_known_ids, strided
from training.parallel import Processes

Question = tuple[str, list[str], int]
"""HellaSwag's context, its four endings, and the index of the true one."""


@torch.no_grad()
def mean_loss(
    model: GPT,
    rows: Iterable[Batch],
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    processes: Processes | None = None,
    compiled: tuple[Callable[..., Tensor], ChunkLoss] | None = None,
) -> float:
    """Returns the mean loss in nats per counted token over one-row batches, in evaluation mode.

    `processes`, on whose device the model is, share the rows. `compiled`, from `compile_evaluation`, computes the
    batches of full size. Raises UserError if no token counts.
    """
    processes = processes or Processes()
    device, was_training, compiled_training = processes.device, model.training, model.compiled
    model.eval()
    # The sum of the losses, and of their weights. MPS has no float64.
    total = torch.zeros(2, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    rows = iter(rows)
    while group := list(itertools.islice(rows, batch_size)):
        require_known_ids(group, model.config)
        [batch] = micro_batches(group, 1, processes.rank, processes.world_size, model.config.block_size)
        is_full = batch.tokens.shape == (batch_size, model.config.block_size)
        model.compiled = compiled if is_full else None  # another shape would recompile
        weight = batch.total_weight
        batch = batch.to(device)
        with autocast(device, dtype):
            loss = model(batch.tokens, batch.targets, batch.class_weights)
        total += torch.stack([loss.to(total.device).double(), total.new_full((), weight)])
    processes.sum_in_place(total)
    model.train(was_training)
    model.compiled = compiled_training
    loss_sum, weight_sum = total.tolist()
    if not weight_sum:
        raise UserError("the validation data is empty: prepare it with a larger --val-fraction")
    return loss_sum / weight_sum


def compile_evaluation(model: GPT) -> tuple[Callable[..., Tensor], ChunkLoss]:
    """Compiles the network and the loss of a chunk for `mean_loss`.

    They are functions of their own: without gradients, those that `GPT.compile_training` compiled would recompile.
    """
    return torch.compile(lambda *inputs: model.hidden(*inputs)), torch.compile(lambda *inputs: chunk_loss(*inputs))


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Turns a loss in nats per token into bits per UTF-8 byte of text, which compares models across tokenizers."""
    return loss / math.log(2) / bytes_per_token


def perplexity(loss: float) -> float:
    """Returns exp(loss), with the largest losses capped so that the result stays finite."""
    return math.exp(min(loss, 700))


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
    n = len(ids) - 1
    windows = progress(strided(ids, block_size, stride), total=math.ceil(len(ids) / stride), unit="window")
    loss = mean_loss(model, windows, batch_size, text_model.dtype, Processes(text_model.device))
    scored = ids[1:][ids[1:] < tokenizer.end_of_text]
    n_bytes = int(tokenizer.token_sizes()[0][scored].sum())
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": bits_per_byte(loss, max(1, n_bytes) / n),
        "tokens": n,
        "bytes": n_bytes,
        "stride": stride,
    }


def evaluate_hellaswag(text_model: TextModel, questions: Iterable[Question], batch_size: int = 8) -> dict[str, float]:
    """Returns the accuracy on HellaSwag (Zellers et al. 2019): how often the true ending of four is the likeliest.

    `acc` compares the sums of the log-probabilities of the endings' tokens, `acc_norm` their means. The text of a
    question is its context, a space and the ending. Raises UserError without questions.
    """
    n_right, n_right_norm, n = 0, 0, 0
    iterator = iter(progress(questions, unit="question"))
    while batch := list(itertools.islice(iterator, batch_size)):
        sums, means = ending_scores(text_model, batch)
        labels = torch.tensor([label for _, _, label in batch])
        n_right += int((sums.argmax(dim=1) == labels).sum())
        n_right_norm += int((means.argmax(dim=1) == labels).sum())
        n += len(batch)
    if not n:
        raise UserError("HellaSwag's file holds no question")
    return {"acc": n_right / n, "acc_norm": n_right_norm / n, "questions": n}


def read_hellaswag(path: Path | None = None) -> Iterator[Question]:
    """Yields the questions of a file in the published format, or those of the Hub's validation split.

    Raises UserError, naming file and line, for anything else.
    """
    if path:
        with opened(path) as (_, stream):
            yield from map(check_question, records(path, stream))
    else:
        name = "Rowan/hellaswag"
        rows, _ = load_hub(name, "--hellaswag FILE works", split="validation")
        yield from map(check_question, hub_rows(name, rows))


def check_question(record: tuple[str, dict]) -> Question:
    """Returns the question in a record, which comes with the place where it was read. Raises UserError."""
    where, row = record
    try:
        context, endings, label = row["ctx"], row["endings"], int(row["label"])
        if len(endings) != 4 or not 0 <= label < 4 or not all(isinstance(text, str) for text in (context, *endings)):
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError):  # int(Infinity) is an overflow
        raise UserError(f"{where}: expected `ctx`, four `endings` and `label`, as in HellaSwag") from None
    return context, endings, label


def ending_scores(text_model: TextModel, questions: list[Question]) -> tuple[Tensor, Tensor]:
    """Returns sums and means, float32 (n, 4), of the log-probabilities of each ending's tokens after its context."""
    tokenizer, block_size = text_model.tokenizer, text_model.model.config.block_size
    rows, lengths = [], []
    for context, endings, _ in questions:
        context_ids = tokenizer.encode(context)
        for ending in endings:
            ending_ids = tokenizer.encode(" " + ending)
            rows.append([*context_ids, *ending_ids][-block_size - 1 :])
            lengths.append(min(len(ending_ids), len(rows[-1]) - 1))
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    tokens = tokens.to(text_model.device)
    with torch.inference_mode(), autocast(text_model.device, text_model.dtype):
        logprobs = text_model.model(tokens[:, :-1]).float().log_softmax(dim=-1)
    of_tokens = logprobs.gather(-1, tokens[:, 1:, None])[..., 0].cpu()  # (4n, T - 1)
    endings_only = [of_tokens[i, len(row) - 1 - lengths[i] : len(row) - 1] for i, row in enumerate(rows)]
    sums = torch.stack([scores.sum() for scores in endings_only])
    means = torch.stack([scores.mean() for scores in endings_only])
    return sums.view(-1, 4), means.view(-1, 4)
