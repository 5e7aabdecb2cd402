"""LoRA (Hu et al. 2021): fine-tuning that learns low-rank corrections of the weight matrices and freezes the rest.

An adapter learns `W + alpha/rank · B A` for every matrix of attention and MLP, and the embedding rows of the role
tokens, which no base model has seen. Its float32 tensors are `NAME.lora_A` (rank, in), `NAME.lora_B` (out, rank) and
`role_rows` (2, C). A checkpoint of the kind "lora" holds these tensors alone, and in `lora` the name and the SHA-256
sum of its base model.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize

from model import GPT
from system.errors import UserError
from weights import huggingface
from weights.checkpoint import Checkpoint, pack, require_fit, tokenizer_of


class LoRALinear(nn.Module):
    """A frozen linear layer and its correction, which starts at 0: A is random and B is 0."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.linear, self.scale, self.dropout = linear, alpha / rank, dropout
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as in the authors' code

    def forward(self, x: Tensor) -> Tensor:
        """Maps activations (..., in) to (..., out)."""
        y = self.linear(x)
        if self.training and self.dropout:
            x, _ = torch.native_dropout(x, self.dropout, True)  # on the CPU, F.dropout keeps four times as much memory
        return y + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


class RoleRows(nn.Module):
    """Replaces the rows of an embedding from `first` on by learnt rows, for `wte` and the tied head alike."""

    def __init__(self, rows: nn.Parameter, first: int):
        super().__init__()
        self.rows, self.first = rows, first

    def forward(self, embedding: Tensor) -> Tensor:
        """Returns the embedding (V, C) with the learnt rows in place."""
        return torch.cat((embedding[: self.first], self.rows, embedding[self.first + len(self.rows) :]))


def add_adapter(model: GPT, adapter: dict[str, Any], dropout: float, first_role: int) -> None:
    """Freezes a model and adds an adapter; afterwards only the adapter's tensors require a gradient.

    `adapter` has its rank and alpha; `first_role` is the id of `<|user|>`; the id of `<|assistant|>` is the next one.
    """
    model.requires_grad_(False)
    for module in list(model.h.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, LoRALinear(child, adapter["rank"], adapter["alpha"], dropout))
    model.role_rows = nn.Parameter(model.wte.weight[first_role : first_role + 2].clone())
    for layer in (model.wte, model.lm_head) if model.config.tie_weights else (model.wte,):
        parametrize.register_parametrization(layer, "weight", RoleRows(model.role_rows, first_role))


def restore_adapter(model: GPT, adapter: Checkpoint, path: str | Path) -> None:
    """Puts an adapter from the file `path` into a model that `add_adapter` prepared; UserError if it does not fit."""
    require_fit(adapter["model"], pack(model, kind="lora")["model"], path)
    model.load_state_dict(adapter["model"], strict=False)


def merge_into_base(adapter: Checkpoint, base: Checkpoint, path: str | Path) -> Checkpoint:
    """Returns the whole model, of the kind "sft", that the adapter in the file `path` makes of its base model.
    Raises UserError if the two do not fit."""
    rank, first_role, weights = adapter["lora"]["rank"], tokenizer_of(adapter).user, {**base["model"]}
    layers = {name.removesuffix("weight"): W for name, W in weights.items() if name.startswith("h.") and W.dim() == 2}
    expected = {"role_rows": weights["wte.weight"][:2]}
    for name, W in layers.items():
        expected[name + "lora_A"] = torch.empty(rank, W.size(1))
        expected[name + "lora_B"] = torch.empty(W.size(0), rank)
    require_fit(adapter["model"], expected, path)
    weights["wte.weight"] = weights["wte.weight"].clone()
    weights["wte.weight"][first_role : first_role + 2] = adapter["model"]["role_rows"]
    for name, W in layers.items():
        A, B = adapter["model"][name + "lora_A"], adapter["model"][name + "lora_B"]
        weights[name + "weight"] = torch.addmm(W, B, A, alpha=adapter["lora"]["alpha"] / rank)  # (out, in)
    metadata = {name: value for name, value in adapter.items() if name != "lora"}
    return {**metadata, "kind": "sft", "config": base["config"], "model": weights}


def find_base(adapter: Checkpoint, path: str | Path) -> Path:
    """Returns the base model of the adapter in the file `path`: the name it had in training, or a file beside `path`.

    Raises UserError if the base model is missing, or if its SHA-256 sum is not that in the adapter.
    """
    base, sha256 = Path(adapter["lora"]["base"]), adapter["lora"]["base_sha256"]
    files = [file for file in (base, Path(path).parent / base.name) if file.is_file()]
    found = [base] if huggingface.find_folder(base) else files
    for candidate in found:
        if sha256_of(candidate) == sha256:
            return candidate
    problem = f"{found[0]} has changed since" if found else "it is missing"
    raise UserError(f"{path} adapts the model {base} (SHA-256 {sha256[:12]}…), but {problem}: put that file back")


def sha256_of(model: str | Path) -> str:
    """Returns the SHA-256 sum of a checkpoint's file, or of the weights of a Hugging Face model; for several files, the
    sum of their concatenated sums."""
    folder = huggingface.find_folder(model)
    files = huggingface.weight_files(folder) if folder else [Path(model)]
    sums = []
    for file in files:
        with open(file, "rb") as opened:
            sums.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()
