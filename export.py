"""Weights out: a folder that `transformers` loads without any code of ours, and so does what is built on it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from system.cli import run
from system.errors import UserError

NAMES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@dataclass(frozen=True)
class Config:
    out: Path
    """the folder to write"""
    model: Path = Path("checkpoints/pretrained.pt")
    """checkpoint to export: a language model, an adapter, which is merged, or a classifier"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """precision of the weights"""
    trim_vocab: bool = False
    """leave out the rows of the embedding that pad the vocabulary to a multiple of 64"""
    overwrite: bool = False
    """replace what an earlier export wrote to --out"""


def main(config: Config) -> None:
    """Reads a checkpoint and writes the folder, as a whole or not at all."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from system.files import atomic_folder
    from text.tokenizer import to_json
    from weights import checkpoint
    from weights.model_card import model_card

    check_folder(config)
    state = checkpoint.load(config.model, verify=True, kinds=("base", "sft", "classifier"))
    checkpoint.build(state, config.model)  # weights that do not fit their config are found here
    if is_classifier := state["kind"] == "classifier":
        state = checkpoint.grow_vocabulary(state)  # it needs a token to pad with
    known = checkpoint.tokenizer(state)
    try:
        with atomic_folder(config.out, "config.json") as folder:
            weights = named_as_theirs(state, getattr(torch, config.dtype), config.trim_vocab)
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            (folder / "model.safetensors").chmod(0o644)  # that library lets only the owner read it
            files = {
                "config.json": model_config(state, known, config),
                "tokenizer.json": to_json(known, state["config"].n_tokens, ends_texts=is_classifier),
                "tokenizer_config.json": tokenizer_config(state, known),
                "README.md": model_card(state, config.out.resolve().name),
            }
            if not is_classifier:
                files["generation_config.json"] = generation_config(state, known, config)
            for name, content in files.items():
                text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
                (folder / name).write_text(text, encoding="utf-8")
    except SafetensorError as error:  # how that library says that the disk is full
        raise UserError(f"cannot write to {config.out}: {error}; what was there is as it was") from None
    for name in NAMES - files.keys() - {"model.safetensors"}:  # of an earlier export of another kind
        (config.out / name).unlink(missing_ok=True)
    print(f"{config.out}: " + ", ".join(sorted(path.name for path in config.out.iterdir())))


def check_folder(config: Config) -> None:
    """Raises UserError where --out is not empty, unless --overwrite is given and an export wrote all that it holds."""
    if not config.out.exists():
        return
    if not config.out.is_dir():
        raise UserError(f"--out {config.out} is a file: name a folder")
    names = {path.name for path in config.out.iterdir()} - {".prepare-config.json"}  # left by one that was killed
    if names and not config.overwrite:
        raise UserError(f"{config.out} is not empty: choose another --out, or --overwrite what an export wrote there")
    if names - NAMES or (names and not is_ours(config.out)):
        raise UserError(f"{config.out} holds more than an export: choose another --out")


def is_ours(folder: Path) -> bool:
    """Tells whether a folder holds a GPT-2's config, or the mark of an export that was killed while it replaced one."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return "incomplete" in config or config["model_type"] == "gpt2"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def named_as_theirs(state: dict, dtype, trim_vocab: bool) -> dict:
    """Returns a checkpoint's weights under `transformers`' names: linear layers transposed, absent biases as zeros."""
    import torch

    from weights.huggingface import CONV1D

    config, weights = state["config"], {}
    for name, tensor in state["model"].items():
        if trim_vocab and name in ("wte.weight", "lm_head.weight"):
            tensor = tensor[: config.n_tokens]
        theirs = f"transformer.{name}"
        if name == "lm_head.weight":
            theirs = "score.weight" if config.n_classes else name
        if not config.bias and name.endswith((*CONV1D, "ln_1.weight", "ln_2.weight", "ln_f.weight")):
            weights[theirs.removesuffix("weight") + "bias"] = torch.zeros(len(tensor), dtype=dtype)
        weights[theirs] = (tensor.t() if name.endswith(CONV1D) else tensor).to(dtype).contiguous()
    return weights


def model_config(state: dict, known, config: Config) -> dict:
    """Returns the content of config.json: GPT-2's, or that of a GPT-2 which classifies."""
    shape, labels = state["config"], state.get("labels", [])
    return {
        "architectures": ["GPT2ForSequenceClassification" if labels else "GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": shape.n_tokens if config.trim_vocab else shape.vocab_size,
        "n_positions": shape.block_size,
        "n_ctx": shape.block_size,
        "n_layer": shape.n_layer,
        "n_head": shape.n_head,
        "n_embd": shape.n_embd,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), shape.dropout),
        "tie_word_embeddings": bool(labels) or shape.tie_weights,
        "bos_token_id": known.end_of_text,
        "eos_token_id": known.end_of_text,
        "torch_dtype": config.dtype,
        **(
            {
                "pad_token_id": known.user,
                "problem_type": "single_label_classification",
                "id2label": dict(enumerate(labels)),
                "label2id": {label: i for i, label in enumerate(labels)},
            }
            if labels
            else {}
        ),
    }


def generation_config(state: dict, known, config: Config) -> dict:
    """Returns the content of generation_config.json: our defaults; control tokens end a text, padding never comes."""
    from generation.config import SamplingConfig

    shape, ours = state["config"], SamplingConfig()
    padding = [] if config.trim_vocab else list(range(shape.n_tokens, shape.vocab_size))
    return {
        "bos_token_id": known.end_of_text,
        "eos_token_id": list(range(known.end_of_text, shape.n_tokens)),
        "pad_token_id": known.end_of_text,
        **({"suppress_tokens": padding} if padding else {}),
        "do_sample": True,
        "temperature": ours.temperature,
        "top_k": ours.top_k,
        "max_new_tokens": ours.max_new_tokens,
    }


def tokenizer_config(state: dict, known) -> dict:
    """Returns the content of tokenizer_config.json, the chat template included."""
    from text.templates import jinja_template
    from text.tokenizer import ASSISTANT, END_OF_TEXT, USER

    n_roles = state["config"].n_tokens - known.user
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": state["config"].block_size,
        "clean_up_tokenization_spaces": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": USER if state["kind"] == "classifier" else END_OF_TEXT,
        "additional_special_tokens": [USER, ASSISTANT][: max(0, n_roles)],
    }
    if state.get("template"):
        facts["chat_template"] = jinja_template(state["template"])
    return facts


if __name__ == "__main__":
    run(main, Config)
