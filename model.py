"""GPT-2 (Radford et al. 2019): the network, its loss, its KV cache and the choice of the next token.

Names and shapes are those of OpenAI's release, so that its weights load by name. In the margins: B sequences,
T positions, C = n_embd, nh heads of hs = C / nh, V = vocab_size.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the network; the defaults are GPT-2 small with 124M parameters."""

    block_size: int = 1024
    """Longest context in tokens."""
    vocab_size: int = 50304
    """Rows of the embedding: the tokens in use, padded to a multiple of 64."""
    n_tokens: int = 50259
    """Tokens in use: ids from here to `vocab_size` are padding and never sampled."""
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    """Biases in the linear layers and LayerNorms, as in GPT-2."""
    tie_weights: bool = True
    """The head shares the token embedding's matrix, as in GPT-2."""
    n_classes: int = 0
    """Outputs of a head that classifies, in place of the one over the vocabulary; 0 for a language model."""


class CausalSelfAttention(nn.Module):
    """Multi-head attention to this and earlier positions (Vaswani et al. 2017)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, cache: "LayerCache | LayerSlot | None" = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
            for part in self.c_attn(x).split(C, dim=2)
        )
        mask, is_causal = None, True
        if cache is not None:
            k, v, mask = cache.append(k, v)  # (B, nh, past + T, hs)
            is_causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=self.dropout if self.training else 0.0
        )
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Two layers with GPT-2's tanh approximation of the GELU (Hendrycks & Gimpel 2016) between them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """Attention and MLP, each normalised at its input and added to the residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: "LayerCache | LayerSlot | None" = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The language model: `model(tokens)` gives logits, `model(tokens, targets)` the loss, `model.generate` text."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self._compiled_training, self._compiled, self._caches = None, None, {}
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.n_classes or config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # two additions a layer to the residual stream keep its variance
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @classmethod
    def from_pretrained(cls, name: str) -> "GPT":
        """Returns a model on the CPU, in evaluation mode: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2",
        another GPT-2 of the Hugging Face Hub, a folder in its format, or a checkpoint. Raises UserError for none."""
        from weights import checkpoint, loading

        return checkpoint.build(loading.load_checkpoint(name), name)

    def n_parameters(self, positions: bool = True) -> int:
        """Number of parameters, the tied matrix counted once; `positions=False` leaves the position embedding out."""
        return sum(p.numel() for p in self.parameters()) - (0 if positions else self.wpe.weight.numel())

    def flops_per_token(self) -> int:
        """Floating-point operations of one training step per token (appendix B of Chowdhery et al. 2022, PaLM).

        Frozen parameters are counted without the product that would form their gradient.
        """
        c, frozen = self.config, sum(p.numel() for p in self.parameters() if not p.requires_grad)
        return 6 * self.n_parameters(positions=False) - 2 * frozen + 12 * c.n_layer * c.n_embd * c.block_size

    def hidden(self, tokens: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """Final hidden states (B, T, C) of int64 tokens (B, T), which continue what `cache` holds, if given."""
        T, past = tokens.size(1), cache.length if cache else 0
        assert past + T <= self.config.block_size, "longer than the context"
        x = self.wte(tokens) + self.wpe.weight[past : past + T]  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, cache.layers[i] if cache else None)
        return self.ln_f(x)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, counted: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of int64 tokens (B, T); with targets (B, T), the sum of the cross-entropies in nats.

        `counted` (int64, flat indices into B·T) names the positions whose loss counts, all where it is None. It is a
        sum, so that micro-batches and processes add up before they are divided by all that was counted.
        """
        if targets is None:
            return self.lm_head(self.hidden(tokens))
        hidden, compute = self._compiled_training if self.training and self._compiled_training else (self.hidden, None)
        x, targets = hidden(tokens).flatten(0, 1), targets.flatten()  # (B·T, C), (B·T,)
        if counted is not None:  # numbers that change from batch to batch, for which nothing should be compiled
            x, targets, compute = x[counted], targets[counted], None
        return linear_cross_entropy(x, self.lm_head.weight, targets, compute=compute)

    def compile_training(self) -> None:
        """Has `forward` compute the loss, in training mode, by two compiled functions: the network and a chunk's loss.

        What is between them stays as it is: unrolled into one graph, the chunks are compiled for minutes, and the
        compiler keeps a gradient of the head for each of them at once.
        """
        self._compiled_training = torch.compile(self.hidden), torch.compile(chunk_loss)

    def decode(self, tokens: Tensor, position: Tensor, cache: "KVCache") -> Tensor:
        """Logits (B, n_tokens) after one more token a row, int64 (B, 1), at `position`, int64 (1,).

        Every shape and address is the same at each position, so that this is compiled once and, on CUDA, replayed as
        a graph. The cache's length is the caller's to count.
        """
        x = self.wte(tokens) + self.wpe(position)
        mask = torch.arange(cache.layers[0].keys.size(2), device=position.device) <= position[:, None]  # (1, positions)
        for block, layer in zip(self.h, cache.layers, strict=True):
            x = block(x, LayerSlot(layer, position, mask))
        return self.lm_head(self.ln_f(x)[:, -1])[:, : self.config.n_tokens]

    def compile_decoding(self) -> None:
        """Has `generate` decode by a compiled function over a cache that is kept; on CUDA as a graph that is replayed.

        The first tokens wait for the compiler, and so do those of another number of samples.
        """
        mode = "reduce-overhead" if self.wpe.weight.is_cuda else "default"
        self._compiled = torch.compile(self.decode, mode=mode, fullgraph=True, dynamic=False)

    def _static_cache(self, batch_size: int) -> "KVCache":
        if batch_size not in self._caches:
            self._caches[batch_size] = cache = KVCache(self.config, batch_size, self.wte.weight)
            for layer in cache.layers:
                layer.keys.zero_()  # what is masked must still be finite
                layer.values.zero_()
                torch._dynamo.mark_static_address(layer.keys)
                torch._dynamo.mark_static_address(layer.values)
        return self._caches[batch_size]

    @torch.inference_mode()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        num_samples: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Continues int64 tokens (B, T ≥ 1), each row `num_samples` times, N = B · num_samples rows in all.

        Yields at each step the ids (N,) and the logits (N, n_tokens) that the model gave, before anything was done to
        them. `temperature` 0 is greedy. `repetition_penalty` (Keskar et al. 2019, CTRL) divides the positive logits of
        tokens that occurred, and multiplies the negative. Past the context, the window slides: the newer half of it is
        read again and goes on. `use_cache=False` recomputes every position for every token, as a reference.
        """
        block_size = self.config.block_size
        window = new = tokens[:, -block_size:]
        cache = KVCache(self.config, len(tokens), self.wte.weight, min(block_size, window.size(1) + max_new_tokens))
        occurred = None
        if repetition_penalty != 1:
            occurred = tokens.new_zeros(len(tokens), self.config.n_tokens, dtype=torch.bool).scatter_(1, tokens, True)
            occurred = occurred.repeat_interleave(num_samples, dim=0)
        for step in range(max_new_tokens):
            if window.size(1) > block_size:
                window = new = window[:, -(block_size // 2 or 1) :]
                cache.clear()
            if self._compiled and use_cache and cache.length and new.size(1) == 1:
                torch.compiler.cudagraph_mark_step_begin()  # the graph's output is overwritten by its next replay
                position = torch.full((1,), cache.length, device=new.device)
                with sdpa_kernel(SDPBackend.MATH):  # the fused kernels are for many queries
                    logits = self._compiled(new, position, cache).clone()
                cache.advance()
            else:
                x = self.hidden(new, cache) if use_cache else self.hidden(window)
                logits = self.lm_head(x[:, -1, :])[:, : self.config.n_tokens]  # (N, n_tokens)
            if step == 0 and num_samples > 1:  # the prompt was read once for all its samples
                logits, window = (t.repeat_interleave(num_samples, dim=0) for t in (logits, window))
                cache.repeat(num_samples)
            if step == 0 and self._compiled:
                cache = self._static_cache(len(logits)).take(cache)
            chosen_from = logits
            if occurred is not None:
                penalized = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
                chosen_from = torch.where(occurred, penalized, logits)
            new = sample(chosen_from, temperature, top_k, top_p, min_p, generator)[:, None]  # (N, 1)
            if occurred is not None:
                occurred.scatter_(1, new, True)
            window = torch.cat((window, new), dim=1)
            yield new[:, 0], logits


class LayerCache:
    """Keys and values of one layer's past positions, in buffers allocated once."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values, self.length = keys, values, 0  # each (B, nh, positions, hs)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Stores k and v (B, nh, T, hs) behind the past; returns views of all that is stored, and which of it each of
        the new positions may see: bool (T, past + T), None where the causal rule says it."""
        past, T = self.length, k.size(2)
        end = past + T
        self.keys[:, :, past:end] = k
        self.values[:, :, past:end] = v
        self.length = end
        mask = torch.ones(T, end, dtype=torch.bool, device=k.device).tril(past) if past and T > 1 else None
        return self.keys[:, :, :end], self.values[:, :, :end], mask


@dataclass(frozen=True)
class LayerSlot:
    """One position of a layer's cache, about to be written: a tensor, so that no shape depends on it."""

    layer: LayerCache
    position: Tensor
    mask: Tensor

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stores k and v (B, nh, 1, hs); returns the whole buffers, and the mask of the positions that count."""
        self.layer.keys.index_copy_(2, self.position, k)
        self.layer.values.index_copy_(2, self.position, v)
        return self.layer.keys, self.layer.values, self.mask


class KVCache:
    """The keys and values of every layer, for B sequences of up to so many positions."""

    def __init__(self, config: GPTConfig, batch_size: int, like: Tensor, positions: int | None = None):
        """`like` gives the dtype and the device; without `positions`, there is room for the whole context."""
        shape = (batch_size, config.n_head, positions or config.block_size, config.n_embd // config.n_head)
        self.layers = [LayerCache(like.new_empty(shape), like.new_empty(shape)) for _ in range(config.n_layer)]

    @property
    def length(self) -> int:
        """Number of positions held."""
        return self.layers[0].length

    def clear(self) -> None:
        """Forgets all positions."""
        for layer in self.layers:
            layer.length = 0

    def advance(self) -> None:
        """Counts one more position."""
        for layer in self.layers:
            layer.length += 1

    def take(self, other: "KVCache") -> "KVCache":
        """Copies what another cache holds; returns this one."""
        self.clear()
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.append(theirs.keys[:, :, : theirs.length], theirs.values[:, :, : theirs.length])
        return self

    def repeat(self, n: int) -> None:
        """Repeats every sequence `n` times."""
        for layer in self.layers:
            layer.keys = layer.keys.repeat_interleave(n, dim=0)
            layer.values = layer.values.repeat_interleave(n, dim=0)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws one token id (B,) from logits (B, n) over the tokens in use; temperature 0 takes the likeliest.

    In this order: temperature; the `top_k` likeliest tokens (Fan et al. 2018); of these the smallest set that holds
    the probability `top_p` (nucleus sampling, Holtzman et al. 2019); of these the tokens with at least `min_p` times
    the probability of the likeliest (Nguyen et al. 2024).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, ids = logits.float() / temperature, None
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k, dim=-1)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        if ids is None:
            probabilities, ids = _likeliest(probabilities, top_p)
        mass_before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(mass_before >= top_p, 0.0)  # the first token always stays
    if min_p is not None and min_p > 0:
        likeliest = probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < min_p * likeliest, 0.0)
    # the same draw as torch.multinomial's, which would have the host wait for a GPU
    waiting = torch.empty_like(probabilities).exponential_(generator=generator)
    choice = (probabilities / waiting).argmax(dim=-1, keepdim=True)  # (B, 1)
    return (choice if ids is None else ids.gather(-1, choice))[:, 0]


def _likeliest(probabilities: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """Returns the largest of probabilities (B, n), in falling order, and their ids: enough of them to hold `mass`."""
    if probabilities.device.type == "cpu" and probabilities.size(-1) > 1024:  # sorting the vocabulary takes long here
        some, ids = probabilities.topk(1024, dim=-1)
        if some.sum(dim=-1).min() > mass:
            return some, ids
    return probabilities.sort(dim=-1, descending=True)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None, compute: Callable | None = None
) -> Tensor:
    """Sum over positions of the cross-entropy of `hidden @ weight.T`, without ever holding all logits.

    hidden (N, C), weight (V, C), targets int64 (N,); returns a float32 scalar in nats. Logits exist for `chunk`
    positions at a time, and the gradient is formed in the same pass, so the head's product is computed once. Unless it
    is given, 512 on the CPU, where they stay in its caches; 8,192 on CUDA, since each chunk adds to the whole gradient
    of `weight`; 2,048 elsewhere, and in float16, whose sums would overflow. `compute` is `chunk_loss`, compiled.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    is_large = hidden.is_cuda and hidden.dtype != torch.float16
    chunk = chunk or (512 if hidden.device.type == "cpu" else 8192 if is_large else 2048)
    learning = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(
        hidden,
        weight,
        targets,
        min(chunk, len(hidden)),
        compute or chunk_loss,
        learning and hidden.requires_grad,
        learning and weight.requires_grad,
    )


def chunk_loss(x: Tensor, head: Tensor, y: Tensor, learning: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sum of the cross-entropies of `x @ head.T` and y: x (n, C), head (V, C), int64 y (n, 1).

    With it, if `learning`, its gradient for the logits, softmax minus one-hot, in x's dtype: the softmax (n, V), and
    what is to be put in at y (n, 1).
    """
    logits = (x @ head.t()).float()
    top, of_targets = logits.amax(dim=-1, keepdim=True), logits.gather(-1, y)
    normalizer = logits.sub_(top).exp_().sum(dim=-1, keepdim=True)
    loss = (normalizer.log() + top - of_targets).sum()
    if not learning:
        return loss, None, None
    at_targets = (of_targets - top).exp() / normalizer - 1  # while it is exact: in bfloat16, 0.999 - 1 would be 0
    return loss, logits.div_(normalizer).to(x.dtype), at_targets.to(x.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, compute, hidden_learns, weight_learns):
        head = weight.to(hidden.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if hidden_learns else None
        grad_weight = torch.zeros_like(weight) if weight_learns else None
        for i in range(0, len(hidden), chunk or 1):
            x, y = hidden[i : i + chunk], targets[i : i + chunk, None]
            of_chunk = compute if len(x) == chunk else chunk_loss  # a shorter last one is not compiled for
            part, grad_logits, at_targets = of_chunk(x, head, y, hidden_learns or weight_learns)
            loss += part
            if grad_logits is not None:
                grad_logits.scatter_(-1, y, at_targets)
            if hidden_learns:
                grad_hidden[i : i + chunk] = grad_logits @ head
            if weight_learns and weight.dtype == hidden.dtype:
                grad_weight.addmm_(grad_logits.t(), x)
            elif weight_learns:
                grad_weight += grad_logits.t() @ x
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden = None if grad_hidden is None else grad_hidden * grad_loss
        grad_weight = None if grad_weight is None else grad_weight.mul_(grad_loss)
        return grad_hidden, grad_weight, None, None, None, None, None
