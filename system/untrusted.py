"""Checks of values from files that somebody else may have written: a valid file has exact types and bounded sizes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MAX_INTEGER = 2**63 - 1
MAX_JSON_BYTES = 2**24
"""Longest JSON that is parsed. The `tokenizer.json` of 65,533 tokens has about 6 MB."""
MAX_JSON_BRACKETS = 2**18
"""Most lists and dicts that are parsed: they take seconds and 20 times the memory of their text."""


def is_integer(value: object, low: int = 0, high: int = MAX_INTEGER) -> bool:
    """Whether a value is an integer from `low` to `high`. A bool is none."""
    return type(value) is int and low <= value <= high


def is_number(value: object) -> bool:
    """Whether a value is a float, perhaps infinite or NaN, or an integer of at most 64 bits."""
    return type(value) is float or is_integer(value, -MAX_INTEGER)


def is_text(value: object) -> bool:
    """Whether a value is a string that UTF-8 can encode: without half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_utf8(text: object) -> str:
    """Returns a value as text, with "?" for bytes of a file name that are not UTF-8."""
    return str(text).encode("utf-8", errors="replace").decode()


def is_file_name(value: object) -> bool:
    """Whether a value is the plain name of a file: no path, so the file lies in the folder that is meant."""
    is_name = isinstance(value, str) and is_text(value) and 0 < len(value.encode()) <= 255
    return is_name and value not in (".", "..") and not any(character in str(value) for character in "/\\\0")


def brief(value: object) -> str:
    """Returns a value for an error message: short, on one line, whatever the value."""
    if value is None or isinstance(value, bool | float):
        return repr(value)
    if is_integer(value, -MAX_INTEGER):
        return f"{value:,}"
    if isinstance(value, str):
        return ascii(value) if len(value) <= 40 else f"{ascii(value[:40])}…"
    return f"a huge {type(value).__name__}" if isinstance(value, int) else f"a {type(value).__name__}"


def printable(text: str) -> str:
    """Returns a text for a terminal: line breaks and tabs stay; other control characters become escapes like `\\x1b`.

    So do characters that change the direction of the text, and lone surrogates, which stand for the bytes of a file
    name that is not UTF-8. A raw control character could clear the screen, or fake a line that the program never wrote.
    """
    return _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


def on_one_line(text: object) -> str:
    """Returns a value as a part of one line on a terminal: `printable`, with each line break or tab as a space."""
    return " ".join(printable(as_utf8(text)).splitlines()).replace("\t", " ")


_UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def parse_json(text: str) -> Any:
    """Parses JSON. Raises ValueError if the text is none, is too long, or is nested too deeply."""
    if len(text) > MAX_JSON_BYTES or text.count("[") + text.count("{") > MAX_JSON_BRACKETS:
        raise ValueError(f"more than {MAX_JSON_BYTES:,} characters or {MAX_JSON_BRACKETS:,} brackets of JSON")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def read_json(path: str | Path) -> Any:
    """Reads a JSON file. Raises OSError if the file cannot be read, and ValueError as `parse_json` does."""
    with open(path, "rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"more than {MAX_JSON_BYTES:,} bytes of JSON")
    return parse_json(content.decode("utf-8"))
