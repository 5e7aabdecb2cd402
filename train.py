"""Step 2: tokens → a language model. Pre-trains a GPT-2, from scratch or from a checkpoint."""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
    minutes: float = 0.0
    """take about so many minutes, from the start on: chooses the steps, with --preset demo or shakespeare also layers,
    width and dropout; 0 leaves that to the other flags"""
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
        require(self.minutes >= 0, "--minutes must be at least 0")
        require(not (self.minutes and self.fsdp), "--minutes works without --fsdp")


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
        vocab_size=1021,
        max_steps=1500,
        max_epochs=4.0,
        eval_every=250,
        save_every=500,
    ),
}


def main(config: Config) -> None:
    """Trains one model."""
    from text.token_files import read_token_meta
    from text.tokenizer import gpt2, require_same_tokenizer, tokenizer_of_data
    from training.examples import continuations
    from training.loader import Windows
    from training.parallel import Processes
    from training.plan import fit_into_minutes
    from training.prepared import prepared_text
    from training.run import build_model, train
    from training.saving import claim_output
    from weights import checkpoint
    from weights.loading import load_checkpoint

    started = time.monotonic()
    processes = Processes.join(config.device)
    with claim_output(config, processes, "base", inputs=(Path(config.data), Path(config.init_from))) as resumed:
        start = resumed
        if not resumed and config.init_from != "scratch":
            start = checkpoint.grow_vocabulary(load_checkpoint(config.init_from))
        wanted = checkpoint.tokenizer_of(start) if start else config.vocab_size or gpt2()
        folder = prepared_text(config, wanted, processes)
        meta = read_token_meta(folder)
        tokenizer = tokenizer_of_data(folder, meta)
        config = with_smaller_steps(dataclasses.replace(config, data=str(folder)), processes.print)
        if start:
            expected = checkpoint.tokenizer_of(start).name
            require_same_tokenizer(expected, tokenizer.name, folder, "prepare the data with the model's tokenizer")

        build = partial(build_model, tokenizer=tokenizer, start=start)
        model = build(config)
        options = (model.config, config.batch_size, config.seed)
        data = train_data, val_data = [Windows.from_folder(folder, meta, split, *options) for split in ("train", "val")]
        if config.minutes:
            config = fit_into_minutes(config, build, data, processes, started, start)
            model = build(config)
        config = with_few_epochs(config, train_data.batches_per_epoch, processes.print)
        sharding = None
        if config.fsdp:
            from training.sharding import Sharding  # half a second

            sharding = Sharding(model, config, processes)
        metadata = {"kind": "base", "tokenizer": tokenizer.spec, "template": None}
        examine = continuations(tokenizer, None, config.sample_prompt)
        train(
            model,
            train_data,
            val_data,
            config,
            processes,
            metadata,
            resumed=resumed,
            sharding=sharding,
            examine=examine,
        )


def with_smaller_steps(config: Config, say: Callable[[str], None]) -> Config:
    """Returns the config to train a model further: the preset's learning rate would undo what the model knows."""
    if config.init_from == "scratch" or config.learning_rate != PRESETS[config.preset].learning_rate:
        return config
    say(f"the model is trained already, so the learning rate is a fifth of the preset's: {config.learning_rate / 5:g}")
    return dataclasses.replace(config, learning_rate=config.learning_rate / 5)


def with_few_epochs(config: Config, batches_per_epoch: float, say: Callable[[str], None]) -> Config:
    """Returns the config with no more steps than `--max-epochs` allows, but at least 100."""
    limit = max(FEWEST_STEPS, math.ceil(config.max_epochs * batches_per_epoch))
    if not config.max_epochs or limit >= config.max_steps:
        return config
    say(f"{limit:,} steps instead of {config.max_steps:,}, for so short a text (--max-epochs)")
    return dataclasses.replace(config, max_steps=limit)


if __name__ == "__main__":
    run(main, Config, PRESETS)
