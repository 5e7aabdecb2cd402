"""Step 5: a language model → one that answers. Fine-tunes on conversations; loss on the assistant's tokens only."""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

from generation.config import SamplingConfig
from system.cli import run
from system.errors import UserError, require, require_at_least
from training.config import TrainerConfig


@dataclass(frozen=True)
class Config(TrainerConfig):
    preset: str = "gpt2"
    """gpt2, lora or demo: the defaults of everything else"""
    model: Path = Path("checkpoints/pretrained.pt")
    """what to start from: a checkpoint, or gpt2 or another model of the Hugging Face Hub"""
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
    lora_rank: int = 0
    """rank of LoRA's adapters, which train alone and make a file of a few MB; 0 trains the whole model"""
    lora_alpha: float = 32.0
    """LoRA's corrections are scaled by alpha / rank"""
    lora_dropout: float = 0.05
    """share of an adapter's inputs dropped in training"""
    merge: bool = False
    """at the end, make --out a whole model instead of an adapter"""

    def __post_init__(self):
        super().__post_init__()
        require_at_least(1, self, "epochs")
        require(self.lora_rank >= 0, "--lora-rank must not be negative")
        require(self.lora_rank > 0 or not self.merge, "--merge belongs to --lora-rank")
        require(
            0 <= self.dropout < 1 and 0 <= self.lora_dropout < 1,
            "--dropout and --lora-dropout must be at least 0 and below 1",
        )


PRESETS = {
    "gpt2": Config(),
    "lora": Config(preset="lora", out=Path("checkpoints/lora.pt"), lora_rank=16, learning_rate=2e-4, min_lr=2e-5),
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

    from text.token_files import read_meta
    from training.loader import Conversations
    from training.trainer import Trainer, claim_output
    from weights import checkpoint
    from weights.lora import add_adapter

    kind = "lora" if config.lora_rank else "sft"
    resumed = claim_output(config, kind)
    if kind == "lora" and config.out.resolve() == config.model.resolve():
        raise UserError(f"--out {config.out} is the model that the adapter belongs to: choose another")
    if resumed and kind == "sft":
        start, path = resumed, config.out
    elif resumed:
        start, path = checkpoint.load_base(resumed, config.out), resumed["lora"]["base"]
    else:
        start, path = checkpoint.grow_vocabulary(checkpoint.load(config.model)), config.model
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
    facts = {"kind": kind, "tokenizer": tokenizer.spec, "template": meta["template"]}
    if config.lora_rank:
        facts["lora"] = (
            resumed["lora"]
            if resumed
            else {
                "rank": config.lora_rank,
                "alpha": config.lora_alpha,
                "base": str(config.model),
                "base_sha256": checkpoint.sha256_of(config.model),
            }
        )
        add_adapter(model, facts["lora"]["rank"], facts["lora"]["alpha"], config.lora_dropout, tokenizer.user)
        if resumed:
            checkpoint.restore_adapter(model, resumed, config.out)
    train_data, val_data = (
        Conversations(config.data, split, model.config.block_size, config.batch_size, config.seed)
        for split in ("train", "val")
    )
    config = dataclasses.replace(config, max_steps=config.max_steps or config.epochs * train_data.batches_per_epoch)
    print(f"{len(train_data):,} conversations, {config.max_steps:,} steps")
    trainer = Trainer(
        model.train(),
        train_data,
        val_data,
        config,
        facts,
        resumed=resumed,
        examine=functools.partial(answers, val_data.first_exchanges(5), tokenizer),
    )
    trainer.run()
    if config.merge and trainer.rank == 0:
        checkpoint.save(config.out, checkpoint.load(config.out))
        print(f"{config.out} is a whole model now")


def answers(exchanges: list, tokenizer, model, device, dtype) -> list[dict[str, str]]:
    """Answers the first questions of held-out conversations greedily."""
    from torch.nn.utils.parametrize import cached

    from generation.text_model import TextModel

    text_model = TextModel(model, tokenizer, dtype=dtype)
    config = SamplingConfig(greedy=True, max_new_tokens=60)

    def text(ids):
        return tokenizer.decode(i for i in ids if i < tokenizer.end_of_text).strip()

    with cached():  # what LoRA makes of a weight is made once
        outputs = ["".join(text_model.stream(asked, config)).strip() for asked, _ in exchanges]
    return [
        {"input": text(asked), "expected": text(answer), "output": output}
        for (asked, answer), output in zip(exchanges, outputs, strict=True)
    ]


if __name__ == "__main__":
    run(main, Config, PRESETS)
