"""A GPT that tells labels apart."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import GPT
from system.device import autocast, choose_device, choose_dtype
from system.errors import UserError
from text.labelled import Example
from text.tokenizer import Tokenizer
from training.loader import Batch, Epochs, stack
from weights import checkpoint
from weights.loading import load_checkpoint


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
        state, place = load_checkpoint(path, kinds=("classifier",)), choose_device(device)
        model = checkpoint.build(state, path, place)
        return cls(model, checkpoint.tokenizer_of(state), state["labels"], place, choose_dtype(dtype, place))

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
