"""Label texts with a model of train_classifier.py: arguments, the lines of a file, or standard input."""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from system.cli import run
from system.errors import require


@dataclass(frozen=True)
class Config:
    texts: Positional[tuple[str, ...]] = ()
    """texts to label; by default, each line of --input or of standard input"""
    model: Path | None = None
    """checkpoint of train_classifier.py; by default the newest in checkpoints/"""
    input: Path | None = None
    """file with one text per line; empty lines are skipped"""
    json: bool = False
    """print one JSON object per text: text, label, probability, and the probabilities of all labels"""
    device: str = "auto"
    """auto, cpu, cuda, mps"""
    device_check: bool = True
    """before all else, compute a few tokens on the GPU and on the CPU, and compare"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision; auto is bfloat16 on a GPU that supports it, float32 on the CPU"""

    def __post_init__(self) -> None:
        require(not (self.texts and self.input), "texts and --input exclude each other")
        require(all(text.strip() for text in self.texts), "a text is empty: leave it out")


def main(config: Config) -> None:
    """Prints the label and the probability of each text, as the texts come in."""
    from system.files import read_utf8_lines
    from training.classifier import Classifier
    from weights.describe import newest

    name = config.model or newest("classifier")
    classifier = Classifier.load(name, config.device, config.dtype, config.device_check)
    texts, to_print = tee(config.texts or skip_empty(read_utf8_lines(config.input)))
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


def skip_empty(lines: Iterable[str]) -> Iterator[str]:
    """Yields lines, stripped; skips empty lines, and reports their number at the end."""
    n_empty = 0
    for text in map(str.strip, lines):
        if text:
            yield text
        else:
            n_empty += 1
    if n_empty:
        print(f"skipped {n_empty:,} empty lines", file=sys.stderr)


if __name__ == "__main__":
    run(main, Config)
