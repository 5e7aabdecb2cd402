"""Writes a model as a folder that Hugging Face's `transformers` loads."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_config import GPTConfig, Shape
from system.errors import UserError
from system.files import atomic_folder
from text import tokenizer as tokenizers
from text.chat import jinja_template
from weights.checkpoint import Checkpoint, grow_vocabulary, tokenizer_of
from weights.huggingface import CONV1D, MODERN_FIELDS, persimmon_names

EXPRESSIBLE = {"block_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "tie_weights", *MODERN_FIELDS}
"""Fields of `Shape` that both architectures have, and Persimmon's."""
FILES_WRITTEN = {
    *("README.md", "config.json", "generation_config.json"),
    *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
}


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

    config = checkpoint["config"]
    modern = [name for name in MODERN_FIELDS if getattr(config, name)]
    used = {field.name for field in dataclasses.fields(Shape) if getattr(config, field.name) != field.default}
    lacking = sorted(used - EXPRESSIBLE) or (modern if 0 < len(modern) < len(MODERN_FIELDS) else [])
    if lacking:
        flags = " ".join(f"--no-{name.replace('_', '-')}" for name in lacking)
        problem = f"no architecture of transformers has {', '.join(lacking)} alone"
        raise UserError(f"{problem}: train a model with {flags}, or with the whole modern recipe and nothing else")
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
    """Returns the weights under the names of `transformers`, with missing biases as zeros. GPT-2's matrices are (in,
    out); Persimmon's projection to queries, keys and values is ordered by heads, and its QK-norm has a gain of 1."""
    config, weights = checkpoint["config"], {}
    for name, tensor in checkpoint["model"].items():
        weights[name] = tensor
        if not config.bias and name.endswith((*CONV1D, "ln_1.weight", "ln_2.weight", "ln_f.weight")):
            weights[name.removesuffix("weight") + "bias"] = torch.zeros(len(tensor))
    head = {"lm_head.weight": "score.weight"} if config.n_classes else {}
    names, renamed = persimmon_names(config.n_layer), {}
    for name, tensor in weights.items():
        layer, _, kind = name.rpartition(".")
        if not config.rotary:
            hf_name = name if layer == "lm_head" else f"transformer.{name}"
            tensor = tensor.t() if name.endswith(CONV1D) else tensor
        else:
            hf_name = f"{names[layer]}.{kind}"
            if layer.endswith("c_attn"):
                tensor = tensor.unflatten(0, (3, config.n_head, -1)).transpose(0, 1).flatten(0, 2)
        renamed[head.get(name, hf_name)] = tensor.to(dtype).contiguous()
    for i in range(config.n_layer if config.rotary else 0):
        for part in ("q", "k"):
            norm, size = f"model.layers.{i}.self_attn.{part}_layernorm", config.n_embd // config.n_head
            renamed |= {f"{norm}.weight": torch.ones(size, dtype=dtype), f"{norm}.bias": torch.zeros(size, dtype=dtype)}
    return renamed


def _model_config(checkpoint: Checkpoint, tokenizer: tokenizers.Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    config, labels = checkpoint["config"], checkpoint.get("labels", [])
    family = "Persimmon" if config.rotary else "GPT2"
    task = "ForSequenceClassification" if labels else "ForCausalLM" if config.rotary else "LMHeadModel"
    hf_config = {
        "architectures": [family + task],
        "model_type": family.lower(),
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": (bool(labels) and not config.rotary) or config.tie_weights,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.end_of_text),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if config.rotary:
        rope = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}
        hf_config |= {
            "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head,
            "hidden_size": config.n_embd,
            "intermediate_size": 4 * config.n_embd,
            "max_position_embeddings": config.block_size,
            "hidden_act": "relu2",
            "qk_layernorm": True,
            "layer_norm_eps": 1e-5,
            **dict.fromkeys(("hidden_dropout", "attention_dropout"), config.dropout),
            "rope_parameters": {"rope_type": "default", **rope},
            **rope,  # where versions before 5 look
        }
    else:
        hf_config |= {
            **{name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")},
            **dict.fromkeys(("n_positions", "n_ctx"), config.block_size),
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
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
        "model_input_names": ["input_ids", "attention_mask"],  # GPT-2 would add embeddings of token types
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "pad_token": tokenizers.USER if checkpoint["kind"] == "classifier" else end_of_text,
        "additional_special_tokens": [tokenizers.USER, tokenizers.ASSISTANT][:n_roles],
        **({"chat_template": jinja_template(template)} if template else {}),
    }
