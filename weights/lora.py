"""LoRA (Hu et al. 2021): fine-tuning that learns low-rank corrections of the weight matrices, and freezes the rest.

Learnt are `W + alpha/rank · B A` for every matrix of attention and MLP, and the embedding rows of the role tokens,
which a base model has never seen. An adapter is these tensors alone: `NAME.lora_A` (rank, in), `NAME.lora_B`
(out, rank) and `role_rows` (2, C), all float32.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize

from model import GPT


class LoRALinear(nn.Module):
    """A frozen linear layer and its correction, which is 0 at first: A is random and B is 0."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.linear, self.scale, self.dropout = linear, alpha / rank, dropout
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as in the authors' code

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.training and self.dropout:
            x, _ = torch.native_dropout(x, self.dropout, True)  # on the CPU, F.dropout would keep four times as much
        return y + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


class RoleRows(nn.Module):
    """The embedding with its rows from `first` on replaced by learnt ones, for `wte` and the tied head alike."""

    def __init__(self, rows: nn.Parameter, first: int):
        super().__init__()
        self.rows, self.first = rows, first

    def forward(self, embedding: Tensor) -> Tensor:
        return torch.cat((embedding[: self.first], self.rows, embedding[self.first + len(self.rows) :]))


def add_adapter(model: GPT, rank: int, alpha: float, dropout: float, first_role: int) -> None:
    """Freezes a model and adds an adapter to it; `first_role` is the id of `<|user|>`, `<|assistant|>`'s is the next.

    What trains is what then requires a gradient, under the names of the adapter's tensors.
    """
    model.requires_grad_(False)
    for module in [module for block in model.h for module in (block.attn, block.mlp)]:
        for name, linear in list(module.named_children()):
            setattr(module, name, LoRALinear(linear, rank, alpha, dropout))
    model.role_rows = nn.Parameter(model.wte.weight[first_role : first_role + 2].clone())
    for layer in (model.wte, model.lm_head) if model.config.tie_weights else (model.wte,):
        parametrize.register_parametrization(layer, "weight", RoleRows(model.role_rows, first_role))


def merge(weights: dict[str, Tensor], adapter: dict[str, Tensor], scale: float, first_role: int) -> dict[str, Tensor]:
    """Returns the weights of a plain model that computes what `weights` with the adapter do; `scale` is alpha/rank."""
    merged = {**weights, "wte.weight": weights["wte.weight"].clone()}
    merged["wte.weight"][first_role : first_role + 2] = adapter["role_rows"]
    for name in [name.removesuffix("lora_A") for name in adapter if name.endswith("lora_A")]:
        A, B, W = adapter[name + "lora_A"], adapter[name + "lora_B"], weights[name + "weight"]
        merged[name + "weight"] = torch.addmm(W, B, A, alpha=scale)
    return merged
