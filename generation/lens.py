"""A look inside a model: attention weights, the residual stream, what each layer would say, and the embeddings."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from generation.text_model import TextModel
from model import GPT
from system.errors import UserError


@dataclass(frozen=True)
class Trace:
    """What a model computed for a text of T tokens, in float32. nh heads, C = n_embd."""

    tokens: Tensor
    """int64 (T,)"""
    attention: Tensor
    """(n_layer, nh, T, T): the weight that each position (row) gives to each position (column); rows sum to 1, and
    weights right of the diagonal are 0"""
    residual: Tensor
    """(n_layer + 1, T, C): the residual stream as it enters the first layer, and after each layer"""


@dataclass(frozen=True)
class LayerPredictions:
    """What a model would say after each layer. Row 0 is the embedding, the last row the model's own output.

    Log-probabilities and entropies are in nats.
    """

    candidates: Tensor
    """int64 (n_layer + 1, T, k): the likeliest next tokens"""
    logprobs: Tensor
    """(n_layer + 1, T, k): their log-probabilities"""
    next_logprobs: Tensor
    """(n_layer + 1, T - 1): log-probabilities of the tokens that came next"""
    entropies: Tensor
    """(n_layer + 1, T): entropies of the distributions"""


@torch.no_grad()
def trace(model: GPT, tokens: Tensor) -> Trace:
    """Runs a model over int64 tokens (T,), at most as many as its context, and returns what it computed on the way.

    Attention is computed in plain steps: softmax(q kᵀ / sqrt(hs)) v, over this position and earlier ones.
    """
    attention: list[Tensor] = []
    residual: list[Tensor] = []
    is_later = torch.ones(len(tokens), len(tokens), dtype=torch.bool, device=tokens.device).triu(1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.size(-1))  # (1, nh, T, T)
        weights = scores.masked_fill(is_later, -math.inf).softmax(dim=-1)
        attention.append(weights[0])
        return (weights @ v.float()).to(v.dtype)

    def keep_input(module: Any, arguments: tuple[Any, ...]) -> None:
        residual.append(arguments[0][0].float())  # (T, C)

    hooks = [module.register_forward_pre_hook(keep_input) for module in (*model.h, model.ln_f)]
    try:
        model.hidden(tokens[None], caches=[attend] * len(model.h))
    finally:
        for hook in hooks:
            hook.remove()
    return Trace(tokens, torch.stack(attention), torch.stack(residual))


@torch.no_grad()
def predictions_by_layer(text_model: TextModel, trace: Trace, k: int = 10) -> LayerPredictions:
    """Returns the `k` likeliest next tokens after each layer, as the model's last LayerNorm and head read the residual
    stream there: the logit lens (nostalgebraist 2020, "interpreting GPT: the logit lens")."""
    layers, model = [], text_model.model
    for stream in trace.residual:
        with text_model.autocast():
            logits = model.lm_head(model.ln_f(stream.to(model.ln_f.weight.dtype)))  # (T, V)
        logprobs = logits[:, : model.config.n_tokens].float().log_softmax(dim=-1)  # (T, n_tokens)
        top = logprobs.topk(min(k, logprobs.size(-1)), dim=-1)
        next_logprobs = logprobs[:-1].gather(-1, trace.tokens[1:, None])[:, 0]
        entropies = torch.special.entr(logprobs.exp()).sum(dim=-1)
        layers.append((top.indices, top.values, next_logprobs, entropies))
    return LayerPredictions(*(torch.stack(parts) for parts in zip(*layers, strict=True)))


def trace_text(text_model: TextModel, text: str, max_tokens: int | None = None) -> Trace:
    """Returns `trace` of a text's last tokens: those that fit into the context, or at most `max_tokens`.

    Raises UserError for an empty text.
    """
    block_size = text_model.model.config.block_size
    ids = text_model.tokenizer.encode(text)[-min(max_tokens or block_size, block_size) :]
    if not ids:
        raise UserError("the text is empty: there is nothing to look into")
    with text_model.autocast():
        return trace(text_model.model, torch.tensor(ids, device=text_model.device))


@torch.no_grad()
def nearest_tokens(model: GPT, token: int, n: int = 10) -> list[tuple[int, float]]:
    """Returns the `n` tokens whose embeddings are most like that of a token, and their cosine similarities."""
    embeddings = model.wte.weight[: model.config.n_tokens].float()  # (n_tokens, C)
    similarities = F.cosine_similarity(embeddings, embeddings[token][None], dim=-1)
    similarities[token] = -math.inf
    top = similarities.topk(min(n, len(similarities) - 1))
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


@torch.no_grad()
def embedding_map(model: GPT, tokens: list[int]) -> Tensor:
    """Returns two coordinates for each of at least two tokens, float32 (n, 2): the first two principal components of
    their embeddings."""
    from sklearn.decomposition import PCA

    embeddings = model.wte.weight[tokens].float().cpu()  # (n, C)
    return torch.from_numpy(PCA(n_components=2, svd_solver="full").fit_transform(embeddings.numpy()))


@torch.no_grad()
def position_similarities(model: GPT) -> Tensor | None:
    """Returns the cosine similarities of the learned positions, float32 (block_size, block_size), or None for a model
    with rotary positions, which learns none."""
    if model.wpe is None:
        return None
    positions = F.normalize(model.wpe.weight.float(), dim=-1)  # (block_size, C)
    return positions @ positions.t()
