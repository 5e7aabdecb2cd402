"""What a model is worth: loss, perplexity and bits per byte on any text, accuracy on HellaSwag."""

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from system.cli import run
from system.errors import UserError, require, require_at_least

PUBLISHED = (
    "published for OpenAI's GPT-2 124M: completion style, as here, acc 0.2859 and acc_norm 0.2955 (hellaswag.py "
    "of llm.c); Eleuther's harness 0.2892 and 0.3114"
)


@dataclass(frozen=True)
class Config:
    model: Path = Path("checkpoints/pretrained.pt")
    """checkpoint, or gpt2 or another model of the Hugging Face Hub"""
    data: Path | None = None
    """a folder of prepared data, whose validation split is read, or one token file (.bin)"""
    text: Path | None = None
    """a text file; without --data, --text and --hellaswag, standard input"""
    hellaswag: Annotated[tuple[Path, ...] | None, arg(metavar="[FILE]")] = None
    """HellaSwag's questions: a file in the published format, hellaswag_val.jsonl; without one, from the Hub"""
    stride: int | None = None
    """tokens scored at a time, with the rest of the context before them; half of the context where it is not given"""
    max_tokens: int | None = None
    """read so many tokens of --data or --text at most"""
    batch_size: int = 8
    """windows, or questions, that are computed at a time"""
    json: bool = False
    """print one JSON object"""
    device: str = "auto"
    """auto, cpu, cuda, mps"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision; auto takes bfloat16 where the GPU has it, float32 on the CPU"""

    def __post_init__(self):
        require_at_least(1, self, "stride", "max_tokens", "batch_size")
        given = sum(source is not None for source in (self.data, self.text, self.hellaswag))
        require(given <= 1, "--data, --text and --hellaswag exclude each other")
        require(len(self.hellaswag or ()) <= 1, "--hellaswag takes one file")


def main(config: Config) -> None:
    """Evaluates one model."""
    from generation.text_model import TextModel
    from system.device import choose_device, choose_dtype
    from weights import checkpoint

    state, device = checkpoint.load(config.model), choose_device(config.device)
    model = checkpoint.build(state, config.model, device)  # its weights in float32, as in training
    text_model = TextModel(model, checkpoint.tokenizer(state), dtype=choose_dtype(config.dtype, device))
    if config.hellaswag is not None:
        figures = hellaswag(text_model, config)
        people = f"acc {figures['acc']:.4f}, acc_norm {figures['acc_norm']:.4f} on {figures['questions']:,} questions"
        people += f"\n({PUBLISHED})"
    else:
        figures = losses(text_model, config)
        people = (
            f"loss {figures['loss']:.4f} nats per token, perplexity {figures['perplexity']:,.3f}, "
            f"{figures['bits_per_byte']:.4f} bits per byte, on {figures['tokens']:,} tokens"
        )
    print(json.dumps({"model": str(config.model), **figures}) if config.json else people)


def losses(text_model, config: Config) -> dict:
    """Returns the figures of a text: each token scored once, with at least context - stride tokens before it, where
    there are so many."""
    from tqdm import tqdm

    from training.loader import strided
    from training.trainer import evaluate

    block_size = text_model.model.config.block_size
    stride = config.stride or max(1, block_size // 2)
    require(stride <= block_size, f"--stride {stride} is longer than the model's context of {block_size} tokens")
    ids = read_ids(text_model.tokenizer, config)[: config.max_tokens and config.max_tokens + 1]
    if len(ids) < 2:
        raise UserError("there is no text to evaluate on")
    if ids.max() >= text_model.model.config.vocab_size:
        raise UserError(f"{config.data} holds ids that the model does not have: prepare it with the model's tokenizer")
    windows = tqdm(strided(ids, block_size, stride), total=math.ceil(len(ids) / stride), unit=" windows", leave=False)
    loss = evaluate(text_model.model, windows, config.batch_size, text_model.device, text_model.dtype)
    scored = ids[1:][ids[1:] < text_model.tokenizer.end_of_text]
    n_bytes = int(text_model.tokenizer.token_sizes()[0][scored].sum())
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": loss * (len(ids) - 1) / math.log(2) / max(1, n_bytes),
        "tokens": len(ids) - 1,
        "bytes": n_bytes,
        "stride": stride,
    }


