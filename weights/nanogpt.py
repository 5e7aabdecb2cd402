"""nanoGPT's `ckpt.pt`, as a checkpoint of ours."""

from pathlib import Path

from model import GPTConfig
from system.errors import UserError
from text import tokenizer as tokenizers
from weights.huggingface import as_checkpoint


def from_nanogpt(state: dict, path: str | Path) -> dict:
    """Returns the checkpoint in what nanoGPT saved. Raises UserError where its tokenizer was not GPT-2's.

    nanoGPT trains with the exact GELU, for which ours is GPT-2's approximation: activations differ by less than 5e-4.
    """
    try:
        args = state["model_args"]
        weights = {
            name.removeprefix("_orig_mod.").removeprefix("transformer."): tensor
            for name, tensor in state["model"].items()
        }
        tokenizer, vocab_size = tokenizers.gpt2(), args["vocab_size"]
        if vocab_size <= tokenizer.end_of_text:
            raise UserError(
                f"{path} has a vocabulary of {vocab_size:,} tokens: only GPT-2's can be used, its file has no other"
            )
        names = ("block_size", "n_layer", "n_head", "n_embd", "bias")
        config = GPTConfig(
            **{name: args[name] for name in names}, vocab_size=vocab_size, n_tokens=tokenizer.end_of_text + 1
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a checkpoint of nanoGPT that can be read ({type(error).__name__})") from None
    return as_checkpoint(weights, config, tokenizer, transposed=False) | {"step": int(state.get("iter_num", 0))}
