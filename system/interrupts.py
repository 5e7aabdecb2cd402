"""Ctrl-C, stop signals, and output that can no longer be written. Imports little: it is there before the rest."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TextIO

STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
HANGUP = getattr(signal, "SIGHUP", None)  # the terminal is lost; not on Windows
if HANGUP:
    STOP_SIGNALS.append(HANGUP)

before_death: list[Callable[[], None]] = []
"""What Ctrl-C during an import calls before it ends the process: no `finally` runs then."""


def quit_while_importing() -> None:
    """In a script of this project, makes Ctrl-C end the process at once, until `raised` takes over.

    A KeyboardInterrupt during an import prints a traceback, or breaks a library that does not expect it.
    """
    script = getattr(sys.modules["__main__"], "__file__", None)
    is_ours = script and os.path.dirname(os.path.abspath(script)) == os.path.dirname(os.path.dirname(__file__))
    is_main = threading.current_thread() is threading.main_thread()  # Streamlit runs the page in another one
    if is_ours and is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nobody ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Inside the block, Ctrl-C raises KeyboardInterrupt, as usual, but still ends the process during an import."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> None:
    while frame:
        if "importlib" in frame.f_code.co_filename:
            signal.signal(number, signal.SIG_DFL)
            for clean_up in before_death:
                clean_up()
            signal.raise_signal(number)
        frame = frame.f_back
    raise KeyboardInterrupt


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[list[int]]:
    """Yields a list that receives the numbers of stop signals: SIGINT, SIGTERM, and SIGHUP unless `nohup` ignores it.

    A second SIGINT or SIGTERM acts at once, as usual. SIGHUP may come twice, from the terminal and from the shell.
    """
    received: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number != HANGUP:
            signal.signal(number, before[signal.Signals(number)])

    for number in STOP_SIGNALS:
        if number != HANGUP or signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def outlive_output() -> Iterator[list[str]]:
    """Lets the block go on if standard output or error cannot be written: a closed pipe, a lost terminal, a full disk.

    What is printed there from then on is lost, and `catch_stop_signals` receives a SIGHUP. Yields a list that receives
    what happened.
    """
    broken: list[str] = []
    before = sys.stdout, sys.stderr
    sys.stdout = _Lasting(sys.stdout, "standard output", broken)
    sys.stderr = _Lasting(sys.stderr, "standard error", broken)
    try:
        yield broken
    finally:
        sys.stdout, sys.stderr = before


class _Lasting:
    """A stream whose `write` and `flush` do nothing after they have failed once."""

    def __init__(self, stream: TextIO, name: str, broken: list[str]) -> None:
        self._stream, self._name, self._broken, self._is_broken = stream, name, broken, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if not self._is_broken:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._note(error)
        return len(text)

    def flush(self) -> None:
        if not self._is_broken:
            try:
                self._stream.flush()
            except OSError as error:
                self._note(error)

    def _note(self, error: OSError) -> None:
        self._is_broken = True
        self._broken.append(f"{self._name}: {error.strerror or error}")
        if HANGUP and callable(signal.getsignal(HANGUP)):
            signal.raise_signal(HANGUP)
