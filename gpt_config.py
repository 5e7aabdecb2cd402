"""The shape of a network. Imports no torch, so that `train.py --help`, whose flags these are, answers at once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What the user may choose. The defaults are GPT-2 small with 124M parameters. Raises ValueError out of range."""

    block_size: int = 1024
    """longest context in tokens"""
    n_layer: int = 12
    """layers"""
    n_head: int = 12
    """attention heads per layer"""
    n_embd: int = 768
    """width of the residual stream"""
    dropout: float = 0.0
    """probability that training drops an activation"""
    bias: bool = True
    """biases in the linear layers and LayerNorms, as in GPT-2"""
    tie_weights: bool = True
    """the head shares the matrix of the token embedding, as in GPT-2"""
    rotary: bool = False
    """rotary positions (Su et al. 2021) instead of GPT-2's learned ones"""
    qk_norm: bool = False
    """LayerNorm of queries and keys, without parameters (Henry et al. 2020; Dehghani et al. 2023)"""
    squared_relu: bool = False
    """relu(x)² instead of the GELU (So et al. 2021)"""

    def __post_init__(self) -> None:
        for name in ("block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.n_layer > 1_000:
            raise ValueError("n_layer must be at most 1,000")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")
        if self.rotary and self.n_embd // self.n_head % 2:
            raise ValueError(f"rotary positions need heads of an even width, not {self.n_embd // self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError("dropout must be at least 0 and below 1")


@dataclass(frozen=True)
class GPTConfig(Shape):
    """The shape of a network with its vocabulary, which follows from the tokenizer."""

    vocab_size: int = 50304
    """rows of the embedding: the tokens in use, padded to a multiple of 64"""
    n_tokens: int = 50259
    """tokens in use; ids from here to `vocab_size` are padding and are never sampled"""
    n_classes: int = 0
    """outputs of a classification head; 0 for a language model, whose head covers the vocabulary"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.n_tokens <= self.vocab_size:
            raise ValueError(f"n_tokens {self.n_tokens} must lie between 1 and vocab_size {self.vocab_size}")
        if self.n_classes < 0 or (self.n_classes and self.tie_weights):
            raise ValueError("a head for classes cannot be tied to the embedding")
