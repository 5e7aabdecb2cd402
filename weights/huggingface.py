"""Models in the format of Hugging Face's `transformers`, in a folder or on the Hub. `to_huggingface.py` writes them.

The GPT-2 of 2019 is its GPT-2. The modern recipe is its Persimmon: rotary positions over whole heads, LayerNorm of
queries and keys, a squared ReLU.
"""

import functools
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from gpt_config import GPTConfig
from system.cli import shorten
from system.errors import UserError, is_out_of_memory
from system.files import read_json
from text import tokenizer as tokenizers
from text.chat import jinja_template
from weights.checkpoint import Checkpoint, checked

HUB_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")} | {
    "distilgpt2": "distilbert/distilgpt2"
}
"""Short names of models on the Hub."""

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""Matrices that `transformers` stores as (in, out), in its class Conv1D; ours are (out, in)."""

FILES_READ = [
    *("config.json", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "chat_template.jinja"),
    *("model.safetensors", "model-*.safetensors"),
]
MODERN_FIELDS = ("rotary", "qk_norm", "squared_relu")
"""Fields of GPTConfig that Persimmon has, all of them, and GPT-2 none."""


def find_folder(name: str | Path) -> Path | None:
    """Returns the local folder of a model: `name` itself, or the snapshot of a model of the Hub.

    A model of the Hub comes from its cache, or is downloaded into it. Returns None if `name` cannot be either. Raises
    UserError if the Hub does not deliver the model.
    """
    path, name = Path(name), str(name)
    if (path / "config.json").is_file():
        return path
    is_hub_name = name in HUB_NAMES or re.fullmatch(r"[\w-]+/[\w.-]+", name)
    is_local = path.suffix == ".pt" or path.exists() or (len(path.parts) > 1 and path.parent.exists())
    return _snapshot(name) if is_hub_name and not is_local else None


@functools.cache  # ask the Hub once per process
def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(HUB_NAMES.get(name, name), allow_patterns=FILES_READ))
    except Exception as error:  # the client of the Hub raises many types
        problem = f"cannot get {name} from the Hugging Face Hub, nor is it in the cache ({type(error).__name__})"
        raise UserError(f"{problem}: check the name and the network, or name a local folder or checkpoint") from None


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a folder, in the order of their names. Raises UserError if there is none."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder}/model.safetensors is missing: only weights in safetensors are read, never pickles")
    return files


def read_folder(folder: Path) -> Checkpoint:
    """Returns the checkpoint in a folder, of the kind "base" or "sft", with float32 tensors on the CPU.

    Raises UserError if the model is not a GPT-2 like OpenAI's, if it is a classifier, or if files are damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        hf_config = read_json(folder / "config.json")
        stored: dict[str, Tensor] = {}
        for file in weight_files(folder):
            stored |= load_file(file)
        if "score.weight" in stored:
            raise UserError(f"{folder} holds a classifier: only language models are read from such a folder")
        is_persimmon = hf_config.get("model_type") == "persimmon"
        weights, shape = (_from_persimmon if is_persimmon else _from_gpt2)(stored, hf_config, folder)
        vocab_size, tokenizer, template = len(weights["wte.weight"]), _read_tokenizer(folder), _read_template(folder)
        config = GPTConfig(vocab_size=vocab_size, n_tokens=min(vocab_size, tokenizer.n_tokens), **shape)
        metadata = {"kind": "sft" if template else "base", "tokenizer": tokenizer.spec, "template": template}
        return checked({**metadata, "model": weights, "config": config}, folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        problem = f"{type(error).__name__}: {shorten(str(error), 200)}"
        raise UserError(f"cannot read a GPT-2 from {folder} ({problem}): download or export the model again") from None


def _from_gpt2(
    stored: dict[str, Tensor], hf_config: dict[str, Any], folder: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the weights of a GPT-2 under our names, and its shape."""
    accepted: dict[str, tuple[object, ...]] = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", None),
        "layer_norm_epsilon": (1e-5, None),
        "n_inner": (None, 4 * hf_config.get("n_embd", 0)),
        "scale_attn_by_inverse_layer_idx": (False, None),
        "scale_attn_weights": (True, None),
        "add_cross_attention": (False, None),
    }
    _require(accepted, hf_config, folder, "a GPT-2 like OpenAI's")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    weights = {name: tensor.mT if name.endswith(CONV1D) else tensor for name, tensor in weights.items()}
    shape = {name: hf_config[name] for name in ("n_layer", "n_head", "n_embd")}
    return weights, {
        **shape, "block_size": len(weights["wpe.weight"]), "tie_weights": hf_config.get("tie_word_embeddings", True)
    }  # fmt: skip


def _from_persimmon(
    stored: dict[str, Tensor], hf_config: dict[str, Any], folder: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the weights of a Persimmon under our names, and its shape."""
    rope = {**hf_config, **(hf_config.get("rope_parameters") or {})}
    accepted: dict[str, tuple[object, ...]] = {
        "hidden_act": ("relu2", None),
        "layer_norm_eps": (1e-5, None),
        "qk_layernorm": (True, None),
        "intermediate_size": (4 * hf_config.get("hidden_size", 0),),
        "rope_type": ("default", None),
        "rope_theta": (10000.0,),
        "partial_rotary_factor": (1.0,),
    }
    _require(accepted, rope, folder, "a Persimmon like ours")
    n_head = hf_config["num_attention_heads"]
    names = {theirs: ours for ours, theirs in persimmon_names(hf_config["num_hidden_layers"]).items()}
    weights = {}
    for name, tensor in stored.items():
        if name.endswith(("q_layernorm.weight", "k_layernorm.weight", "q_layernorm.bias", "k_layernorm.bias")):
            if (tensor != float(name.endswith("weight"))).any():
                raise UserError(f"{folder} is not a Persimmon like ours: {name} has values; choose another model")
        else:
            layer, _, kind = name.rpartition(".")
            ours = names[layer]
            if ours.endswith("c_attn"):  # (head, q or k or v, hs, ...)
                tensor = tensor.unflatten(0, (n_head, 3, -1)).transpose(0, 1).flatten(0, 2)
            weights[f"{ours}.{kind}"] = tensor
    return weights, {
        **dict.fromkeys(MODERN_FIELDS, True),
        **{ours: hf_config[theirs] for ours, theirs in (
            ("n_layer", "num_hidden_layers"), ("n_head", "num_attention_heads"), ("n_embd", "hidden_size"),
            ("block_size", "max_position_embeddings"),
        )},
        "tie_weights": hf_config.get("tie_word_embeddings", False),
    }  # fmt: skip


def persimmon_names(n_layer: int) -> dict[str, str]:
    """Returns Persimmon's names of our layers."""
    parts = {
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "attn.c_attn": "self_attn.query_key_value",
        "attn.c_proj": "self_attn.dense",
        "mlp.c_fc": "mlp.dense_h_to_4h",
        "mlp.c_proj": "mlp.dense_4h_to_h",
    }
    outside = {"wte": "model.embed_tokens", "ln_f": "model.final_layernorm", "lm_head": "lm_head"}
    inside = {f"h.{i}.{ours}": f"model.layers.{i}.{theirs}" for i in range(n_layer) for ours, theirs in parts.items()}
    return outside | inside


def _require(accepted: dict[str, tuple[object, ...]], hf_config: dict[str, Any], folder: Path, what: str) -> None:
    for name, values in accepted.items():
        if hf_config.get(name) not in values:
            found = shorten(repr(hf_config.get(name)), 100)
            raise UserError(f"{folder} is not {what}: its {name} is {found}; choose another model")


def _read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    gpt2, path, vocabulary = tokenizers.gpt2(), folder / "tokenizer.json", folder / "vocab.json"
    own = gpt2
    if path.is_file():
        own = tokenizers.load_tokenizer(path)
    elif vocabulary.is_file():
        own = tokenizers.from_vocabulary(vocabulary, folder / "merges.txt")
    return gpt2 if own.mergeable_ranks == gpt2.mergeable_ranks else own


def _read_template(folder: Path) -> str | None:
    """Returns the name of our template if the folder's chat template is ours, which marks a model that answers.

    `transformers` saves the template to a file of its own; our export writes it into tokenizer_config.json.
    """
    settings, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    found = read_json(settings).get("chat_template") if settings.is_file() else None
    if template.is_file():
        found = template.read_text(encoding="utf-8")
    return next((name for name in ("chat", "alpaca") if found == jinja_template(name)), None)
