"""How tokens are chosen."""

from dataclasses import dataclass

from tyro.conf import UseAppendAction

from system.errors import require, require_at_least


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen; `sampling.py` is the one reader."""

    max_new_tokens: int = 200
    """longest answer or completion, in tokens"""
    temperature: float = 0.8
    """below 1 likely tokens become likelier, above 1 the text becomes wilder; 0 is greedy"""
    top_k: int | None = 50
    """draw from this many likeliest tokens only"""
    top_p: float | None = None
    """draw from the fewest tokens that together have this probability"""
    min_p: float | None = None
    """draw from the tokens with at least this share of the likeliest one's probability"""
    repetition_penalty: float = 1.0
    """above 1 makes tokens that occurred less likely"""
    greedy: bool = False
    """always the likeliest token, the same as --temperature 0"""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """end a text where this one comes, without it; may be given several times"""
    seed: int | None = None
    """makes the draws repeatable on one device"""

    def __post_init__(self):
        require_at_least(1, self, "max_new_tokens", "top_k")
        require(self.temperature == 0 or self.temperature >= 1e-3, "--temperature must be 0, or at least 0.001")
        require(self.top_p is None or 0 < self.top_p <= 1, "--top-p must be above 0 and at most 1")
        require(self.min_p is None or 0 <= self.min_p <= 1, "--min-p must lie between 0 and 1")
        require(0.01 <= self.repetition_penalty <= 100, "--repetition-penalty must lie between 0.01 and 100")
        require(self.seed is None or 0 <= self.seed < 2**63, "--seed must be at least 0 and below 2^63")
