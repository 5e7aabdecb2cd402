"""Texts with labels: where they come from and how they are split."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from system.errors import UserError
from text.corpora import text_of
from text.readers import Notes, hub_rows, load_hub, opened, records

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Example:
    """A text with its label."""

    text: str
    label: str


def read_examples(path: Path | None, dataset: str, text_column: str, label_column: str) -> list[Example]:
    """Returns the labelled texts of a file, or of a data set of the Hub, and prints what was dropped.

    Raises UserError if nothing is left.
    """
    notes = Notes()
    if path:
        examples = read_table(path, text_column, label_column, notes)
    elif dataset == "sms-spam":
        examples = from_hub("ucirvine/sms_spam", "sms", "label", notes)
    else:
        examples = from_hub(dataset, text_column, label_column, notes)
    for line in notes.lines():
        print(line)
    if not examples:
        raise UserError(f"{path or dataset} holds no labelled text{notes.in_brackets()}")
    return examples


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


def counts(examples: list[Example]) -> str:
    """Returns how many examples have each label, for people."""
    return ", ".join(f"{n:,} {label}" for label, n in sorted(Counter(example.label for example in examples).items()))
