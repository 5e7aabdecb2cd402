"""Texts with labels: where they come from, how they are split, and a GPT that tells the labels apart."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import checkpoint
from cli import UserError
from corpora import text_of
from device import autocast, choose_device, choose_dtype
from loader import Batch, Epochs, stack
from model import GPT
from sources import Notes, hub_rows, load_hub, opened, records
from tokenizer import Tokenizer

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Example:
    """A text with its label."""

    text: str
    label: str


def read_table(path: Path, text_column: str, label_column: str, notes: Notes) -> list[Example]:
    """Returns the rows of a .csv, .tsv, .jsonl, .json or .parquet file; those that are dropped are noted.

    Columns named "1", "2", … are those of a table without a header. Raises UserError, naming the place, for a row
    that has no such columns.
    """
    with opened(path) as (_, stream):
        return _examples(records(path, stream, [text_column, label_column]), text_column, label_column, notes)


def from_hub(name: str, text_column: str, label_column: str, notes: Notes) -> list[Example]:
    """Returns the rows of the split "train" of a data set of the Hub, its numbered classes under their names."""
    rows, _ = load_hub(name, "--input FILE works", split="train")
    names = dict(enumerate(getattr((rows.features or {}).get(label_column), "names", [])))
    named = (
        (where, {**row, label_column: names.get(row[label_column])} if names else row)
        for where, row in hub_rows(name, rows)
    )
    return _examples(named, text_column, label_column, notes)


def _examples(rows, text_column, label_column, notes):
    labels_of, wheres = {}, {}
    for where, row in rows:
        text = notes.clean(text_of(row, text_column, where), where).strip()
        label = notes.clean(text_of(row, label_column, where, "--label-column", str | int), where).strip()
        if not text or not label:
            notes.add(f"rows without {'a label' if text else 'text'} were dropped", where)
        elif label not in labels_of.setdefault(text, [label]):
            labels_of[text].append(label)
            notes.add("rows whose text has another label elsewhere were dropped", where)
        elif wheres.setdefault(text, where) != where:
            notes.add("rows that repeat another, which would be in training and test, were dropped", where)
    for text, labels in labels_of.items():
        if len(labels) > 1:
            notes.add("rows whose text has another label elsewhere were dropped", wheres[text])
    return [Example(text, labels[0]) for text, labels in labels_of.items() if len(labels) == 1]


def split(examples: list[Example], val_fraction: float, test_fraction: float, seed: int) -> dict[str, list[Example]]:
    """Returns the examples by split, drawn by seed, each with about the same share of every label, and one at least.

    Raises UserError for fewer than two labels, and for a label that is too rare to be in every split.
    """
    by_label = {}
    for example in examples:
        by_label.setdefault(example.label, []).append(example)
    if len(by_label) < 2:
        raise UserError(f"all rows have the label {next(iter(by_label), '')!r}: there is nothing to tell apart")
    label, n = min(((label, len(rows)) for label, rows in by_label.items()), key=lambda item: item[1])
    if n < 3:
        raise UserError(
            f"the label {label!r} is seen {'once' if n == 1 else 'twice'}: one row is needed to train on, one to "
            "validate on and one to test; add more, or remove it"
        )

    random, train, val, test = np.random.default_rng(seed), [], [], []
    for _, rows in sorted(by_label.items()):
        rows = [rows[i] for i in random.permutation(len(rows))]
        n_test = min(max(1, round(test_fraction * len(rows))), len(rows) - 2)
        n_val = min(max(1, round(val_fraction * len(rows))), len(rows) - n_test - 1)
        test, val, train = test + rows[:n_test], val + rows[n_test : n_test + n_val], train + rows[n_test + n_val :]
    return {
        name: [part[i] for i in random.permutation(len(part))]
        for name, part in zip(SPLITS, (train, val, test), strict=True)
    }


def balance(examples: list[Example], seed: int) -> list[Example]:
    """Returns as many examples of each label as the rarest has, drawn by seed."""
    random, by_label = np.random.default_rng(seed), {}
    for example in examples:
        by_label.setdefault(example.label, []).append(example)
    n = min(map(len, by_label.values()))
    return [rows[i] for _, rows in sorted(by_label.items()) for i in random.choice(len(rows), n, replace=False)]


def counts(examples: list[Example]) -> str:
    """Returns how many examples have each label, for people."""
    return ", ".join(f"{n:,} {label}" for label, n in sorted(Counter(example.label for example in examples).items()))


def encode(text: str, tokenizer: Tokenizer, block_size: int) -> list[int]:
    """Returns the ids of a text, cut to `block_size`, the last of which is `<|endoftext|>`.

    That is the token where a classification is read off, as in the first GPT (Radford et al. 2018). Raises UserError
    for a text of nothing but white space.
    """
    if not (text := text.strip()):
        raise UserError("an empty text cannot be classified")
    return [*tokenizer.encode(text[: 64 * block_size])[: block_size - 1], tokenizer.end_of_text]


class Examples(Epochs):
    """Labelled texts as batches: of each row only the last position counts, and its target is the label.

    With `weights`, texts of a rare label count as often as makes all labels count about the same.
    """

    def __init__(
        self,
        examples: list[Example],
        labels: list[str],
        tokenizer: Tokenizer,
        block_size: int,
        batch_size: int = 1,
        seed: int = 0,
        weights: bool = False,
    ):
        self.ids = [encode(example.text, tokenizer, block_size) for example in examples]
        self.classes = np.array([labels.index(example.label) for example in examples])
        self.lengths = np.array([len(ids) for ids in self.ids])
        n = np.bincount(self.classes, minlength=len(labels))
        self.times = np.round(n.max() / n.clip(1)).astype(int) if weights else np.ones(len(labels), dtype=int)
        self.batch_size, self.seed = batch_size, seed

    def _row(self, i):
        return _row(self.ids[i], self.classes[i], self.times[self.classes[i]])


def _row(ids, target=0, times=1):
    tokens = torch.tensor([ids])
    return Batch(tokens, torch.full_like(tokens, int(target)), torch.tensor([len(ids) - 1] * times))


@dataclass(frozen=True)
class Classifier:
    """A model ready to classify."""

    model: GPT
    tokenizer: Tokenizer
    labels: list[str]
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    @classmethod
    def load(cls, path: str | Path, device: str = "auto", dtype: str = "auto") -> "Classifier":
        """Loads a checkpoint of train_classifier.py. Raises UserError where there is none, or no such device."""
        state, place = checkpoint.load(path, kinds=("classifier",)), choose_device(device)
        model = checkpoint.build(state, path, place)
        return cls(model, checkpoint.tokenizer(state), state["labels"], place, choose_dtype(dtype, place))

    def probabilities(self, texts: Iterable[str], batch_size: int = 32) -> Iterator[Tensor]:
        """Yields for each text the float32 probabilities (n_classes,) of the labels, on the CPU.

        A text longer than the context is judged by its beginning. Raises UserError for an empty one.
        """
        ids = (encode(text, self.tokenizer, self.model.config.block_size) for text in texts)
        while batch := list(islice(ids, batch_size)):
            yield from self._probabilities(batch)

    def show(self, examples: list[Example]) -> list[dict[str, str]]:
        """Returns of each example its text as `input`, its label as `expected`, and what the model says as `output`."""
        best = [p.max(dim=0) for p in self.probabilities(example.text for example in examples)]
        return [
            {"input": e.text, "expected": e.label, "output": f"{self.labels[label]} ({p:.3f})"}
            for e, (p, label) in zip(examples, best, strict=True)
        ]

    @torch.inference_mode()
    def _probabilities(self, ids):
        batch = stack([_row(text) for text in ids], longest=self.model.config.block_size).to(self.device)
        with autocast(self.device, self.dtype):
            last = self.model.hidden(batch.tokens).flatten(0, 1)[batch.counted]  # (B, C)
            return self.model.lm_head(last).float().softmax(dim=-1).cpu()
