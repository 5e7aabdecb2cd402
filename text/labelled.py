"""Texts with labels: how they are read and split."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from system.errors import UserError
from text.sources import LABELLED, Notes, hub_rows, read_rows, text_of

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Example:
    """A text with its label."""

    text: str
    label: str


def read_examples(
    file: str | Path | None, dataset: str, text_column: str, label_column: str
) -> tuple[list[Example], Notes]:
    """Returns the labelled texts of a table, or without it of a data set of the Hub, and notes about dropped rows.

    Raises UserError if nothing is left, or, naming the place, for a row that lacks one of the columns.
    """
    notes = Notes()
    if not file:
        dataset, text_column = LABELLED.get(dataset, (dataset, text_column))
    labels: dict[str, str | None] = {}  # by text; None if labels contradict each other
    for where, row in read_rows(str(file), [text_column, label_column]) if file else hub_rows(dataset):
        text = notes.clean(text_of(row, text_column, where), where).strip()
        label = notes.clean(text_of(row, label_column, where, "--label-column", str | int), where).strip()
        if not text or not label:
            notes.add(f"rows without {'a label' if text else 'text'} were dropped", where)
        elif text not in labels:
            labels[text] = label
        elif labels[text] == label:
            notes.add("rows that repeat another one were dropped, or training and test would share them", where)
        else:
            n = 1 if labels[text] is None else 2
            notes.add("rows whose text has another label elsewhere were dropped", where, n)
            labels[text] = None
    examples = [Example(text, label) for text, label in labels.items() if label is not None]
    if not examples:
        raise UserError(f"{file or dataset} holds no labelled text{notes.in_brackets()}")
    return examples, notes


def split(examples: list[Example], val_fraction: float, test_fraction: float, seed: int) -> dict[str, list[Example]]:
    """Returns the examples by split ("train", "val", "test"), shuffled by seed.

    Every split has about the same share of each label, and at least one example of it. Raises UserError for fewer than
    two labels, or if a label is too rare to be in every split.
    """
    by_label: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_label[example.label].append(example)
    if len(by_label) < 2:
        raise UserError(f"all rows have the label {next(iter(by_label), '')!r}: add texts with other labels")
    rarest = min(by_label, key=lambda label: len(by_label[label]))
    if len(by_label[rarest]) < 3:
        remedy = "one each is needed to train, to validate and to test; add texts with that label, or remove it"
        raise UserError(f"the label {rarest!r} has fewer than three texts: {remedy}")

    # scikit-learn's `train_test_split(stratify=…)` only rounds shares: it leaves a label of three texts out of a split.
    random = np.random.default_rng(seed)
    parts: dict[str, list[Example]] = {name: [] for name in SPLITS}
    for _, rows in sorted(by_label.items()):
        rows = [rows[i] for i in random.permutation(len(rows))]
        n_test = min(max(1, round(test_fraction * len(rows))), len(rows) - 2)
        n_val = min(max(1, round(val_fraction * len(rows))), len(rows) - n_test - 1)
        parts["test"] += rows[:n_test]
        parts["val"] += rows[n_test : n_test + n_val]
        parts["train"] += rows[n_test + n_val :]
    return {name: [part[i] for i in random.permutation(len(part))] for name, part in parts.items()}


def one_of_each(examples: list[Example], n: int) -> list[Example]:
    """Returns at most `n` examples: one of each label, then another one of each, and so on."""
    seen: Counter[str] = Counter()
    rounds = []
    for example in examples:
        rounds.append((seen[example.label], example))
        seen[example.label] += 1
    return [example for _, example in sorted(rounds, key=lambda pair: pair[0])][:n]


def counts(examples: list[Example]) -> str:
    """Returns how many examples have each label, as text."""
    return ", ".join(f"{n:,} {label}" for label, n in sorted(Counter(example.label for example in examples).items()))
