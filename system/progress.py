"""The progress of long jobs, on standard error: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar

from system.wording import duration

SECONDS_BETWEEN_BARS, SECONDS_BETWEEN_LINES = 0.5, 30.0
MAX_BAR = 30  # columns

Item = TypeVar("Item")


class Progress:
    """Shows how much of a job is done, and the time left.

    A terminal gets a bar, drawn at most twice a second. Anything else gets a plain line every 30 seconds, without
    control characters, so that a job of less than 30 seconds writes nothing.
    """

    def __init__(self, total: float | None, done: float = 0) -> None:
        """`total` is the size of the job in any unit, None if it is unknown; `done` was done before the job began."""
        self.total, self.done_before = total, done
        self.is_terminal = sys.stderr.isatty()
        self.started = self.last_shown = time.monotonic()
        self.bar = ""
        """what stands in the terminal's last line"""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.clear()

    @property
    def seconds(self) -> float:
        """Time since the job began."""
        return time.monotonic() - self.started

    def is_due(self) -> bool:
        """Whether `show` will show something now."""
        interval = SECONDS_BETWEEN_BARS if self.is_terminal else SECONDS_BETWEEN_LINES
        return time.monotonic() >= self.last_shown + interval

    def show(self, done: float, text: str) -> None:
        """Shows a text with the time left, if the last one is old enough. `done` is in the unit of `total`."""
        if not self.is_due():
            return
        self.last_shown = time.monotonic()
        percent = ""
        if self.total:
            share = min(1.0, done / self.total)
            percent = f"{share:.0%}"
            if done > self.done_before:
                left = max(0.0, self.total - done) * self.seconds / (done - self.done_before)
                text += f", {duration(left)} left"
        if not self.is_terminal:
            print(f"{percent}: {text}" if percent else text, file=sys.stderr, flush=True)
            return
        columns = shutil.get_terminal_size().columns - 1  # in the last column, some terminals begin a new line
        width = min(MAX_BAR, columns - len("100% || ") - len(text))
        if percent and width >= 5:
            text = f"|{'#' * round(share * width):{width}}| {text}"
        self.clear()
        self.bar = f"{percent:>4} {text}"[:columns]
        sys.stderr.write(self.bar)
        sys.stderr.flush()

    def clear(self) -> None:
        """Removes the bar from the terminal, so that a line can be printed. The next `show` draws it again."""
        if self.bar:
            sys.stderr.write(f"\r{' ' * len(self.bar)}\r")
            sys.stderr.flush()
            self.bar = ""


def with_progress(items: Iterable[Item], total: int | None, unit: str) -> Iterator[Item]:
    """Yields the items, and shows how many are done: "350 of 500 questions"."""
    of_all = "" if total is None else f" of {total:,}"
    with Progress(total) as progress:
        for n, item in enumerate(items, 1):
            yield item
            progress.show(n, f"{n:,}{of_all} {unit}")
