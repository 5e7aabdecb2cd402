"""Label texts with a model of train_classifier.py: texts given as arguments, a file's lines, or standard input's."""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import tee
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from system.cli import run
from system.errors import require


@dataclass(frozen=True)
class Config:
    texts: Positional[tuple[str, ...]] = field(default=())
    """texts to label; without any, every line of --input or of standard input is one"""
    model: Path = Path("checkpoints/spam.pt")
    """checkpoint of train_classifier.py"""
    input: Path | None = None
    """a file with one text a line"""
    json: bool = False
    """print one JSON object a line: text, label, probability, and the probabilities of all labels"""
    device: str = "auto"
    """auto, cpu, cuda, mps"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision; auto takes bfloat16 where the GPU has it, float32 on the CPU"""

    def __post_init__(self):
        require(not (self.texts and self.input), "texts and --input exclude each other")
        require(all(text.strip() for text in self.texts), "a text is empty")


def main(config: Config) -> None:
    """Prints label and probability of each text, as the texts come in."""
    from system.files import read_utf8_lines
    from training.classifier import Classifier

    classifier = Classifier.load(config.model, config.device, config.dtype)
    texts, to_print = tee(config.texts or with_text(read_utf8_lines(config.input)))
    batch_size = 32 if config.texts or config.input or not sys.stdin.isatty() else 1
    for text, probabilities in zip(to_print, classifier.probabilities(texts, batch_size), strict=True):
        best = int(probabilities.argmax())
        label, probability = classifier.labels[best], probabilities[best].item()
        if config.json:
            of_all = dict(zip(classifier.labels, probabilities.tolist(), strict=True))
            line = {"text": text, "label": label, "probability": probability, "probabilities": of_all}
            print(json.dumps(line, ensure_ascii=False), flush=True)
        else:
            print(f"{label}\t{probability:.4f}", flush=True)


def with_text(lines: Iterable[str]) -> Iterator[str]:
    """Yields the lines that hold text, stripped; says at the end how many were empty."""
    n_empty = 0
    for line in lines:
        text = line.strip()
        if text:
            yield text
        else:
            n_empty += 1
    if n_empty:
        print(f"{n_empty:,} empty lines were passed over", file=sys.stderr)


if __name__ == "__main__":
    run(main, Config)
