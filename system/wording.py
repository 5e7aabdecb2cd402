"""How times and texts look in what is printed."""

import re
from collections.abc import Mapping
from typing import Any

_USER = re.compile(r"\b([a-z][a-z0-9.+-]+:/{1,2})[^\s/?#]*@", re.IGNORECASE)
_QUERY = re.compile(r"\b(https?:/{1,2}[^\s?#]*)([?#])(?:…(?=[\s:;,.)'\"]|$)|\S*)", re.IGNORECASE)


def duration(seconds: float) -> str:
    """Returns a time in its two largest units: "4.2 s", "45 s", "2 min 5 s", "3 h 12 min", "2 d 4 h"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 60 * 60:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24:,} d {hours % 24} h"


def loss_name(checkpoint: Mapping[str, Any]) -> str:
    """Returns what the validation loss of a checkpoint is: of few conversations none is held out."""
    return "validation loss" if checkpoint.get("is_held_out", True) else "loss on its training conversations"


def shorten(text: str, max_length: int) -> str:
    """Returns a text on one line, cut to `max_length` characters."""
    text = " ".join(text.split())
    return text if len(text) <= max_length else text[: max_length - 1] + "…"


def without_secrets(text: str) -> str:
    """Returns a text in which URLs have no user names and passwords, and on the web "?…" in place of a query.

    Whatever may name a URL and is printed, logged or stored passes through here: a query may hold a token.
    """
    return _QUERY.sub(r"\1\2…", _USER.sub(r"\1", text))
