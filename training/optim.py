"""The optimizers: AdamW with GPT-2's rule for weight decay, and Muon for the matrices inside the blocks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model import GPT
from training.config import TrainerConfig

if TYPE_CHECKING:
    from training.sharding import Sharding


def build_optimizers(
    model: GPT,
    config: TrainerConfig,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    sharding: Sharding | None = None,
) -> list[torch.optim.Optimizer]:
    """Returns [AdamW], or with `--optimizer muon` [Muon for the matrices inside the blocks, AdamW for the rest].

    Matrices and embeddings decay; biases and LayerNorms do not. AdamW's beta1 is 0.9. Muon orthogonalizes in `dtype`;
    `compiled` compiles it. `sharding` is that of a sharded model.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    embeddings = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    in_blocks = [p for p in model.h.parameters() if p.dim() == 2 and p.requires_grad]
    for_muon = in_blocks if config.optimizer == "muon" else []
    scaled = [p for p in trained if p in embeddings] if config.embedding_lr_scale != 1 else []
    rest = set(trained).difference(for_muon, scaled)
    decay, learning_rate = config.weight_decay, config.learning_rate
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p in rest and p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in trained if p in rest and p.dim() < 2], "weight_decay": 0.0},
    ]
    if scaled:
        groups.append({"params": scaled, "weight_decay": decay, "lr_scale": config.embedding_lr_scale})
    is_fused = trained[0].device.type != "mps"
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, config.beta2), fused=is_fused)
    return [Muon(for_muon, learning_rate, decay, dtype, compiled, sharding), adamw] if for_muon else [adamw]


def learning_rate_at(step: int, config: TrainerConfig) -> float:
    """Returns the learning rate of a step: a linear warm-up to `learning_rate`, then the way down to `min_lr`.

    The way is a cosine over all remaining steps (GPT-3, Brown et al. 2020); or with `cooldown` a straight line over the
    last steps, and a constant rate before them (Hägele et al. 2024).
    """
    n_warmup = min(config.warmup_steps, config.max_steps // 5)
    lowest = config.learning_rate / 10 if config.min_lr is None else config.min_lr
    if step < n_warmup:
        return config.learning_rate * (step + 1) / (n_warmup + 1)
    if config.cooldown:
        left = min(1.0, (config.max_steps - step) / (config.cooldown * config.max_steps))
    else:
        progress = (step - n_warmup) / max(1, config.max_steps - n_warmup)
        left = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return lowest + left * (config.learning_rate - lowest)


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], learning_rate: float) -> None:
    """Sets the learning rate of every group of parameters, in proportion to the group's `lr_scale`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized by Newton–Schulz (Jordan et al. 2024), with steps as large as AdamW's (Liu et al. 2025).

    Computes the update of `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`. Two differences make it fast everywhere:
    it orthogonalizes all matrices of one shape as one batch, and in any precision, since bfloat16 is slow on many CPUs.
    """

    _step_supports_amp_scaling = True
    """Tells `GradScaler` to set `found_inf`, which is 1 if a gradient overflowed, and not to wait for its value."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
        sharding: Sharding | None = None,
    ) -> None:
        """Orthogonalizes in `dtype`. `compiled` compiles that, once for each shape. With `sharding` each process holds
        a shard of every matrix and of its momentum, and orthogonalizes some whole matrices for all."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        self.dtype, self.sharding = dtype, sharding
        self.orthogonalize = torch.compile(orthogonalize, dynamic=False) if compiled else orthogonalize

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient. Changes nothing if a gradient overflowed in float16."""
        overflowed = getattr(self, "found_inf", None)
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                gradients = self.local([p.grad for p in params if p.grad is not None])
                momenta = self.local([self.state[p]["momentum"] for p in params])
                if overflowed is not None:
                    gradients = [g.where(overflowed == 0, m) for g, m in zip(gradients, momenta, strict=True)]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                nesterov = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"])).to(self.dtype)
                if self.sharding:  # (n, rows of this process, columns)
                    updates = self.sharding.map_whole(self.orthogonalize, nesterov, n_rows=shape[0])
                else:  # (n, rows, columns)
                    updates = self.orthogonalize(nesterov)
                weights = self.local(params)
                updates, decay = updates.to(weights[0].dtype), group["lr"] * group["weight_decay"]
                if overflowed is not None:
                    updates, decay = updates * (1 - overflowed), decay * (1 - overflowed)
                torch._foreach_mul_(weights, 1 - decay)
                torch._foreach_add_(weights, list(updates), alpha=-0.2 * group["lr"] * max(shape) ** 0.5)

    def local(self, tensors: list[Tensor]) -> list[Tensor]:
        """Returns the tensors themselves, or this process's slices of them."""
        return [self.sharding.local(tensor) for tensor in tensors] if self.sharding else tensors


def orthogonalize(matrices: Tensor) -> Tensor:
    """Returns matrices (n, rows, columns) whose singular values are near 1, by 5 Newton–Schulz steps of degree 5."""
    if matrices.size(1) > matrices.size(2):
        return orthogonalize(matrices.transpose(1, 2)).transpose(1, 2)
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)  # (n, rows, rows)
        # x = 3.4445 x + (-4.7750 gram + 2.0315 gram²) x, with the coefficients of Jordan et al.
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x
