"""Step 5: a language model → one that answers. Fine-tunes on conversations; loss on the assistant's tokens only."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from cli import TrainerConfig, UserError, require, run


@dataclass(frozen=True)
class Config(TrainerConfig):
    preset: str = "gpt2"
    """gpt2 or demo: the defaults of everything else"""
    model: Path = Path("checkpoints/pretrained.pt")
    """checkpoint to start from"""
    data: Path = Path("data")
    """folder written by prepare_sft_data.py"""
    out: Path = Path("checkpoints/sft.pt")
    """checkpoint to write; its log and the file that --resume continues from stand beside it"""
    plot: Path = Path("plots/sft_loss.png")
    """loss curves, redrawn as training goes on"""
    epochs: int = 5
    """times every conversation is visited"""
    max_steps: int | None = None
    """optimizer steps; without it, as many as the epochs make"""
    batch_size: int = 32
    """conversations per optimizer step, over all processes"""
    learning_rate: float = 2e-5
    """highest learning rate"""
    min_lr: float = 2e-6
    """learning rate at the last step, reached along a cosine"""
    warmup_steps: int = 100
    """steps over which the learning rate rises from 0"""
    eval_every: int = 200
    """steps between evaluations"""
    save_every: int = 200
    """steps between saves of what --resume needs"""
    dropout: float = 0.0
    """share of activations dropped in training"""

    def __post_init__(self):
        super().__post_init__()
        require(self.epochs >= 1, "--epochs must be at least 1")
        require(0 <= self.dropout < 1, "--dropout must be at least 0 and below 1")


PRESETS = {
    "gpt2": Config(),
    "demo": Config(
        preset="demo",
        model=Path("checkpoints/demo/pretrained.pt"),
        data=Path("data/demo"),
        out=Path("checkpoints/demo/sft.pt"),
        plot=Path("plots/demo_sft_loss.png"),
        epochs=6,
        optimizer="muon",
        compile="off",
        learning_rate=5e-3,
        min_lr=0.0,
        warmup_steps=10,
        beta2=0.99,
        eval_every=60,
        save_every=180,
        keep="last",
    ),
}


def main(config: Config) -> None:
    """Fine-tunes one model."""
    import torch

    import checkpoint
    from files import read_meta
    from loader import Conversations
    from trainer import Trainer, claim_output

    resumed = claim_output(config)
    start, path = (resumed, config.out) if resumed else (checkpoint.load(config.model), config.model)
    meta = read_meta(config.data / "sft_meta.json", "prepare_sft_data.py")
    tokenizer = checkpoint.tokenizer(start)
    if meta["tokenizer"] != tokenizer.name:
        raise UserError(
            f"{config.data} was prepared with the tokenizer {meta['tokenizer']}, {path} was trained with "
            f"{tokenizer.name}: prepare the conversations with that one (--tokenizer)"
        )

    torch.manual_seed(config.seed)
    start["config"] = dataclasses.replace(start["config"], dropout=config.dropout)
    model = checkpoint.build(start, path)
    train_data, val_data = (
        Conversations(config.data, split, model.config.block_size, config.batch_size, config.seed)
        for split in ("train", "val")
    )
    config = dataclasses.replace(config, max_steps=config.max_steps or config.epochs * train_data.batches_per_epoch)
    print(f"{len(train_data):,} conversations, {config.max_steps:,} steps")
    Trainer(
        model.train(),
        train_data,
        val_data,
        config,
        {"kind": "sft", "tokenizer": tokenizer.spec, "template": meta["template"]},
        resumed=resumed,
    ).run()


if __name__ == "__main__":
    run(main, Config, PRESETS)
