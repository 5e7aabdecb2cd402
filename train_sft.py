"""Step 5: a language model → one that answers. Fine-tunes on conversations; loss on the assistant's tokens only."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # `python -I` leaves this folder out

from system.cli import run
from system.errors import require, require_at_least
from system.locks import releases_locks
from training.config import TrainerConfig


@dataclass(frozen=True)
class Config(TrainerConfig):
    preset: str = "gpt2"
    """gpt2, lora or demo: the defaults of all other flags"""
    model: Path = Path("checkpoints/pretrained.pt")
    """the model to start from: a checkpoint, gpt2 or another model of the Hugging Face Hub"""
    data: Path = Path("data")
    """folder written by prepare_sft_data.py"""
    out: Path = Path("checkpoints/sft.pt")
    """checkpoint to write; the log, the plot and the file for --resume are named after it"""
    epochs: int = 5
    """passes over all conversations"""
    max_steps: int | None = None  # type: ignore[assignment]
    """optimizer steps; by default as many as the epochs need"""
    batch_size: int = 32
    """conversations per optimizer step, over all processes"""
    learning_rate: float = 2e-5
    """peak learning rate"""
    min_lr: float = 2e-6
    """learning rate at the last step, reached along a cosine"""
    warmup_steps: int = 100
    """steps over which the learning rate rises from 0"""
    eval_every: int = 200
    """steps between evaluations"""
    save_every: int = 200
    """steps between saves of what --resume needs"""
    dropout: float = 0.0
    """probability that training drops an activation"""
    lora_rank: int = 0
    """train LoRA adapters of this rank, a file of a few MB, and freeze the model; 0 trains the whole model"""
    lora_alpha: float = 32.0
    """LoRA's corrections are scaled by alpha / rank"""
    lora_dropout: float = 0.05
    """probability that training drops an input of an adapter"""
    sample_prompt: str = ""
    """print the answer to this message at every evaluation"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "epochs")
        require(self.lora_rank >= 0, "--lora-rank must not be negative")
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
        epochs=2,
        optimizer="muon",
        compile="off",
        learning_rate=5e-3,
        min_lr=0.0,
        warmup_steps=10,
        beta2=0.99,
        eval_every=300,
        save_every=600,
        keep="last",
    ),
}


@releases_locks
def main(config: Config) -> None:
    """Fine-tunes one model."""
    import torch

    from text.token_files import read_sft_meta
    from text.tokenizer import require_same_tokenizer
    from training.checkpointing import claim_data, claim_output
    from training.distributed import Processes
    from training.loader import Conversations
    from training.report import Examples, Samples, greedy_answers
    from training.run import train
    from weights import checkpoint, lora
    from weights.loading import load_base, load_checkpoint

    kind = "lora" if config.lora_rank else "sft"
    processes = Processes.join(config.device)
    resumed = claim_output(config, processes, kind, inputs=(config.model,))
    if resumed and kind == "sft":
        start = resumed
    elif resumed:
        start = load_base(resumed, config.out)
    else:
        start = checkpoint.grow_vocabulary(load_checkpoint(config.model))
    claim_data(config.data, "sft_meta.json", processes)
    meta = read_sft_meta(config.data)
    tokenizer = checkpoint.tokenizer_of(start)
    remedy = "prepare the conversations with the model's tokenizer (--tokenizer)"
    require_same_tokenizer(tokenizer.name, meta["tokenizer"], config.data, remedy)

    torch.manual_seed(config.seed)
    start["config"] = dataclasses.replace(start["config"], dropout=config.dropout)
    model = checkpoint.build(start)
    metadata: dict[str, Any] = {"kind": kind, "tokenizer": tokenizer.spec, "template": meta["template"]}
    if kind == "lora":
        new: dict[str, Any] = {"rank": config.lora_rank, "alpha": config.lora_alpha, "base": str(config.model)}
        settings = resumed["lora"] if resumed else {**new, "base_sha256": lora.sha256_of(config.model)}
        lora.add_adapter(model, settings["rank"], settings["alpha"], config.lora_dropout, tokenizer.user)
        metadata["lora"] = settings
        if resumed:
            lora.restore_adapter(model, resumed, config.out)
    train_data, val_data = (
        Conversations(config.data, split, model.config.block_size, config.batch_size, config.seed)
        for split in ("train", "val")
    )
    config = dataclasses.replace(config, max_steps=config.max_steps or config.epochs * train_data.batches_per_epoch)
    print(f"{len(train_data):,} conversations, {config.max_steps:,} steps")
    exchanges = val_data.first_exchanges(5)
    train(
        model,
        train_data,
        val_data,
        config,
        processes,
        metadata,
        resumed=resumed,
        examples=Examples(lambda state: greedy_answers(state, tokenizer, exchanges)),
        samples=Samples(tokenizer, meta["template"], config.sample_prompt) if config.sample_prompt else None,
    )


if __name__ == "__main__":
    run(main, Config, PRESETS)
