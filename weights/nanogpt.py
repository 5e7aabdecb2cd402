"""Reads nanoGPT's `ckpt.pt` as a checkpoint of ours."""

from pathlib import Path
from typing import Any

from gpt_config import GPTConfig
from system.errors import UserError
from text import tokenizer as tokenizers
from weights.checkpoint import Checkpoint, checked


def from_nanogpt(contents: dict[str, Any], path: str | Path) -> Checkpoint:
    """Returns the checkpoint in the contents of nanoGPT's file `path`.

    nanoGPT trains with the exact GELU, our model computes GPT-2's tanh approximation: activations differ by less than
    5e-4. Raises UserError if the vocabulary is not GPT-2's, or the contents are incomplete.
    """
    tokenizer = tokenizers.gpt2()
    try:
        args, n_tokens = contents["model_args"], tokenizer.end_of_text + 1
        if args["vocab_size"] < n_tokens:
            raise UserError(
                f"{path} has a vocabulary of {args['vocab_size']:,} tokens: only GPT-2's 50,257 can be read"
            )
        names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")
        config = GPTConfig(**{name: args[name] for name in names}, n_tokens=n_tokens)
        found = contents["model"].items()
        weights = {name.removeprefix("_orig_mod.").removeprefix("transformer."): tensor for name, tensor in found}
        metadata = {"kind": "base", "tokenizer": tokenizer.spec, "template": None, "step": contents.get("iter_num", 0)}
        return checked({**metadata, "model": weights, "config": config}, path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a checkpoint of nanoGPT, or damaged ({type(error).__name__})") from None
