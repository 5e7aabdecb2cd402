"""How tokens are chosen. Imports no torch, so that `generate.py --help` is instant."""

from dataclasses import dataclass

from system.errors import require, require_at_least


@dataclass(frozen=True)
class SamplingConfig:
    """The sampling options of `generate.py`, the chat and the page. Raises UserError for values out of range."""

    max_new_tokens: int = 200
    """maximum length of an answer or a completion, in tokens"""
    temperature: float = 0.8
    """below 1 the text becomes more predictable, above 1 more varied; 0 is greedy"""
    top_k: int | None = 50
    """sample from this many of the likeliest tokens"""
    top_p: float | None = None
    """sample from the smallest set of tokens that together have this probability"""
    min_p: float | None = None
    """sample from the tokens with at least this fraction of the likeliest token's probability"""
    repetition_penalty: float = 1.0
    """above 1, tokens that already occurred become less likely"""
    greedy: bool = False
    """always choose the likeliest token, the same as --temperature 0"""
    stop: tuple[str, ...] = ()
    """end the text before any of these strings"""
    seed: int | None = None
    """seed of the random choices; the same seed gives the same text on the same device"""

    def __post_init__(self) -> None:
        require_at_least(1, self, "max_new_tokens", "top_k")
        require(self.temperature == 0 or self.temperature >= 1e-3, "--temperature must be 0, or at least 0.001")
        require(self.top_p is None or 0 < self.top_p <= 1, "--top-p must be above 0 and at most 1")
        require(self.min_p is None or 0 <= self.min_p <= 1, "--min-p must lie between 0 and 1")
        require(0.01 <= self.repetition_penalty <= 100, "--repetition-penalty must lie between 0.01 and 100")
        require(self.seed is None or 0 <= self.seed < 2**63, "--seed must be at least 0 and below 2^63")

    @property
    def is_greedy(self) -> bool:
        """Whether every token is the likeliest one."""
        return self.greedy or self.temperature == 0
