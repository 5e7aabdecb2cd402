"""Step 5: a language model → one that answers. Fine-tunes on conversations; loss on the assistant's tokens only."""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from system.cli import run
from system.errors import require, require_at_least
from training.config import TrainerConfig


@dataclass(frozen=True)
class Config(TrainerConfig):
    sample_prompt: str = ""
    """answer this message at every evaluation, instead of five held-out questions"""
    lora_rank: int = 0
    """train LoRA adapters of this rank, a file of a few MB, and freeze the model; 0 trains the whole model"""
    lora_alpha: float = 32.0
    """LoRA's corrections are scaled by alpha / rank"""
    lora_dropout: float = 0.05
    """probability that training drops an input of an adapter"""
    dropout: float = 0.0
    """probability that training drops an activation"""
    question_noise: float = 0.0
    """probability that training replaces a token of a question by a random one; helps with questions in other words"""
    learning_rate: float = 2e-5
    warmup_steps: int | None = None  # type: ignore[assignment]
    """steps over which the learning rate rises from 0, at most a fifth of all; by default a tenth, and at most 100"""
    eval_every: int = 200
    save_every: int = 200
    batch_size: int | None = None  # type: ignore[assignment]
    """conversations per optimizer step, over all processes; by default 32, or 8 if that is less than 100 steps"""
    max_steps: int | None = None  # type: ignore[assignment]
    """optimizer steps; by default as many as the epochs need"""
    epochs: int | None = None
    """passes over all conversations; by default 5 (2 with --preset demo), and more if that is less than 100 steps"""
    out: Path = Path("checkpoints/sft.pt")
    data: Path = Path("data")
    """folder written by prepare_sft_data.py; or a file of conversations (see prepare_sft_data.py --input), oasst1,
    alpaca-gpt4, builtins-qa or pydocs-qa, prepared first as the model needs them"""
    model: Path = Path("checkpoints/pretrained.pt")
    """the model to start from: a checkpoint, gpt2 or another model of the Hugging Face Hub"""
    preset: str = "gpt2"
    """gpt2, lora or demo: the defaults of all other flags"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "epochs")
        require_at_least(0, self, "lora_rank")
        for name in ("dropout", "lora_dropout", "question_noise"):
            require(0 <= getattr(self, name) < 1, f"--{name.replace('_', '-')} must be at least 0 and below 1")


FEW_STEPS = 100
NOISE_OF_PARAPHRASES = 0.3
"""If all questions are taught, this share of random tokens makes them as hard as a paraphrase."""

PRESETS = {
    "gpt2": Config(),
    "lora": Config(preset="lora", out=Path("checkpoints/lora.pt"), lora_rank=16, learning_rate=2e-4),
    "demo": Config(
        preset="demo",
        model=Path("checkpoints/demo/pretrained.pt"),
        data=Path("data/demo"),
        out=Path("checkpoints/demo/sft.pt"),
        optimizer="muon",
        compile="off",
        learning_rate=5e-3,
        min_lr=0.0,
        warmup_steps=10,
        question_noise=0.1,
        beta2=0.99,
        eval_every=300,
        eval_tokens=20_000,
        save_every=600,
        keep="last",
    ),
}


def main(config: Config) -> None:
    """Fine-tunes one model."""
    import torch

    from text.conversations import prepare_conversations
    from text.sources import CONVERSATIONS
    from text.token_files import read_sft_meta
    from text.tokenizer import require_same_tokenizer
    from training.examples import answers, continuations
    from training.loader import Conversations
    from training.parallel import Processes
    from training.prepared import prepared
    from training.run import train
    from training.saving import claim_output
    from training.scores import mark_guesses
    from training.state import StopReason
    from weights import checkpoint, lora
    from weights.loading import load_base, load_checkpoint

    kind = "lora" if config.lora_rank else "sft"
    processes = Processes.join(config.device)
    with claim_output(config, processes, kind, inputs=(config.model, config.data)) as resumed:
        start = load_base(resumed, config.out) if resumed and kind == "lora" else resumed
        start = start or checkpoint.grow_vocabulary(load_checkpoint(config.model))
        tokenizer = checkpoint.tokenizer_of(start)

        def prepare_chats(data: str, folder: Path, overwrite: bool) -> list[str]:
            options = {"template": start.get("template") or "chat", "block_size": start["config"].block_size}
            source = data, None if data in CONVERSATIONS else data
            return prepare_conversations(*source, tokenizer, folder, overwrite=overwrite, **options)

        folder = prepared(config.data, CONVERSATIONS, "sft_meta.json", config, processes, prepare_chats)
        config = dataclasses.replace(config, data=folder)
        meta = read_sft_meta(folder)
        remedy = f"prepare the conversations with its tokenizer: prepare_sft_data.py --tokenizer {config.model}"
        require_same_tokenizer(tokenizer.name, meta["tokenizer"], folder, remedy)
        torch.manual_seed(config.seed)
        start["config"] = dataclasses.replace(start["config"], dropout=config.dropout)
        model = checkpoint.build(start)
        metadata: dict[str, Any] = {"kind": kind, "tokenizer": tokenizer.spec, "template": meta["template"]}
        metadata["is_held_out"] = meta.get("is_held_out", True)
        if kind == "lora":
            new = {"rank": config.lora_rank, "alpha": config.lora_alpha, "base": str(config.model)}
            metadata["lora"] = resumed["lora"] if resumed else {**new, "base_sha256": lora.sha256_of(config.model)}
            lora.add_adapter(model, metadata["lora"], config.lora_dropout, tokenizer.user)
            if resumed:
                lora.restore_adapter(model, resumed, config.out)
        n_text, block_size, seed = tokenizer.end_of_text, model.config.block_size, config.seed
        read = partial(Conversations, folder, block_size=block_size, seed=seed, n_text=n_text)
        config, choice = with_steps(config, len(read("train", batch_size=1)))
        processes.print(choice)
        assert config.batch_size
        train_data = read("train", batch_size=config.batch_size, noise=config.question_noise)
        val_data = read("val", batch_size=config.batch_size)
        prompt, questions = config.sample_prompt, val_data.first_exchanges(5)
        examine = continuations(tokenizer, meta["template"], prompt) if prompt else answers(tokenizer, questions)
        reason = train(model, train_data, val_data, config, processes, metadata, resumed=resumed, examine=examine)
        if processes.rank == 0 and not config.plan and reason is not StopReason.INTERRUPTED:
            noise = 0 if metadata["is_held_out"] else NOISE_OF_PARAPHRASES
            print(mark_guesses(config, read("train" if noise else "val", batch_size=1, noise=noise)))


def with_steps(config: Config, n: int) -> tuple[Config, str]:
    """Returns the config for `n` conversations, and what was chosen in words: what the user left open is chosen so that
    there are enough steps."""
    epochs = config.epochs or (2 if config.preset == "demo" else 5)
    batch_size = config.batch_size or (32 if epochs * math.ceil(n / 32) >= FEW_STEPS else 8)
    steps_per_epoch = math.ceil(n / batch_size)
    if config.epochs is None:
        epochs = max(epochs, math.ceil(FEW_STEPS / steps_per_epoch))
    steps = config.max_steps or epochs * steps_per_epoch
    warmup_steps = min(100, steps // 10) if config.warmup_steps is None else config.warmup_steps
    choice = f"{n:,} conversations in batches of {min(n, batch_size)}: {steps:,} steps, "
    choice += f"{steps / steps_per_epoch:,.3g} epochs (--batch-size, --epochs and --max-steps change that)"
    if steps < FEW_STEPS:
        choice += f"\nwarning: {steps} steps teach a model little: leave --batch-size, --epochs and --max-steps out"
    config = dataclasses.replace(
        config, epochs=epochs, batch_size=batch_size, max_steps=steps, warmup_steps=warmup_steps
    )
    return config, choice


if __name__ == "__main__":
    run(main, Config, PRESETS)
