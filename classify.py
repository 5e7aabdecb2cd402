"""Label texts with a model of train_classifier.py: arguments, the lines of a file, or standard input."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import tee
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from system.cli import run
from system.errors import UserError, require


@dataclass(frozen=True)
class Config:
    texts: Positional[tuple[str, ...]] = field(default=())
    """texts to label; by default, each line of --input or of standard input"""
    model: Path = Path("checkpoints/spam.pt")
    """checkpoint of train_classifier.py"""
    input: Path | None = None
    """file with one text per line"""
    json: bool = False
    """print one JSON object per text: text, label, probability, and the probabilities of all labels"""
    device: str = "auto"
    """auto, cpu, cuda, mps"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision; auto is bfloat16 on a GPU that supports it, float32 on the CPU"""

    def __post_init__(self) -> None:
        require(not (self.texts and self.input), "texts and --input exclude each other")
        require(all(text.strip() for text in self.texts), "a text is empty: leave it out")


def main(config: Config) -> None:
    """Prints the label and the probability of each text, as the texts come in."""
    from training.classifier import Classifier

    classifier = Classifier.load(config.model, config.device, config.dtype)
    texts, to_print = tee(config.texts or lines(config.input))
    is_typed = not config.texts and config.input is None and sys.stdin.isatty()
    batch_size = 1 if is_typed else 32  # who types wants an answer after every line
    for text, probabilities in zip(to_print, classifier.probabilities(texts, batch_size), strict=True):
        best = int(probabilities.argmax())
        label, probability = classifier.labels[best], probabilities[best].item()
        if config.json:
            by_label = dict(zip(classifier.labels, probabilities.tolist(), strict=True))
            fields = {"text": text, "label": label, "probability": probability, "probabilities": by_label}
            print(json.dumps(fields, ensure_ascii=False), flush=True)
        else:
            print(f"{label}\t{probability:.4f}", flush=True)


def lines(path: Path | None) -> Iterator[str]:
    """Yields the lines of a file or of standard input, stripped; skips empty lines and reports their number.

    Raises UserError for a line that is not UTF-8.
    """
    n_empty = 0
    with open(path, "rb") if path else sys.stdin.buffer as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8").strip()
            except UnicodeDecodeError:
                raise UserError(f"{path or 'standard input'}, line {number} is not UTF-8: convert it first") from None
            if text:
                yield text
            else:
                n_empty += 1
    if n_empty:
        print(f"skipped {n_empty:,} empty lines", file=sys.stderr)


if __name__ == "__main__":
    run(main, Config)
