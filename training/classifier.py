"""A GPT that classifies texts: their batches, what trains, predictions, and the test at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import GPT, IGNORE_INDEX
from system.device import autocast
from system.errors import UserError, require
from text.labelled import Example
from text.tokenizer import Tokenizer, unix_line_ends
from training.config import TrainerConfig
from training.loader import Batch, Sequences, stack
from training.plots import draw_confusion_matrix
from training.state import Examine, TrainingState
from weights import checkpoint
from weights.loading import load_checkpoint


def encode(text: str, tokenizer: Tokenizer, block_size: int) -> list[int]:
    """Returns the ids of a text, cut so that they end with `<|endoftext|>` and fit into `block_size`: there the model
    classifies, as the first GPT did (Radford et al. 2018). Raises UserError for an empty text."""
    if not (text := unix_line_ends(text).strip()):
        raise UserError("an empty text cannot be classified")
    return [*tokenizer.encode(text[: 64 * block_size])[: block_size - 1], tokenizer.end_of_text]


class LabelledTexts(Sequences):
    """Labelled texts as batches. Only the last position of a text counts, and its target is the label's index."""

    def __init__(
        self,
        examples: list[Example],
        labels: list[str],
        tokenizer: Tokenizer,
        block_size: int,
        batch_size: int = 1,
        seed: int = 0,
        class_weights: bool = False,
    ):
        """`class_weights` weights the loss of each text by the inverse frequency of its label."""
        self.ids = [encode(example.text, tokenizer, block_size) for example in examples]
        self.classes = np.array([labels.index(example.label) for example in examples])
        self.lengths = np.array([len(ids) for ids in self.ids])
        n = np.bincount(self.classes, minlength=len(labels)).clip(1)
        self.class_weights = torch.from_numpy(n.max() / n).float() if class_weights else None
        self.batch_size, self.seed = batch_size, seed

    def row(self, i: int) -> Batch:
        return one_row(self.ids[i], int(self.classes[i]), self.class_weights)


def one_row(ids: list[int], label: int = 0, class_weights: Tensor | None = None) -> Batch:
    """Returns a Batch of one text in which the last position counts."""
    targets = torch.full((1, len(ids)), IGNORE_INDEX)
    targets[0, -1] = label
    return Batch(torch.tensor([ids]), targets, class_weights)


def freeze(model: GPT, train_layers: str | int) -> None:
    """Freezes a model except its head and, for a number, that many last blocks and the final LayerNorm; "all" freezes
    nothing, "head" all but the head. Raises UserError for more blocks than there are."""
    if train_layers == "all":
        return
    n = 0 if train_layers == "head" else int(train_layers)
    require(0 <= n <= len(model.h), f"--train-layers {n}: the model has {len(model.h)} blocks")
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    if n:
        model.h[-n:].requires_grad_(True)
        model.ln_f.requires_grad_(True)


@dataclass(frozen=True)
class Classifier:
    """A model ready to classify."""

    model: GPT
    tokenizer: Tokenizer
    labels: list[str]
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    @classmethod
    def load(cls, path: str | Path, device: str = "auto", dtype: str = "auto", device_check: bool = True) -> Classifier:
        """Loads a checkpoint of train_classifier.py. Raises UserError if there is none, or as `checkpoint.place`."""
        state = load_checkpoint(path, kinds=("classifier",))
        model, precision = checkpoint.place(state, device, dtype, device_check)
        return cls(model, checkpoint.tokenizer_of(state), state["labels"], model.wte.weight.device, precision)

    def probabilities(self, texts: Iterable[str], batch_size: int = 32) -> Iterator[Tensor]:
        """Yields for each text the float32 probabilities (n_classes,) of the labels, on the CPU.

        A text longer than the context is judged by its beginning. Raises UserError for an empty text.
        """
        block_size = self.model.config.block_size
        rows = (one_row(encode(text, self.tokenizer, block_size)) for text in texts)
        while some := list(islice(rows, batch_size)):
            batch = stack(some, block_size).to(self.device)
            with torch.inference_mode(), autocast(self.device, self.dtype):
                last = self.model.hidden(batch.tokens)[batch.targets != IGNORE_INDEX]  # (B, C)
                found = self.model.lm_head(last).float().softmax(dim=-1).cpu()
            yield from found


def predictions(examples: list[Example], tokenizer: Tokenizer, labels: list[str]) -> Examine:
    """Returns the function that classifies examples at each evaluation."""

    def examine(state: TrainingState) -> list[dict[str, str]]:
        classifier = Classifier(state.model, tokenizer, labels, state.processes.device, state.dtype)
        outputs = classifier.probabilities(example.text for example in examples)
        return [
            {"input": example.text, "expected": example.label, "output": f"{labels[int(p.argmax())]} ({p.max():.3f})"}
            for example, p in zip(examples, outputs, strict=True)
        ]

    return examine


def test(config: TrainerConfig, examples: list[Example]) -> None:
    """Tests the saved weights on examples that nothing was chosen by, and adds the figures to the checkpoint.

    Prints precision, recall and F1 of each label, accuracy and balanced accuracy, and draws the confusion matrix.
    """
    from sklearn import metrics

    classifier = Classifier.load(config.out, config.device, config.dtype, config.device_check)
    labels, expected = classifier.labels, [example.label for example in examples]
    predicted = [labels[int(p.argmax())] for p in classifier.probabilities(example.text for example in examples)]
    options = {"labels": labels, "zero_division": 0.0}
    figures = {
        "accuracy": metrics.accuracy_score(expected, predicted),
        "balanced_accuracy": metrics.balanced_accuracy_score(expected, predicted),
        "classes": metrics.classification_report(expected, predicted, output_dict=True, **options),
        "confusion": metrics.confusion_matrix(expected, predicted, labels=labels).tolist(),
    }
    print(f"\ntest on {len(examples):,} texts, which were used neither for training nor for choosing the weights:")
    print(metrics.classification_report(expected, predicted, digits=4, **options))
    print(f"accuracy {figures['accuracy']:.4f}, balanced accuracy {figures['balanced_accuracy']:.4f}")
    checkpoint.save(config.out, {**load_checkpoint(config.out, kinds=("classifier",)), "test": figures})
    plot_path = config.plot_path("confusion")
    draw_confusion_matrix(figures["confusion"], labels, plot_path)
    print(f"confusion matrix in {plot_path}; now try: python classify.py --model {config.out} 'a text'")
