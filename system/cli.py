"""Command lines from dataclasses, one-line errors, stop signals, and how figures look in print. Imports no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from system.errors import UserError, is_out_of_memory, require

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from tqdm import tqdm

Config = TypeVar("Config", bound="DataclassInstance")
Item = TypeVar("Item")

TRAINING, GENERATION = 200, 400
"""Microseconds that a waiting thread spins. Generation has longer pauses between parallel loops."""
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def run(
    main: Callable[[Config], None],
    config_class: type[Config],
    presets: Mapping[str, Config] | None = None,
    spin: int = TRAINING,
) -> None:
    """Runs a script: parses `sys.argv` into its config, prints what the user chose, calls `main(config)`, and exits.

    An error that the user can correct ends in one line on standard error and exit status 1 (2 for bad usage); Ctrl-C
    ends in status 130. `spin` is for `limit_spinning`.
    """
    limit_spinning(spin)
    for stream in (sys.stdout, sys.stderr):  # a substitute for characters that the terminal lacks; a log gets each line
        stream.reconfigure(errors="replace", line_buffering=True)  # type: ignore[union-attr]
    config = None
    try:
        config = parse(config_class, sys.argv[1:], presets)
        print(f"{os.path.basename(sys.argv[0])}: {describe(config, presets)}", file=sys.stderr)
        main(config)
        sys.stdout.flush()
    except UserError as error:
        _exit(str(error), error.status)
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
        sys.exit(1)
    except OSError as error:
        if error.filename is None and error.errno not in _DISK_ERRORS:
            raise
        _exit(f"{error.filename or 'standard output'}: {error.strerror or error}", 1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _exit(f"out of memory: try a {getattr(config, 'memory_savers', '')}smaller model", 1)


def parse(config_class: type[Config], arguments: list[str], presets: Mapping[str, Config] | None = None) -> Config:
    """Parses flags into a config dataclass with tyro. `--preset NAME` chooses the defaults; other flags override them.

    Exits with status 0 after `--help`, and with status 2 after tyro's message about bad usage.
    """
    try:
        import tyro  # only here, so that training works where it is not installed
    except ImportError:
        raise UserError("the packages are missing: run `make venv`, then `source .venv/bin/activate`") from None
    options: dict[str, Any] = {"default": presets[_preset_name(arguments, presets)]} if presets else {}
    doc = sys.modules[config_class.__module__].__doc__
    return tyro.cli(config_class, args=arguments, description=doc, config=(tyro.conf.OmitArgPrefixes,), **options)


def _preset_name(arguments: list[str], presets: Mapping[str, Any]) -> str:
    name = next(iter(presets))
    for argument, following in itertools.pairwise([*arguments, ""]):
        if argument == "--preset":
            name = following
        elif argument.startswith("--preset="):
            name = argument.partition("=")[2]
    require(name in presets, f"no preset {name!r}: choose from {', '.join(presets)}")
    return name


def _exit(message: str, status: int) -> NoReturn:
    print(printable(f"error: {without_secrets(' '.join(message.split()))}"), file=sys.stderr, flush=True)
    sys.exit(status)


def describe(config: Config, presets: Mapping[str, Config] | None = None) -> str:
    """Returns what the user chose: the preset, if there are presets, and the options that differ from its defaults."""
    preset = presets[config.preset] if presets else None  # type: ignore[attr-defined]
    values = plain(config)
    texts = {
        name: " ".join(map(str, value)) if isinstance(value, list) else str(value) for name, value in values.items()
    }
    changed = [
        f"{field.name}={shlex.quote(texts[field.name])}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != (getattr(preset, field.name) if preset else field.default)
    ]
    named = [f"preset {config.preset}"] if presets else []  # type: ignore[attr-defined]
    return ", ".join([*named, *([" ".join(changed)] if changed else [])]) or "all options at their defaults"


def plain(config: DataclassInstance) -> dict[str, Any]:
    """Returns a config dataclass as a dict of numbers, strings and lists, fit for JSON and for a checkpoint.

    URLs have no secrets.
    """

    def convert(value: Any) -> Any:
        if isinstance(value, tuple):
            return [convert(part) for part in value]
        return value if isinstance(value, int | float | None) else without_secrets(str(value))

    return {name: convert(value) for name, value in dataclasses.asdict(config).items()}


def command_line(*add: str, drop: tuple[str, ...] = ()) -> str:
    """Returns the command of this run with flags added and others dropped, for the user to type; no URL has secrets."""
    arguments = [without_secrets(argument) for argument in sys.argv if argument not in (*drop, *add)]
    return shlex.join(["python", *arguments, *add])


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yields a list that receives the numbers of stop signals: SIGINT, SIGTERM, and SIGHUP unless `nohup` ignores it.

    A second SIGINT or SIGTERM acts at once, as usual.
    """
    received: list[int] = []
    before: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[number])

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def limit_spinning(microseconds: int = TRAINING) -> None:
    """Makes OpenMP's waiting threads spin for a short time and then sleep, unless the user has set a wait policy.

    Call it before torch is imported, whose OpenMP reads this once. By default the threads of GNU's OpenMP spin for
    10 ms or more at the end of every parallel loop. If another process keeps a core busy, they spin in the time slices
    that the last thread needs, and training takes ten times as long. Threads that sleep at once are slow to wake: that
    costs half as much time again on a quiet machine (docs/log.md has the figures).
    """
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        return
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux, where another OpenMP is in use
        return
    # A round of the waiting loop is a `pause`: 140 cycles on Intel's processors since Skylake, 65 on AMD's since Zen 2.
    nanoseconds = next((ns for vendor, ns in (("GenuineIntel", 50), ("AuthenticAMD", 18)) if vendor in cpu), 1)
    os.environ["GOMP_SPINCOUNT"] = str(1_000 * microseconds // nanoseconds)


def progress(items: Iterable[Item] | None = None, **options: Any) -> tqdm[Item]:
    """Returns tqdm's progress bar on standard error: over the items, or for `total` units to `update` by hand.

    The bar goes when it ends, and is disabled if standard error is no terminal.
    """
    from tqdm import tqdm

    return tqdm(items, mininterval=0.5, delay=0.5, leave=False, dynamic_ncols=True, disable=None, **options)


def duration(seconds: float) -> str:
    """Returns a time in its two largest units: "4.2 s", "45 s", "2 min 5 s", "3 h 12 min", "2 d 4 h"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole, minutes, hours = round(seconds), round(seconds / 60), round(seconds / 3600)
    if whole < 60:
        return f"{whole} s"
    if whole < 60 * 60:
        return f"{whole // 60} min {whole % 60} s"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24:,} d {hours % 24} h"


def shorten(text: str, max_length: int) -> str:
    """Returns a text on one line, cut to `max_length` characters."""
    text = " ".join(text.split())
    return text if len(text) <= max_length else text[: max_length - 1] + "…"


def printable(text: str) -> str:
    """Returns a text for a terminal: line breaks and tabs stay; other control characters become escapes like `\\x1b`.

    A raw control character in a file or in what a model writes could clear the screen, or fake a line of the program.
    """
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def without_secrets(text: str) -> str:
    """Returns a text in which URLs have no user names and passwords, and on the web "?…" in place of a query.

    Whatever may name a URL and is printed, logged or stored passes through here: a query may hold a token.
    """
    return _QUERY.sub(r"\1\2…", _USER.sub(r"\1", text))


_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_USER = re.compile(r"\b([a-z][a-z0-9.+-]+:/{1,2})[^\s/?#]*@", re.IGNORECASE)
_QUERY = re.compile(r"\b(https?:/{1,2}[^\s?#]*)([?#])(?:…(?=[\s:;,.)'\"]|$)|\S*)", re.IGNORECASE)