def read_ids(tokenizer, config: Config):
    """Returns the ids to score (uint16), behind one that is not: of a text `<|endoftext|>`, of a file its first."""
    import numpy as np

    from text.token_files import read_token_meta, read_tokens
    from text.tokenizer import load_beside

    if config.data and config.data.suffix == ".bin":
        return read_tokens(config.data)
    if config.data:
        meta = read_token_meta(config.data)
        if (theirs := load_beside(config.data, meta).name) != tokenizer.name:
            raise UserError(f"{config.data} was prepared with the tokenizer {theirs}, the model has {tokenizer.name}")
        return np.concatenate([read_tokens(config.data / name) for name in meta["files"] if "val" in name])
    try:
        content = config.text.read_bytes() if config.text else sys.stdin.buffer.read()
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{config.text or 'standard input'} is not UTF-8 text") from None
    return np.array([tokenizer.end_of_text, *tokenizer.encode(text)], dtype=np.uint16)


def hellaswag(text_model, config: Config) -> dict:
    """Returns accuracy on HellaSwag (Zellers et al. 2019): how often the true ending of four is the likeliest, by the
    sum of its tokens' log-probabilities (acc) and by their mean (acc_norm). An ending follows context and a space."""
    from itertools import islice

    from tqdm import tqdm

    right, right_norm, n = 0, 0, 0
    questions = iter(tqdm(read_questions(*config.hellaswag), unit=" questions", leave=False))
    while batch := list(islice(questions, config.batch_size)):
        sums, means = ending_scores(text_model, batch)
        labels = [label for _, _, label in batch]
        right += sum(int(row.argmax()) == label for row, label in zip(sums, labels, strict=True))
        right_norm += sum(int(row.argmax()) == label for row, label in zip(means, labels, strict=True))
        n += len(batch)
    if not n:
        raise UserError("there is no question in HellaSwag's file")
    return {"acc": right / n, "acc_norm": right_norm / n, "questions": n}


def read_questions(path: Path | None = None) -> Iterator[tuple[str, list[str], int]]:
    """Yields context, four endings and the true one's number, of a file or of the Hub's split "validation".

    Raises UserError, naming the place, for anything else.
    """
    from text.readers import hub_rows, load_hub, opened, records

    with contextlib.ExitStack() as stack:
        if path:
            rows = records(path, stack.enter_context(opened(path))[1])
        else:
            name = "Rowan/hellaswag"
            rows = hub_rows(name, load_hub(name, "--hellaswag FILE works", split="validation")[0])
        for where, row in rows:
            try:
                context, endings, label = row["ctx"], row["endings"], int(row["label"])
                if len(endings) != 4 or not 0 <= label < 4 or not all(isinstance(t, str) for t in (context, *endings)):
                    raise ValueError
            except (KeyError, TypeError, ValueError):
                raise UserError(f"{where}: wanted `ctx`, four `endings` and `label` as HellaSwag has them") from None
            yield context, endings, label


def ending_scores(text_model, questions: list) -> tuple:
    """Returns sums and means (n, 4) of the log-probabilities of each ending's tokens after its context."""
    from itertools import count

    import torch

    from system.device import autocast

    tokenizer, block_size = text_model.tokenizer, text_model.model.config.block_size
    rows, lengths = [], []
    for context, endings, _ in questions:
        before = tokenizer.encode(context)
        for ending in endings:
            after = tokenizer.encode(" " + ending)
            rows.append([*before, *after][-block_size - 1 :])
            lengths.append(min(len(after), len(rows[-1]) - 1))
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    with torch.inference_mode(), autocast(text_model.device, text_model.dtype):
        logprobs = text_model.model(tokens[:, :-1].to(text_model.device)).float().log_softmax(dim=-1)
        of_tokens = logprobs.gather(-1, tokens[:, 1:, None].to(text_model.device))[..., 0].cpu()
    spans = [of_tokens[i, len(row) - 1 - n : len(row) - 1] for i, row, n in zip(count(), rows, lengths, strict=False)]
    sums, means = ([f(span) for span in spans] for f in (torch.sum, torch.mean))
    return torch.stack(sums).view(-1, 4), torch.stack(means).view(-1, 4)


if __name__ == "__main__":
    run(main, Config)
