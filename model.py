"""GPT-2 (Radford et al. 2019): the network and its loss.

Names and shapes are those of OpenAI's release, so its weights load by name. In the comments: B sequences, T positions,
C = n_embd, nh heads of size hs = C / nh, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gpt_config import GPTConfig

IGNORE_INDEX = -100
"""The target of a position whose loss does not count."""

ChunkLoss = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor, Tensor]]
"""The type of `chunk_loss` and of its compiled version."""


CachedAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of T new positions in one layer with a cache: from their queries, keys and values (B, nh, T, hs), which it
stores, to the attention (B, nh, T, hs) to all positions up to their own. See `generation/decoding.py`."""


class CausalSelfAttention(nn.Module):
    """Multi-head attention to this position and earlier ones (Vaswani et al. 2017)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout, self.qk_norm = config.n_head, config.dropout, config.qk_norm
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, rotation: Tensor | None = None, cache: CachedAttention | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        if self.qk_norm:  # LayerNorm: RMSNorm has no fused kernel on the CPU
            q, k = F.layer_norm(q, q.shape[-1:]), F.layer_norm(k, k.shape[-1:])
        if rotation is not None:
            q, k = rotate(q, rotation).to(v.dtype), rotate(k, rotation).to(v.dtype)
        dropout = self.dropout if self.training else 0.0
        y = cache(q, k, v) if cache else causal_attention(q, k, v, dropout)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side
        return F.dropout(self.c_proj(y), self.dropout, self.training)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Returns the attention of q (B, nh, T, hs) to the keys k and values v of this position and earlier ones."""
    if q.device.type == "cpu" and q.size(2) <= 256 and compute_dtype(v) == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):  # in bfloat16, the backward pass takes up to six times as long
            y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True, dropout_p=dropout)
            return y.to(v.dtype)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)


