"""Texts with labels: how they are read and split."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from system.errors import UserError
from text.readers import Notes, hub_rows, load_hub, opened, records, text_of
from text.registry import LABELLED

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
    elif named := LABELLED.get(dataset):
        examples = from_hub(named.hub, named.text_column, named.label_column, notes)
    else:
        examples = from_hub(dataset, text_column, label_column, notes)
    for line in notes.lines():
        print(line)
    if not examples:
        raise UserError(f"{path or dataset} holds no labelled text{notes.in_brackets()}")
    return examples


def read_table(path: Path, text_column: str, label_column: str, notes: Notes) -> list[Example]:
    """Returns the rows of a .csv, .tsv, .jsonl, .json or .parquet file; `notes` counts the rows that are dropped.

    Columns named "1", "2", … are those of a table without a header. Raises UserError, naming the place, for a row
    that lacks one of the columns.
    """
    with opened(path) as (_, stream):
        return _examples(records(path, stream, [text_column, label_column]), text_column, label_column, notes)


def from_hub(name: str, text_column: str, label_column: str, notes: Notes) -> list[Example]:
    """Returns the rows of the split "train" of a data set of the Hub; `notes` counts the rows that are dropped.

    Labels that the data set stores as numbers are given their names. Raises UserError if the Hub cannot be reached.
    """
    rows, _ = load_hub(name, "--input FILE works", split="train")
    names = dict(enumerate(getattr((rows.features or {}).get(label_column), "names", [])))
    named = (
        (where, {**row, label_column: names.get(row[label_column])} if names else row)
        for where, row in hub_rows(name, rows)
    )
    return _examples(named, text_column, label_column, notes)


def _examples(rows: Iterable[tuple[str, object]], text_column: str, label_column: str, notes: Notes) -> list[Example]:
    contradicts = "rows whose text has another label elsewhere were dropped"
    labels_of: dict[str, list[str]] = {}  # by text
    first_place: dict[str, str] = {}  # by text
    for where, row in rows:
        text = notes.clean(text_of(row, text_column, where), where).strip()
        label = notes.clean(text_of(row, label_column, where, "--label-column", str | int), where).strip()
        if not text or not label:
            notes.add(f"rows without {'a label' if text else 'text'} were dropped", where)
        elif text not in labels_of:
            labels_of[text], first_place[text] = [label], where
        elif label in labels_of[text]:
            notes.add("rows that repeat another one were dropped, or training and test would share them", where)
        else:
            labels_of[text].append(label)
            notes.add(contradicts, where)
    for text, labels in labels_of.items():
        if len(labels) > 1:
            notes.add(contradicts, first_place[text])
    return [Example(text, labels[0]) for text, labels in labels_of.items() if len(labels) == 1]


def split(examples: list[Example], val_fraction: float, test_fraction: float, seed: int) -> dict[str, list[Example]]:
    """Returns the examples by split ("train", "val", "test"), shuffled by seed.

    Every split has about the same share of each label, and at least one example of it. Raises UserError for fewer than
    two labels, or if a label is too rare to be in every split.
    """
    by_label: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_label[example.label].append(example)
    _require_enough(by_label)

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


def _require_enough(by_label: dict[str, list[Example]]) -> None:
    if len(by_label) < 2:
        raise UserError(
            f"all rows have the label {next(iter(by_label), '')!r}: a classifier needs texts of two labels or more"
        )
    label, rows = min(by_label.items(), key=lambda item: len(item[1]))
    if len(rows) < 3:
        times = "once" if len(rows) == 1 else "twice"
        raise UserError(
            f"the label {label!r} is seen {times}: one text each is needed to train, to validate and to test; "
            "add texts with that label, or remove it"
        )


def one_of_each(examples: list[Example], n: int) -> list[Example]:
    """Returns at most `n` examples: one of each label, then another one of each, and so on."""
    seen: Counter[str] = Counter()
    ranked = []
    for i, example in enumerate(examples):
        ranked.append((seen[example.label], i))
        seen[example.label] += 1
    return [examples[i] for _, i in sorted(ranked)[:n]]


def counts(examples: list[Example]) -> str:
    """Returns how many examples have each label, as text."""
    return ", ".join(f"{n:,} {label}" for label, n in sorted(Counter(example.label for example in examples).items()))
