"""Exports a model as a folder that `transformers` and every tool that builds on it load, or as one `.pt` of ours."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from system.cli import run
from system.errors import UserError, require


@dataclass(frozen=True)
class Config:
    out: Path
    """folder to write for transformers; or a checkpoint of this project, if the name ends in .pt"""
    model: Path | None = None
    """checkpoint to export: a language model, an adapter (it is merged with its base model) or a classifier; by default
    the newest in checkpoints/"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """precision of the weights"""
    overwrite: bool = False
    """replace an earlier export in --out"""


def main(config: Config) -> None:
    """Loads a checkpoint and writes the folder or the file, whole or not at all."""
    import torch

    from generation.config import SamplingConfig
    from weights import checkpoint as checkpoints
    from weights import describe, to_huggingface
    from weights.loading import load_checkpoint

    out, is_file = config.out, config.out.suffix == ".pt"
    if is_file:
        require(config.dtype == "float32", "a .pt holds float32: leave out --dtype, or name a folder with --out")
        if out.exists() and not config.overwrite:
            raise UserError(f"{out} exists: add --overwrite to replace it")
    else:
        to_huggingface.check_export_folder(out, config.overwrite)
    name = config.model or describe.newest("model")
    checkpoint = load_checkpoint(name, verify=True, kinds=("base", "sft", "classifier"))
    if is_file:
        kept = {key: value for key, value in checkpoint.items() if key not in checkpoints.RESUME_KEYS}
        checkpoints.save(out, kept)
        print(f"wrote {out}")
        return
    sampling, card = SamplingConfig(), describe.model_card(checkpoint, out.resolve().name)
    generation = {"temperature": sampling.temperature, "top_k": sampling.top_k}
    generation["max_new_tokens"] = min(sampling.max_new_tokens, checkpoint["config"].block_size // 2)
    to_huggingface.write_folder(checkpoint, out, getattr(torch, config.dtype), card, **generation)
    print(f"wrote {out}: " + ", ".join(sorted(path.name for path in out.iterdir())))


if __name__ == "__main__":
    run(main, Config)
