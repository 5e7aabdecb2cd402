"""Weights that others trained, as checkpoints of ours: Hugging Face's GPT-2 folders and models."""

import contextlib
import functools
import json
import re
from pathlib import Path

import torch
from torch import Tensor

from model import GPTConfig
from system.errors import UserError
from text import tokenizer as tokenizers
from text.templates import jinja_template

HUB_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")} | {
    "distilgpt2": "distilbert/distilgpt2"
}

_FILES = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
]

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # stored transposed


def find_folder(name: str | Path) -> Path | None:
    """Returns the folder of a model in Hugging Face's format: a local one, or a model of the Hub, from its cache or
    downloaded; None for what can be neither. Raises UserError where the Hub does not give it."""
    path, name = Path(name), str(name)
    if (path / "config.json").is_file():
        return path
    is_hub_name = name in HUB_NAMES or re.fullmatch(r"[\w-]+/[\w.-]+", name)
    if not is_hub_name or path.suffix == ".pt" or path.exists() or (len(path.parts) > 1 and path.parent.exists()):
        return None
    return _from_hub(name)


@functools.cache  # the Hub is asked once
def _from_hub(name):
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(HUB_NAMES.get(name, name), allow_patterns=_FILES))
    except Exception as error:  # whatever the Hub's client raises
        what = " ".join(str(error).split())[:150]
        raise UserError(
            f"cannot get {name} from the Hugging Face Hub, nor is it in the cache ({type(error).__name__}: {what}); "
            "without a network, name a local folder or checkpoint"
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a folder in order. Raises UserError where there are none, or one is missing."""
    index = folder / "model.safetensors.index.json"
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else []
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is damaged") from None
    files = [folder / Path(name).name for name in names] or [folder / "model.safetensors"]
    if missing := next((file for file in files if not file.is_file()), None):
        raise UserError(f"{missing} is missing: only weights in safetensors are read, never pickled ones")
    return files


def from_folder(folder: Path) -> dict:
    """Returns the checkpoint in a folder of Hugging Face's format, its tensors mapped from the files.

    Raises UserError for another architecture than GPT-2's, and for damaged files.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _require_gpt2(facts, folder)
        weights = {}
        for file in weight_files(folder):
            weights |= load_file(file)
        weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
        if "score.weight" in weights:
            raise UserError(f"{folder} holds a classifier: only language models are read from such a folder")
        vocab_size, n_embd = weights["wte.weight"].shape
        tokenizer = _tokenizer_of(folder, vocab_size)
        tied = facts.get("tie_word_embeddings", True)
        config = GPTConfig(
            block_size=weights["wpe.weight"].shape[0],
            vocab_size=vocab_size,
            n_tokens=min(vocab_size, tokenizer.n_tokens),
            n_layer=facts["n_layer"],
            n_head=facts["n_head"],
            n_embd=n_embd,
            tie_weights=tied,
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder} holds no GPT-2 that can be read ({type(error).__name__}: {error})") from None
    return as_checkpoint(weights, config, tokenizer, transposed=True) | _kind_of(folder)


def _kind_of(folder):
    """Tells a model that answers, and that `export.py` once wrote, by its template: `transformers` saves it again in a
    file of its own."""
    written = ""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        written = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    with contextlib.suppress(OSError, ValueError):
        written = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for template in ("chat", "alpaca"):
        if written == jinja_template(template):
            return {"kind": "sft", "template": template}
    return {}


def as_checkpoint(weights: dict[str, Tensor], config: GPTConfig, tokenizer, transposed: bool) -> dict:
    kept = {
        name: tensor.t() if transposed and name.endswith(CONV1D) else tensor
        for name, tensor in weights.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))  # masks, not weights
        and not (name == "lm_head.weight" and config.tie_weights)
    }
    kept = {name: tensor.to(torch.float32).contiguous() for name, tensor in kept.items()}
    return {"kind": "base", "model": kept, "config": config, "tokenizer": tokenizer.spec, "template": None}


def _require_gpt2(facts, folder):
    wanted = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", None),
        "layer_norm_epsilon": (1e-5, None),
        "n_inner": (None, 4 * facts.get("n_embd", 0)),
        "scale_attn_by_inverse_layer_idx": (False, None),
        "scale_attn_weights": (True, None),
        "add_cross_attention": (False, None),
    }
    for name, values in wanted.items():
        if facts.get(name) not in values:
            raise UserError(f"{folder} is no GPT-2 as OpenAI's: its {name} is {facts.get(name)!r}")


def _tokenizer_of(folder, vocab_size):
    gpt2 = tokenizers.gpt2()
    found = tokenizers.load_tokenizer(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else gpt2
    if found.mergeable_ranks == gpt2.mergeable_ranks:
        found = gpt2
    if vocab_size <= found.end_of_text:
        raise UserError(f"{folder} has {vocab_size:,} embeddings, fewer than its tokenizer has tokens")
    return found
