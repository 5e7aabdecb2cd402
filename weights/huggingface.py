"""Models in the format of Hugging Face's `transformers`: reads a folder or a model of the Hub, and writes a folder."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_config import GPTConfig
from system.cli import shorten
from system.errors import UserError, is_out_of_memory
from system.files import atomic_folder, read_json
from text import tokenizer as tokenizers
from text.chat import jinja_template
from weights.checkpoint import Checkpoint, checked, grow_vocabulary, tokenizer_of

HUB_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")} | {
    "distilgpt2": "distilbert/distilgpt2"
}
"""Short names of models on the Hub."""

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""Matrices that `transformers` stores as (in, out), in its class Conv1D; ours are (out, in)."""

FILES_READ = [
    *("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("model.safetensors", "model-*.safetensors"),
]
FILES_WRITTEN = {
    *("README.md", "config.json", "generation_config.json"),
    *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
}
MODERN_FIELDS = ("rotary", "qk_norm", "squared_relu")
"""Fields of GPTConfig that the GPT-2 of `transformers` does not have."""


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
        _require_gpt2(hf_config, folder)
        weights: dict[str, Tensor] = {}
        for file in weight_files(folder):
            weights |= {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
        if "score.weight" in weights:
            raise UserError(f"{folder} holds a classifier: only language models are read from such a folder")
        weights = {name: tensor.mT if name.endswith(CONV1D) else tensor for name, tensor in weights.items()}
        vocab_size, tokenizer, template = len(weights["wte.weight"]), _read_tokenizer(folder), _read_template(folder)
        config = GPTConfig(
            block_size=len(weights["wpe.weight"]),
            vocab_size=vocab_size,
            n_tokens=min(vocab_size, tokenizer.n_tokens),
            **{name: hf_config[name] for name in ("n_layer", "n_head", "n_embd")},
            tie_weights=hf_config.get("tie_word_embeddings", True),
        )
        metadata = {"kind": "sft" if template else "base", "tokenizer": tokenizer.spec, "template": template}
        return checked({**metadata, "model": weights, "config": config}, folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        problem = f"{type(error).__name__}: {shorten(str(error), 200)}"
        raise UserError(f"cannot read a GPT-2 from {folder} ({problem}): download or export the model again") from None


def _require_gpt2(hf_config: dict[str, Any], folder: Path) -> None:
    accepted: dict[str, tuple[object, ...]] = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", None),
        "layer_norm_epsilon": (1e-5, None),
        "n_inner": (None, 4 * hf_config.get("n_embd", 0)),
        "scale_attn_by_inverse_layer_idx": (False, None),
        "scale_attn_weights": (True, None),
        "add_cross_attention": (False, None),
    }
    for name, values in accepted.items():
        if hf_config.get(name) not in values:
            found = shorten(repr(hf_config.get(name)), 100)
            raise UserError(f"{folder} is not a GPT-2 like OpenAI's: its {name} is {found}; choose another model")


def _read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    gpt2, path = tokenizers.gpt2(), folder / "tokenizer.json"
    own = tokenizers.load_tokenizer(path) if path.is_file() else gpt2
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


def check_export_folder(folder: Path, overwrite: bool) -> None:
    """Raises UserError unless `folder` is missing or empty, or `overwrite` is given and it holds only an export."""
    names = {path.name for path in folder.glob("*") if not path.name.startswith(".config.json.")}  # of a killed export
    if names and not overwrite:
        raise UserError(f"{folder} is not empty: choose another --out, or add --overwrite to replace an earlier export")
    if names and not {"README.md", "model.safetensors"} <= names <= FILES_WRITTEN:
        raise UserError(f"{folder} holds more than an export: choose another --out")


def write_folder(
    checkpoint: Checkpoint, folder: Path, dtype: torch.dtype = torch.float32, card: str = "", **generation: object
) -> None:
    """Writes a checkpoint (base, sft or classifier) as a folder that `transformers` loads, whole or not at all.

    `card` is the text of README.md. `generation` holds further settings for generation_config.json. Raises UserError if
    `transformers` cannot express the model, or the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if modern := [name for name in MODERN_FIELDS if getattr(checkpoint["config"], name)]:
        flags = " ".join(f"--no-{name.replace('_', '-')}" for name in modern)
        raise UserError(f"the GPT-2 of transformers has no setting for {', '.join(modern)}: train a model with {flags}")
    is_classifier = checkpoint["kind"] == "classifier"
    if is_classifier:
        checkpoint = grow_vocabulary(checkpoint)  # <|user|> becomes its padding token
    tokenizer, n_tokens = tokenizer_of(checkpoint), checkpoint["config"].n_tokens
    settings = {"config.json": _model_config(checkpoint, tokenizer, dtype)}
    settings["tokenizer_config.json"] = _tokenizer_config(checkpoint, tokenizer)
    if not is_classifier:
        settings["generation_config.json"] = {**_generation_config(checkpoint["config"], tokenizer), **generation}
    texts = {file: json.dumps(values, indent=2) + "\n" for file, values in settings.items()}
    texts["tokenizer.json"] = tokenizers.to_json(tokenizer, n_tokens, ends_texts=is_classifier)
    texts["README.md"] = card
    try:
        with atomic_folder(folder, "config.json") as temporary:
            weights = temporary / "model.safetensors"
            save_file(_with_hf_names(checkpoint, dtype), weights, metadata={"format": "pt"})
            weights.chmod(0o644)  # safetensors lets only the owner read the file
            for name, text in texts.items():
                (temporary / name).write_text(text, encoding="utf-8")
    except SafetensorError as error:  # the disk is full
        raise UserError(f"cannot write to {folder}: {error}; the old files, if any, are unchanged") from None
    for name in FILES_WRITTEN - texts.keys() - {"model.safetensors"}:
        (folder / name).unlink(missing_ok=True)


def _with_hf_names(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the weights under the names of `transformers`: matrices as (in, out), missing biases as zeros."""
    config, weights = checkpoint["config"], {}
    for name, tensor in checkpoint["model"].items():
        hf_name = f"transformer.{name}"
        if name == "lm_head.weight":
            hf_name = "score.weight" if config.n_classes else name
        if not config.bias and name.endswith((*CONV1D, "ln_1.weight", "ln_2.weight", "ln_f.weight")):
            weights[hf_name.removesuffix("weight") + "bias"] = torch.zeros(len(tensor), dtype=dtype)
        weights[hf_name] = (tensor.t() if name.endswith(CONV1D) else tensor).to(dtype).contiguous()
    return weights


def _model_config(checkpoint: Checkpoint, tokenizer: tokenizers.Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    config, labels = checkpoint["config"], checkpoint.get("labels", [])
    hf_config = {
        "architectures": ["GPT2ForSequenceClassification" if labels else "GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{name: getattr(config, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")},
        **dict.fromkeys(("n_positions", "n_ctx"), config.block_size),
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        "tie_word_embeddings": bool(labels) or config.tie_weights,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.end_of_text),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if labels:
        hf_config |= {"pad_token_id": tokenizer.user, "problem_type": "single_label_classification"}
        hf_config |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    return hf_config


def _generation_config(config: GPTConfig, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """Returns settings for sampling: each control token ends a text, and padding ids are never sampled."""
    padding = list(range(config.n_tokens, config.vocab_size))
    return {
        **dict.fromkeys(("bos_token_id", "pad_token_id"), tokenizer.end_of_text),
        "eos_token_id": list(range(tokenizer.end_of_text, config.n_tokens)),
        "do_sample": True,
        **({"suppress_tokens": padding} if padding else {}),
    }


def _tokenizer_config(checkpoint: Checkpoint, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    config, end_of_text, template = checkpoint["config"], tokenizers.END_OF_TEXT, checkpoint.get("template")
    n_roles = max(0, config.n_tokens - tokenizer.user)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.block_size,
        "clean_up_tokenization_spaces": False,
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "pad_token": tokenizers.USER if checkpoint["kind"] == "classifier" else end_of_text,
        "additional_special_tokens": [tokenizers.USER, tokenizers.ASSISTANT][:n_roles],
        **({"chat_template": jinja_template(template)} if template else {}),
    }
