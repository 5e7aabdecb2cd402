"""Step 2: tokens → a language model. Pre-trains a GPT-2, from scratch or from a checkpoint."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_config import Shape
from system.cli import run
from system.errors import require
from training.config import TrainerConfig


@dataclass(frozen=True)
class Config(TrainerConfig, Shape):
    fsdp: bool = False
    """shard parameters, gradients and optimizer state over torchrun's processes, for models too large for one GPU"""
    sample_prompt: str = ""
    """continue this text at every evaluation"""
    max_epochs: float = 0.0
    """passes over the text, at most: a short text gets fewer steps than --max-steps, but at least 100; 0 is no limit"""
    vocab_size: int | None = None
    """if --data is prepared first: train a BPE of this many tokens on it; by default GPT-2's tokenizer, or that of the
    model to start from"""
    init_from: str = "scratch"
    """start from random weights (scratch), a checkpoint, gpt2 or another model of the Hugging Face Hub"""
    data: str = "data"
    """folder of prepare_data.py; or a text file, its URL, shakespeare, war-and-peace or pydocs, prepared first"""
    preset: str = "gpt2"
    """gpt2, gpt2-medium, gpt2-large, gpt2-xl, modern, shakespeare or demo: the defaults of all other flags"""

    def __post_init__(self) -> None:
        TrainerConfig.__post_init__(self)
        Shape.__post_init__(self)
        require(self.max_epochs >= 0, "--max-epochs must be at least 0")


FEWEST_STEPS = 100  # of a run that --max-epochs makes shorter

MODERN = Config(  # what years after GPT-2 have taught; benchmarks/recipe.py measures each part
    preset="modern",
    tie_weights=False,
    rotary=True,
    qk_norm=True,
    squared_relu=True,
    optimizer="muon",
    learning_rate=3e-3,
    min_lr=0.0,
    cooldown=0.6,
    embedding_lr_scale=10.0,
)
SMALL = dataclasses.replace(  # trains on a CPU in minutes
    MODERN,
    n_layer=4,
    n_head=2,
    n_embd=128,
    block_size=128,
    batch_size=16,
    compile="off",
    learning_rate=1e-2,
    warmup_steps=50,
    beta2=0.99,
    patience=3,
)
PRESETS = {
    "gpt2": Config(),
    "gpt2-medium": Config(preset="gpt2-medium", n_layer=24, n_head=16, n_embd=1024, learning_rate=3e-4),
    "gpt2-large": Config(preset="gpt2-large", n_layer=36, n_head=20, n_embd=1280, learning_rate=2.5e-4),
    "gpt2-xl": Config(preset="gpt2-xl", n_layer=48, n_head=25, n_embd=1600, learning_rate=2e-4),
    "modern": MODERN,
    "shakespeare": dataclasses.replace(
        SMALL,
        preset="shakespeare",
        data="shakespeare",
        out=Path("checkpoints/shakespeare.pt"),
        vocab_size=1021,
        max_steps=800,
        eval_every=100,
        save_every=400,
    ),
    "demo": dataclasses.replace(
        SMALL,
        preset="demo",
        data="data/demo",
        out=Path("checkpoints/demo/pretrained.pt"),
        vocab_size=2045,
        max_steps=1500,
        max_epochs=2.0,
        eval_every=250,
        save_every=500,
    ),
}


def main(config: Config) -> None:
    """Trains one model."""
    import torch

    from model import GPT, GPTConfig
    from text.corpus import open_corpus
    from text.prepare import prepare
    from text.sources import TEXTS
    from text.token_files import read_token_meta
    from text.tokenizer import gpt2, require_same_tokenizer, tokenizer_of_data
    from training.examples import continuations
    from training.loader import Windows
    from training.parallel import Processes
    from training.prepared import prepared
    from training.run import train
    from training.saving import claim_output
    from weights import checkpoint
    from weights.loading import load_checkpoint

    processes = Processes.join(config.device)
    with claim_output(config, processes, "base", inputs=(Path(config.data), Path(config.init_from))) as resumed:
        start = resumed
        if not resumed and config.init_from != "scratch":
            start = checkpoint.grow_vocabulary(load_checkpoint(config.init_from))
        small = [name for name, dataset in TEXTS.items() if not dataset.hub]

        def prepare_text(data: str, folder: Path, overwrite: bool) -> list[str]:
            corpus = open_corpus(data) if data in small else open_corpus(data, [data])
            tokenizer = checkpoint.tokenizer_of(start) if start else config.vocab_size or gpt2()
            return prepare(corpus, tokenizer, folder, overwrite=overwrite)

        folder = prepared(config.data, small, "meta.json", config, processes, prepare_text)
        config = dataclasses.replace(config, data=str(folder))
        meta = read_token_meta(folder)
        tokenizer = tokenizer_of_data(folder, meta)

        torch.manual_seed(config.seed)
        if config.init_from != "scratch" and config.learning_rate == PRESETS[config.preset].learning_rate:
            config = dataclasses.replace(config, learning_rate=config.learning_rate / 10)
            processes.print(
                f"a model that is trained already needs smaller steps: --learning-rate {config.learning_rate:g}"
            )
        if start:
            expected = checkpoint.tokenizer_of(start).name
            require_same_tokenizer(expected, tokenizer.name, folder, "prepare the data with the model's tokenizer")
            start["config"] = dataclasses.replace(start["config"], dropout=config.dropout)
            model = checkpoint.build(start)
        else:
            shape: dict[str, Any] = {field.name: getattr(config, field.name) for field in dataclasses.fields(Shape)}
            model = GPT(GPTConfig(**shape, vocab_size=tokenizer.padded_vocab_size, n_tokens=tokenizer.n_tokens))
        options = (model.config, config.batch_size, config.seed)
        train_data, val_data = (Windows.from_folder(folder, meta, split, *options) for split in ("train", "val"))
        limit = max(FEWEST_STEPS, math.ceil(config.max_epochs * train_data.batches_per_epoch))
        if config.max_epochs and limit < config.max_steps:
            processes.print(f"{limit:,} steps instead of {config.max_steps:,}, for so short a text (--max-epochs)")
            config = dataclasses.replace(config, max_steps=limit)
        sharding = None
        if config.fsdp:
            from training.sharding import Sharding  # half a second

            sharding = Sharding(model, config, processes)
        metadata = {"kind": "base", "tokenizer": tokenizer.spec, "template": None}
        examine = continuations(tokenizer, None, config.sample_prompt)
        data = train_data, val_data
        train(model, *data, config, processes, metadata, resumed=resumed, sharding=sharding, examine=examine)


if __name__ == "__main__":
    run(main, Config, PRESETS)
