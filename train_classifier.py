"""Fine-tuning for labels: a language model → one that tells texts apart, such as spam. Reads a table with labels."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from system.cli import run
from system.errors import UserError, require, require_at_least
from training.config import TrainerConfig


@dataclass(frozen=True)
class Config(TrainerConfig):
    preset: str = "gpt2"
    """gpt2 or demo: the defaults of everything else"""
    input: Path | None = None
    """a .csv, .tsv, .jsonl, .json or .parquet file of labelled texts, perhaps .gz or .zst"""
    dataset: str = "sms-spam"
    """without --input: sms-spam, or a data set of the Hugging Face Hub as org/name"""
    text_column: str = "text"
    """column with the text; a number for a .csv or .tsv file without a header"""
    label_column: str = "label"
    """column with the label; a number for a .csv or .tsv file without a header"""
    model: Path = Path("checkpoints/pretrained.pt")
    """language model to start from"""
    out: Path = Path("checkpoints/spam.pt")
    """checkpoint to write; its log and the file that --resume continues from stand beside it"""
    plot: Path = Path("plots/spam_loss.png")
    """loss curves; the confusion matrix stands beside them"""
    train_layers: Literal["all", "head"] | int = "all"
    """what trains: all, the head alone, or the head and that many of the last blocks"""
    class_weights: bool = False
    """let a text of a rare label count more in the loss, so that all labels count the same"""
    val_fraction: float = 0.1
    """share of the texts to validate on"""
    test_fraction: float = 0.2
    """share of the texts to test on, once, at the end"""
    epochs: int = 5
    """times every text is visited"""
    max_steps: int | None = None
    """optimizer steps; without it, as many as the epochs make"""
    batch_size: int = 16
    """texts per optimizer step, over all processes"""
    learning_rate: float = 5e-5
    """highest learning rate"""
    min_lr: float = 0.0
    """learning rate at the last step, reached along a cosine"""
    warmup_steps: int = 50
    """steps over which the learning rate rises from 0"""
    eval_every: int = 100
    """steps between evaluations"""
    save_every: int = 500
    """steps between saves of what --resume needs"""
    dropout: float = 0.1
    """share of activations dropped in training"""

    def __post_init__(self):
        super().__post_init__()
        require(
            self.input is not None or self.dataset == "sms-spam" or "/" in self.dataset,
            f"no data set {self.dataset!r}: --input FILE, sms-spam, or one of the Hub's as org/name",
        )
        require_at_least(1, self, "epochs")
        require(0 <= self.dropout < 1, "--dropout must be at least 0 and below 1")
        require(
            self.val_fraction > 0 and self.test_fraction > 0 and self.val_fraction + self.test_fraction < 1,
            "--val-fraction and --test-fraction must be above 0 and together below 1",
        )


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
    """Trains one classifier, and tests it."""
    import torch

    from text.labelled import counts, split
    from training.classifier import Classifier, Examples
    from training.trainer import Trainer, claim_output
    from weights import checkpoint

    resumed = claim_output(config, "classifier")
    start, path = (resumed, config.out) if resumed else (checkpoint.load(config.model), config.model)
    tokenizer = checkpoint.tokenizer(start)
    parts = split(read_examples(config), config.val_fraction, config.test_fraction, config.seed)
    labels = sorted({example.label for example in parts["train"]})
    if resumed and resumed["labels"] != labels:
        raise UserError(f"{config.out} was trained on other labels: {', '.join(resumed['labels'])}")
    for name, examples in parts.items():
        print(f"{name}: {len(examples):,} texts, {counts(examples)}")

    torch.manual_seed(config.seed)
    if not resumed:
        start = checkpoint.with_class_head(start, len(labels))
    start["config"] = dataclasses.replace(start["config"], dropout=config.dropout)
    model = checkpoint.build(start, path)
    freeze(model, config.train_layers)
    block_size = model.config.block_size
    data = {
        name: Examples(examples, labels, tokenizer, block_size, config.batch_size, config.seed, config.class_weights)
        for name, examples in parts.items()
    }
    if full := sum(int((part.lengths == block_size).sum()) for part in data.values()):
        print(f"{full:,} texts fill the context of {block_size:,} tokens: of a longer one the beginning counts")
    config = dataclasses.replace(config, max_steps=config.max_steps or config.epochs * data["train"].batches_per_epoch)

    def examine(model, device, dtype):
        return Classifier(model, tokenizer, labels, device, dtype).show(parts["val"][:5])

    facts = {"kind": "classifier", "tokenizer": tokenizer.spec, "template": None, "labels": labels}
    trainer = Trainer(model.train(), data["train"], data["val"], config, facts, resumed=resumed, examine=examine)
    trainer.run()
    if trainer.rank == 0:
        test(config, parts["test"])


def read_examples(config: Config) -> list:
    """Returns the labelled texts that a config names, and says what of them was dropped."""
    from text.labelled import from_hub, read_table
    from text.readers import Notes

    notes, columns = Notes(), (config.text_column, config.label_column)
    if config.input:
        examples = read_table(config.input, *columns, notes)
    elif config.dataset == "sms-spam":
        examples = from_hub("ucirvine/sms_spam", "sms", "label", notes)
    else:
        examples = from_hub(config.dataset, *columns, notes)
    for line in notes.lines():
        print(line)
    if not examples:
        raise UserError(f"{config.input or config.dataset} holds no labelled text{notes.in_brackets()}")
    return examples


def freeze(model, train_layers: str | int) -> None:
    """Leaves only what is to train with a gradient: the head, and the last blocks with the LayerNorm behind them."""
    if train_layers == "all":
        return
    n = 0 if train_layers == "head" else train_layers
    require(0 <= n <= len(model.h), f"--train-layers {n}: the model has {len(model.h)} blocks")
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    for part in [*model.h[len(model.h) - n :], *([model.ln_f] if n else [])]:
        part.requires_grad_(True)


def test(config: Config, examples: list) -> None:
    """Tests the weights that were kept, on texts that nothing was chosen by; adds the figures to the checkpoint."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from sklearn import metrics

    from system.files import atomic_write
    from training.classifier import Classifier
    from weights import checkpoint

    classifier = Classifier.load(config.out, config.device, config.dtype)
    labels, truth = classifier.labels, [example.label for example in examples]
    guesses = [labels[p.argmax()] for p in classifier.probabilities(example.text for example in examples)]
    figures = {
        "accuracy": metrics.accuracy_score(truth, guesses),
        "balanced_accuracy": metrics.balanced_accuracy_score(truth, guesses),
        "classes": metrics.classification_report(truth, guesses, labels=labels, output_dict=True, zero_division=0.0),
        "confusion": metrics.confusion_matrix(truth, guesses, labels=labels).tolist(),
    }
    print(f"\non {len(examples):,} texts to test on, none of which was trained on or chosen by:")
    print(metrics.classification_report(truth, guesses, labels=labels, digits=4, zero_division=0.0))
    print(f"accuracy {figures['accuracy']:.4f}, balanced accuracy {figures['balanced_accuracy']:.4f}")
    checkpoint.save(config.out, {**checkpoint.load(config.out, kinds=("classifier",)), "test": figures})
    figure = Figure(figsize=(2.5 + 0.7 * len(labels), 2 + 0.7 * len(labels)), layout="constrained")
    metrics.ConfusionMatrixDisplay.from_predictions(
        truth, guesses, labels=labels, ax=figure.add_subplot(), colorbar=False, cmap="Blues", xticks_rotation=45
    )
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a label may hold what looks like a formula
    path = config.plot.with_name(f"{config.out.stem}_confusion.png")
    with atomic_write(path) as file:
        FigureCanvasAgg(figure).print_png(file)
    print(f"confusion matrix in {path}; now try: python classify.py --model {config.out} 'a text'")


if __name__ == "__main__":
    run(main, Config, PRESETS)
