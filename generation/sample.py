"""A text as it is generated: its tokens, and the characters that they complete."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Token:
    """A token of a text. Its probabilities are those of the model, before temperature, top-k and the like."""

    id: int
    logprob: float | None = None
    """natural logarithm of the token's probability"""
    candidates: tuple[tuple[int, float], ...] = ()
    """the likeliest ids at this position and their log-probabilities"""
    entropy: float | None = None
    """of the distribution at this position, in nats"""
    n_context: int = 0
    """tokens before this one that the model saw"""


class Sample:
    """One generated text. It grows with every token, by whole UTF-8 characters, and ends before a stop text."""

    def __init__(self, tokenizer: Tokenizer, n_prompt: int = 0, stops: Iterable[str] = (), strip: bool = False) -> None:
        """`n_prompt` is the number of tokens before the sample. With `strip`, it begins without white space."""
        self.tokenizer, self.n_prompt, self.strip = tokenizer, n_prompt, strip
        self.stops = [stop for stop in stops if stop]
        self.tokens: list[Token] = []
        self.text = self.piece = ""
        """the text so far, and what was added to it last"""
        self.finish_reason: Literal["length", "end", "stop"] = "length"
        """why the text ended: by its length, by the model's own end, or by a stop text"""
        self.is_finished = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pending = ""  # characters that may be the beginning of a stop text

    def add(self, token: Token) -> None:
        """Adds the next token. Any control token ends the text, and a finished text stays as it is."""
        self.piece = ""
        if self.is_finished:
            return
        if token.id >= self.tokenizer.end_of_text:
            self.finish_reason, self.is_finished = "end", True
            return
        self.tokens.append(token)
        text = self._pending + self._decoder.decode(self.tokenizer.decode_bytes([token.id]))
        starts = [text.index(stop) for stop in self.stops if stop in text]
        if starts:
            text, self._pending = text[: min(starts)], ""
            self.finish_reason, self.is_finished = "stop", True
        else:
            prefixes = (stop[:n] for stop in self.stops for n in range(1, len(stop)))
            certain = len(text) - max((len(prefix) for prefix in prefixes if text.endswith(prefix)), default=0)
            text, self._pending = text[:certain], text[certain:]
        self._append(text)

    def finish(self) -> None:
        """Adds what was held back: the beginning of a stop text that did not come, or of a character."""
        rest = "" if self.finish_reason == "stop" else self._pending + self._decoder.decode(b"", final=True)
        self._append(rest)
        self._pending, self.is_finished = "", True

    def _append(self, text: str) -> None:
        self.piece = text.lstrip() if self.strip and not self.text else text
        self.text += self.piece
