"""Command lines from dataclasses: flags, presets, one-line errors. Imports no torch, so that `--help` is instant."""

import contextlib
import dataclasses
import errno
import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from system.errors import UserError, is_out_of_memory, require

Config = TypeVar("Config")


def run(
    main: Callable[[Config], None], config_class: type[Config], presets: Mapping[str, Config] | None = None
) -> None:
    """Runs a script: parses `sys.argv` into its config, prints the config, calls `main(config)` and exits.

    What its user can mend ends in one line on standard error and exit status 1 (2 for bad usage); Ctrl-C in 130.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # what a terminal cannot show, such as bytes that are no text
    config = None
    try:
        config = parse(config_class, sys.argv[1:], presets)
        print(f"{os.path.basename(sys.argv[0])}: {describe(config)}", file=sys.stderr)
        main(config)
        sys.stdout.flush()
    except UserError as error:
        _exit(str(error), error.status)
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        _exit(f"{error.filename or 'writing'}: {error.strerror or error}", 1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _exit(f"out of memory: try a {getattr(config, 'memory_savers', '')}smaller model", 1)


def parse(config_class: type[Config], arguments: list[str], presets: Mapping[str, Config] | None = None) -> Config:
    """Parses flags into a config dataclass; `--preset NAME` chooses the defaults, flags beside it win.

    Raises UserError (status 2) for bad usage; exits 0 after `--help`.
    """
    import tyro

    default = dataclasses.MISSING
    if presets:
        default = presets[_preset_name(arguments, presets)]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                config_class,
                args=arguments,
                description=sys.modules[config_class.__module__].__doc__,
                **({} if default is dataclasses.MISSING else {"default": default}),
            )
    except SystemExit as exit_:
        if not exit_.code:
            raise
        raise UserError(f"{_one_line(complaint.getvalue())} (see --help)", status=2) from None


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[list]:
    """Yields a list that gets the number of a SIGINT or SIGTERM; a second one acts at once, as usual."""
    received, before = [], {}

    def handle(number, frame):
        received.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def describe(config: object) -> str:
    """Returns a config dataclass as one line of `name=value`."""
    return " ".join(f"{name}={value}" for name, value in plain(config).items())


def plain(config: object) -> dict:
    """Returns a config dataclass as a dict of numbers, strings and lists, fit for JSON and for a checkpoint."""
    return {
        name: list(value)
        if isinstance(value, tuple)
        else value
        if isinstance(value, int | float | None)
        else str(value)
        for name, value in dataclasses.asdict(config).items()
    }


def command_line(add: str, drop: tuple[str, ...] = ()) -> str:
    """Returns this run's own command with flags added and dropped, to be shown to the user and typed again."""
    arguments = [argument for argument in sys.argv if argument not in drop and argument != add]
    return shlex.join(["python", *arguments, add])


def _preset_name(arguments, presets):
    name = next(iter(presets))
    for i, argument in enumerate(arguments):
        if argument == "--preset" and i + 1 < len(arguments):
            name = arguments[i + 1]
        elif argument.startswith("--preset="):
            name = argument.partition("=")[2]
    require(name in presets, f"no preset {name!r}: choose from {', '.join(presets)}")
    return name


def _one_line(box: str) -> str:
    """Returns the complaint inside the parser's first box of text, without the frame and the suggestions below."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    end = next((i for i, line in enumerate(lines) if set(line) & set("─╰")), len(lines))
    return " ".join(" ".join(lines[:end]).split())


def _exit(message, status):
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
