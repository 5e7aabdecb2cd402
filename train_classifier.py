"""Fine-tuning for labels: a language model → a classifier, of spam for example. Reads a table with texts and labels."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from system.cli import run
from system.errors import UserError, require, require_at_least
from text.sources import LABELLED
from training.config import TrainerConfig


@dataclass(frozen=True)
class Config(TrainerConfig):
    dropout: float = 0.1
    """probability that training drops an activation"""
    class_weights: bool = False
    """weight the loss so that all labels count the same, however rare"""
    train_layers: Literal["all", "head"] | int = "all"
    """what trains: all, the head alone, or the head and this many of the last blocks"""
    val_fraction: float = 0.1
    """share of the texts for validation"""
    test_fraction: float = 0.2
    """share of the texts for the test at the end"""
    learning_rate: float = 5e-5
    min_lr: float = 0.0
    warmup_steps: int = 50
    eval_every: int = 100
    save_every: int = 500
    batch_size: int = 16
    """texts per optimizer step, over all processes"""
    max_steps: int | None = None  # type: ignore[assignment]
    """optimizer steps; by default as many as the epochs need"""
    epochs: int = 5
    """passes over all texts"""
    out: Path = Path("checkpoints/spam.pt")
    label_column: str = "label"
    """column with the label; a number for a .csv or .tsv file without a header"""
    text_column: str = "text"
    """column with the text; a number for a .csv or .tsv file without a header"""
    dataset: str = "sms-spam"
    """without --input: sms-spam, or org/name on the Hugging Face Hub"""
    input: Path | None = None
    """a .csv, .tsv, .jsonl, .json or .parquet file of labelled texts, also as .gz or .zst"""
    model: Path = Path("checkpoints/pretrained.pt")
    """the language model to start from"""
    preset: str = "gpt2"
    """gpt2 or demo: the defaults of all other flags"""
    plots: ClassVar[tuple[str, ...]] = ("loss", "confusion")

    def __post_init__(self) -> None:
        super().__post_init__()
        is_known = self.input is not None or self.dataset in LABELLED or "/" in self.dataset
        require(is_known, f"no data set {self.dataset!r}: {', '.join(LABELLED)}, org/name on the Hub, or --input FILE")
        require_at_least(1, self, "epochs")
        require(0 <= self.dropout < 1, "--dropout must be at least 0 and below 1")
        fit = self.val_fraction > 0 and self.test_fraction > 0 and self.val_fraction + self.test_fraction < 1
        require(fit, "--val-fraction and --test-fraction must be above 0 and together below 1")


PRESETS = {
    "gpt2": Config(),
    "demo": Config(
        preset="demo",
        model=Path("checkpoints/demo/pretrained.pt"),
        optimizer="muon",
        compile="off",
        learning_rate=2e-3,
        beta2=0.99,
        epochs=2,
        class_weights=True,
    ),
}


def main(config: Config) -> None:
    """Trains one classifier, and tests it unless the run is interrupted."""
    import torch

    from text.labelled import counts, one_of_each, read_examples, split
    from training.classifier import LabelledTexts, freeze, predictions, test
    from training.parallel import Processes
    from training.run import train
    from training.saving import claim_output
    from training.state import StopReason
    from weights import checkpoint
    from weights.loading import load_checkpoint

    processes = Processes.join(config.device)
    inputs = (config.model, *([config.input] if config.input else ()))
    with claim_output(config, processes, "classifier", inputs=inputs) as resumed:
        start = resumed or load_checkpoint(config.model)
        tokenizer = checkpoint.tokenizer_of(start)
        examples, notes = read_examples(config.input, config.dataset, config.text_column, config.label_column)
        parts = split(examples, config.val_fraction, config.test_fraction, config.seed)
        labels = sorted({example.label for example in parts["train"]})
        if resumed and resumed["labels"] != labels:
            raise UserError(f"{config.out} was trained on other labels: {', '.join(resumed['labels'])}")
        processes.print("\n".join(notes.lines()))
        for name, part in parts.items():
            processes.print(f"{name}: {len(part):,} texts, {counts(part)}")

        torch.manual_seed(config.seed)
        if not resumed:
            start = checkpoint.with_class_head(start, len(labels))
        start["config"] = dataclasses.replace(start["config"], dropout=config.dropout)
        model = checkpoint.build(start)
        freeze(model, config.train_layers)
        options = (model.config.block_size, config.batch_size, config.seed, config.class_weights)
        data = {name: LabelledTexts(part, labels, tokenizer, *options) for name, part in parts.items()}
        n_full = sum(int((part.lengths == options[0]).sum()) for part in data.values())
        processes.print(f"{n_full:,} texts fill the context of {options[0]:,} tokens, or are cut there")
        steps = config.max_steps or config.epochs * data["train"].batches_per_epoch
        config = dataclasses.replace(config, max_steps=steps)
        metadata = {"kind": "classifier", "tokenizer": tokenizer.spec, "template": None, "labels": labels}
        examine = predictions(one_of_each(parts["val"], 5), tokenizer, labels)
        splits = data["train"], data["val"]
        reason = train(model, *splits, config, processes, metadata, resumed=resumed, examine=examine)
        if processes.rank == 0 and not config.plan and reason is not StopReason.INTERRUPTED:
            test(config, parts["test"])


if __name__ == "__main__":
    run(main, Config, PRESETS)