def rotary_angles(positions: Tensor, head_size: int) -> Tensor:
    """Returns what `rotate` needs at positions, int64 (T,): cosines and signed sines, float32 (2, T, hs)."""
    frequencies = 10000 ** (-torch.arange(0, head_size, 2, device=positions.device) / head_size)  # (hs / 2,)
    angles = positions[:, None] * frequencies  # (T, hs / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turns pairs of numbers in x (B, nh, T, hs) by angles that grow with the position, so that the product of a query
    and a key depends on their distance alone. Number i forms a pair with number i + hs / 2. Returns float32."""
    cos, sin = rotation  # (T, hs)
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)


class MLP(nn.Module):
    """Two linear layers, and between them GPT-2's tanh approximation of the GELU (Hendrycks & Gimpel 2016) or a squared
    ReLU."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout, self.squared_relu = config.dropout, config.squared_relu
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # (B, T, 4C)
        x = F.relu(x).square() if self.squared_relu else F.gelu(x, approximate="tanh")
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Attention and MLP. Each reads the normalized residual stream and adds its output to it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotation: Tensor | None = None, cache: CachedAttention | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rotation, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The language model: `model(tokens)` returns logits, `model(tokens, targets)` the loss.

    `generation/` writes text with it, and `training/` trains it.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.compiled: tuple[Callable[..., Tensor], ChunkLoss] | None = None  # see `compile_training`
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = None if config.rotary else nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.n_classes or config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        self.init_weights()

    def init_weights(self) -> None:
        """Draws the weights from N(0, 0.02). Biases are 0.

        Each layer adds to the residual stream twice. Its output projections start smaller by 1/sqrt(2 * n_layer), so
        the variance of the stream does not grow with depth.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @classmethod
    def from_pretrained(cls, name: str) -> GPT:
        """Loads "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2", another GPT-2 of the Hugging Face Hub, a
        folder in its format, or a checkpoint; on the CPU, in evaluation mode. Raises UserError if there is none."""
        from weights import checkpoint, loading

        return checkpoint.build(loading.load_checkpoint(name))

    def n_parameters(self) -> int:
        """Number of parameters; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Floating-point operations per token of one training step (PaLM, Chowdhery et al. 2022, appendix B).

        Looking up an embedding costs none. Frozen parameters need no weight gradient: 4 operations instead of 6.
        """
        embeddings = {p for module in self.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
        embeddings -= set(self.lm_head.parameters())  # the head multiplies with a tied embedding
        operations = sum((6 if p.requires_grad else 4) * p.numel() for p in self.parameters() if p not in embeddings)
        return operations + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size

    def hidden(
        self, tokens: Tensor, positions: Tensor | None = None, caches: Sequence[CachedAttention] | None = None
    ) -> Tensor:
        """Returns the final hidden states (B, T, C) of int64 tokens (B, T).

        Tokens stand at positions 0 to T - 1, or at `positions`, int64 (T,). `caches`, one for each layer, hold the keys
        and values of earlier positions.
        """
        T = tokens.size(1)
        assert self.config.block_size >= T, f"{T} tokens do not fit into a context of {self.config.block_size}"
        x, rotation = self.wte(tokens), None  # (B, T, C)
        if self.wpe is None:
            positions = torch.arange(T, device=x.device) if positions is None else positions
            rotation = rotary_angles(positions, self.config.n_embd // self.config.n_head)
        else:
            x = x + (self.wpe.weight[:T] if positions is None else self.wpe(positions))
        if x.is_cuda and compute_dtype(x) == torch.bfloat16:  # half of the memory traffic of autocast's own float32
            x = x.bfloat16()  # not on the CPU, whose LayerNorm would sum its gradients in bfloat16
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, use_reentrant=False)
            else:
                x = block(x, rotation, caches[i] if caches else None)
        return self.ln_f(x).to(x.dtype)  # on CUDA, autocast computes a LayerNorm in float32

    def forward(self, tokens: Tensor, targets: Tensor | None = None, class_weights: Tensor | None = None) -> Tensor:
        """Returns logits (B, T, V) of int64 tokens (B, T), or with int64 targets (B, T) the summed loss in nats.

        Targets that are `IGNORE_INDEX` do not count. `class_weights`, float32 (n_classes,), weights the loss of a
        classifier by the target's class. The loss is a sum, so that micro-batches and processes can add theirs before
        one division.
        """
        if targets is None:
            return self.lm_head(self.hidden(tokens))
        network, loss_function = self.compiled or (self.hidden, chunk_loss)
        x, y = network(tokens).flatten(0, 1), targets.flatten()  # (B * T, C), (B * T,)
        is_counted = y != IGNORE_INDEX
        if x.device.type == "cpu" and not is_counted.all():
            x, y = x[is_counted], y[is_counted]  # on a GPU, the host would wait to learn the number of rows
        if self.config.n_classes:  # a few logits need no chunks
            return F.cross_entropy(self.lm_head(x).float(), y, class_weights, reduction="sum")
        return linear_cross_entropy(x, self.lm_head.weight, y, loss_function=loss_function)

    def compile_training(self) -> None:
        """Makes `forward` compute the loss with two compiled functions: the network, and the loss of a chunk.

        One graph for both would unroll the chunks. That takes minutes to compile and keeps a gradient of the head for
        every chunk in memory.
        """
        self.compiled = torch.compile(self.hidden), torch.compile(chunk_loss)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype in which matrix products of x are computed: that of autocast if it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def chunk_loss(x: Tensor, head: Tensor, y: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the cross-entropy (n, 1) of each row of the logits `x @ head.T`: x (n, C), head (V, C), int64 y (n, 1).

    With `needs_grad` also the gradient of the logits, which is softmax minus one-hot, in two parts in x's dtype: the
    softmax (n, V), and the values (n, 1) that replace it at y. Otherwise these two mean nothing.
    """
    logits = x @ head.t()  # (n, V)
    losses, grads_at_target, rows = [], [], len(x)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = max(1, 2**19 // len(head))  # few rows at a time, which stay in the caches
    for block, target in zip(logits.split(rows), y.split(rows), strict=True):
        log_probabilities = F.log_softmax(block.float(), dim=-1)  # (rows, V)
        losses.append(-log_probabilities.gather(-1, target))
        if needs_grad:
            probabilities = log_probabilities.exp_()
            grads_at_target.append(probabilities.gather(-1, target) - 1)  # in float32: in bfloat16, 0.999 - 1 is 0
            block.copy_(probabilities)  # `logits` becomes the softmax
    return torch.cat(losses), logits, torch.cat(grads_at_target or losses).to(x.dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_size: int | None = None,
    loss_function: ChunkLoss = chunk_loss,
) -> Tensor:
    """Returns `F.cross_entropy(hidden @ weight.T, targets, reduction="sum")`, a float32 scalar in nats.

    hidden (N, C), weight (V, C), int64 targets (N,), where `IGNORE_INDEX` does not count. All logits at once would be
    the largest tensor of a training step. Here they exist for `chunk_size` positions at a time. Each chunk forms its
    gradient in the same pass, so the product with the head is computed once. `loss_function` is `chunk_loss` or its
    compiled version. The compiled one gets whole chunks only, so that it never recompiles: ignored rows pad the last.
    """
    hidden, chunk_size = hidden.to(compute_dtype(hidden)), chunk_size or default_chunk_size(hidden)
    is_training = torch.is_grad_enabled()  # asked here, since it is off inside an autograd function
    return _LinearCrossEntropy.apply(hidden, weight, targets, chunk_size, loss_function, is_training)


def default_chunk_size(hidden: Tensor) -> int:
    """Positions for which logits exist at a time."""
    if hidden.device.type == "cpu":
        return 512  # logits stay in the caches
    if hidden.is_cuda and compute_dtype(hidden) != torch.float16 and len(hidden) >= 32768:
        return 8192  # every chunk reads and writes the whole gradient of the head
    return 2048  # less padding; and in float16 the gradient of the head would overflow in sums over more positions


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes loss and gradients in `forward`; `backward` only multiplies them by the incoming gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk_size: int,
        loss_function: ChunkLoss,
        is_training: bool,
    ) -> Tensor:
        hidden_needs_grad, weight_needs_grad = (is_training and needed for needed in ctx.needs_input_grad[:2])
        head, hidden = weight.to(hidden.dtype), hidden.detach()  # a chunk that required a gradient would recompile
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if hidden_needs_grad else None
        grad_dtype = torch.promote_types(weight.dtype, torch.float32)  # for the sum over chunks
        grad_weight = torch.zeros_like(weight, dtype=grad_dtype) if weight_needs_grad else None
        for i in range(0, len(hidden), chunk_size):
            x, y = hidden[i : i + chunk_size], targets[i : i + chunk_size, None]
            n = len(x)
            if n < chunk_size and loss_function is not chunk_loss:
                padding = (0, 0, 0, chunk_size - n)
                x, y = F.pad(x, padding), F.pad(y, padding, value=IGNORE_INDEX)
            is_counted = y != IGNORE_INDEX  # (n, 1)
            x, y = x * is_counted, y.clamp(min=0)  # ignored rows become 0 and add nothing to the head's gradient
            losses, grad_logits, grad_at_target = loss_function(x, head, y, hidden_needs_grad or weight_needs_grad)
            loss += (losses * is_counted).sum()
            if hidden_needs_grad or weight_needs_grad:
                grad_logits.scatter_(-1, y, grad_at_target)
                if grad_hidden is not None:
                    grad_hidden[i : i + n] = (grad_logits[:n] @ head) * is_counted[:n]
                if grad_weight is not None and x.is_cuda:  # adds in float32
                    torch.addmm(grad_weight, grad_logits.t(), x, out_dtype=grad_dtype, out=grad_weight)
                elif grad_weight is not None and grad_dtype == x.dtype:
                    grad_weight.addmm_(grad_logits.t(), x)
                elif grad_weight is not None:
                    grad_weight += grad_logits.t() @ x
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        [grad_loss] = grad_outputs
        grad_hidden = None if grad_hidden is None else grad_hidden * grad_loss
        grad_weight = None if grad_weight is None else grad_weight.mul_(grad_loss)
        return grad_hidden, grad_weight, None, None, None, None
