"""Step 2: tokens → a language model. Pre-trains a GPT-2, from scratch or from a checkpoint."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from system.cli import run
from system.errors import UserError, require
from training.config import TrainerConfig


@dataclass(frozen=True)
class Config(TrainerConfig):
    preset: str = "gpt2"
    """gpt2, gpt2-medium, gpt2-large, gpt2-xl, shakespeare or demo: the defaults of everything else"""
    data: Path = Path("data")
    """folder written by prepare_data.py; or what is prepared first: a text file, shakespeare, war-and-peace, pydocs"""
    init_from: str = "scratch"
    """scratch, or whose weights and shape to start from: a checkpoint, gpt2 or another model of the Hugging Face Hub"""
    block_size: int = 1024
    """context in tokens"""
    n_layer: int = 12
    """layers"""
    n_head: int = 12
    """attention heads a layer"""
    n_embd: int = 768
    """width"""
    dropout: float = 0.0
    """share of activations dropped in training"""
    fsdp: bool = False
    """shard parameters, gradients and optimizer state over torchrun's processes, for a model too large for one GPU"""
    vocab_size: int | None = None
    """where --data is prepared first: train a BPE of this many tokens on it; without it, GPT-2's tokenizer"""

    def __post_init__(self):
        super().__post_init__()
        require(
            min(self.block_size, self.n_layer, self.n_head) >= 1,
            "--block-size, --n-layer and --n-head must be at least 1",
        )
        require(
            self.n_embd >= self.n_head and self.n_embd % self.n_head == 0,
            f"--n-embd {self.n_embd} must be a multiple of --n-head {self.n_head}",
        )
        require(0 <= self.dropout < 1, "--dropout must be at least 0 and below 1")


SMALL = {  # trains on a CPU in minutes
    "n_layer": 4,
    "n_head": 2,
    "n_embd": 128,
    "optimizer": "muon",
    "compile": "off",
    "learning_rate": 1e-2,
    "min_lr": 0.0,
    "warmup_steps": 50,
    "beta2": 0.99,
}
PRESETS = {
    "gpt2": Config(),
    "gpt2-medium": Config(preset="gpt2-medium", n_layer=24, n_head=16, n_embd=1024, learning_rate=3e-4, min_lr=3e-5),
    "gpt2-large": Config(preset="gpt2-large", n_layer=36, n_head=20, n_embd=1280, learning_rate=2.5e-4, min_lr=2.5e-5),
    "gpt2-xl": Config(preset="gpt2-xl", n_layer=48, n_head=25, n_embd=1600, learning_rate=2e-4, min_lr=2e-5),
    "shakespeare": Config(
        **SMALL,
        preset="shakespeare",
        data=Path("shakespeare"),
        out=Path("checkpoints/shakespeare.pt"),
        plot=Path("plots/shakespeare_loss.png"),
        vocab_size=1021,
        block_size=64,
        max_steps=600,
        batch_size=32,
        eval_every=100,
        save_every=300,
        patience=3,
    ),
    "demo": Config(
        **SMALL,
        preset="demo",
        data=Path("data/demo"),
        out=Path("checkpoints/demo/pretrained.pt"),
        plot=Path("plots/demo_pretrain_loss.png"),
        vocab_size=2045,
        block_size=128,
        max_steps=1500,
        batch_size=16,
        eval_every=250,
        save_every=500,
    ),
}


def main(config: Config) -> None:
    """Trains one model."""
    import torch

    from model import GPT, GPTConfig
    from text import tokenizer as tokenizers
    from text.token_files import read_token_meta
    from training.loader import Windows
    from training.trainer import Trainer, claim_output
    from weights import checkpoint

    resumed = claim_output(config, "base")
    config = prepare_first(config)
    meta = read_token_meta(config.data)
    tokenizer = tokenizers.tokenizer_of_data(config.data, meta)

    torch.manual_seed(config.seed)
    start = resumed or (None if config.init_from == "scratch" else checkpoint.load(config.init_from))
    start = start and checkpoint.grow_vocabulary(start)
    if start:
        start["config"] = dataclasses.replace(start["config"], dropout=config.dropout)
        if checkpoint.tokenizer(start).name != tokenizer.name:
            raise UserError(
                f"{config.data} was prepared with the tokenizer {tokenizer.name}, the checkpoint was trained "
                f"with {checkpoint.tokenizer(start).name}: prepare the data with that one"
            )
        model = checkpoint.build(start, config.out if resumed else config.init_from)
    else:
        model = GPT(
            GPTConfig(
                block_size=config.block_size,
                vocab_size=tokenizer.padded_vocab_size,
                n_tokens=tokenizer.n_tokens,
                n_layer=config.n_layer,
                n_head=config.n_head,
                n_embd=config.n_embd,
                dropout=config.dropout,
            )
        )
    train_data, val_data = (
        Windows(
            [config.data / name for name in meta["files"] if split in name],
            model.config.block_size,
            config.batch_size,
            config.seed,
        )
        for split in ("train", "val")
    )
    for data, split in ((train_data, "train"), (val_data, "val")):
        if split in meta["splits"] and data.n_tokens != meta["splits"][split]["tokens"]:
            raise UserError(f"{config.data} is damaged, its {split} files do not fit its meta.json: prepare it again")
        if split not in meta["splits"]:  # files that others made
            data.require_ids_below(model.config.vocab_size)
    val_bytes = meta["splits"].get("val", {}).get("bytes")
    Trainer(
        model.train(),
        train_data,
        val_data,
        config,
        {"kind": "base", "tokenizer": tokenizer.spec, "template": None},
        bytes_per_token=val_bytes and val_bytes / val_data.n_tokens,
        resumed=resumed,
        model_is_fresh=start is None,
        fsdp=config.fsdp,
    ).run()


def prepare_first(config: Config) -> Config:
    """Where `--data` is a text file or a small data set, prepares it into data/NAME; returns the config with that."""
    is_named = str(config.data) in ("shakespeare", "war-and-peace", "pydocs")
    if config.data.is_dir() or not (is_named or config.data.suffix or config.data.is_file()):
        return config
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"several processes cannot prepare {config.data} together: run prepare_data.py first")
    import prepare_data
    from text.token_files import read_meta

    name, folder = str(config.data), Path("data") / config.data.stem
    what = {"dataset": name} if is_named else {"input": (name,)}
    overwrite = config.overwrite
    if not overwrite and (meta := folder / "meta.json").exists():
        overwrite = read_meta(meta, "prepare_data.py").get("source") in (name, [name])
    prepare_data.main(prepare_data.Config(**what, out=folder, overwrite=overwrite, vocab_size=config.vocab_size))
    return dataclasses.replace(config, data=folder)


if __name__ == "__main__":
    run(main, Config, PRESETS)
