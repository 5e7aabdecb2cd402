"""Command lines from dataclasses: flags, presets, one-line errors. Imports no torch, so that `--help` is instant."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import errno
import functools
import inspect
import io
import itertools
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from system import interrupts
from system.errors import UserError, is_out_of_memory, require
from system.threads import limit_spinning
from system.untrusted import as_utf8, printable

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
REPEATABLE, POSITIONAL = "repeatable", "positional"
"""Mark a tuple whose flag may be given several times, and one without a flag: `Annotated[tuple[str, ...], REPEATABLE]`.
"""
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@dataclasses.dataclass(frozen=True)
class Help:
    """What `--help` says of a field, in place of a docstring, which cannot be computed: `Annotated[str, Help(…)]`."""

    text: str


def run(
    main: Callable[[Config], None], config_class: type[Config], presets: Mapping[str, Config] | None = None
) -> None:
    """Runs a script: parses `sys.argv` into its config, prints what is not default, calls `main(config)`, and exits.

    An error that the user can correct ends in one line on standard error and exit status 1 (2 for bad usage); Ctrl-C
    ends in status 130.
    """
    limit_spinning()
    _replace_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # print a substitute for characters that the terminal lacks
    config = None
    try:
        config = parse(config_class, sys.argv[1:], presets)
        print(printable(f"{os.path.basename(sys.argv[0])}: {describe(config)}"), file=sys.stderr)
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.isatty():
            sys.stdout = SafeTerminal(sys.stdout.detach(), sys.stdout.encoding, "replace", line_buffering=True)
        _require_current_folder()
        with interrupts.raised():
            main(config)
        sys.stdout.flush()
    except UserError as error:
        _exit(str(error), error.status)
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed the pipe
        _discard_output()
        sys.exit(1)
    except OSError as error:
        if error.filename is None and error.errno not in _CANNOT_WRITE:
            raise
        _exit(f"{error.filename or 'standard output or error'}: {error.strerror or error}", 1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _exit(f"out of memory: try a {getattr(config, 'memory_savers', '')}smaller model", 1)


class SafeTerminal(io.TextIOWrapper):
    """Standard output that is a terminal: what a model or a file says reaches it without control characters."""

    def write(self, text: str, /) -> int:
        """Writes text after `printable`."""
        return super().write(printable(text))

    def write_codes(self, codes: str) -> None:
        """Writes the program's own control characters, such as a colour, at once."""
        super().write(codes)
        self.flush()


def _replace_closed_streams() -> None:
    """Connects each standard stream that the caller has closed (`>&-` in a shell) to the null device."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _require_current_folder() -> None:
    """Raises UserError if the current folder was deleted: torch would end the process."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder does not exist any more: change to another one") from None


def parse(config_class: type[Config], arguments: list[str], presets: Mapping[str, Config] | None = None) -> Config:
    """Parses flags into a config dataclass with tyro. `--preset NAME` chooses the defaults; other flags override them.

    `--help` shows a field under the heading of the class that declares it first: a config class that inherits from
    small dataclasses has a heading for each of them, with the first line of that class's docstring.

    Raises UserError (status 2) for bad usage; exits with status 0 after `--help`.
    """
    import tyro  # only here and below, so that training works where it is not installed

    preset = presets[_preset_name(arguments, presets)] if presets else None
    read_flags = functools.partial(
        _parse_in_wide_terminal,
        _flags(config_class, preset),
        args=arguments,
        description=sys.modules[config_class.__module__].__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    complaint = io.StringIO()
    try:  # with standard output redirected too, tyro neither colours its message nor draws a frame
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(io.StringIO()):
            groups: Any = read_flags()
    except SystemExit as exit_:
        if not exit_.code:
            read_flags()  # prints the help again, for the terminal, and exits
        message = _explain(_first_paragraph(complaint.getvalue()), config_class)
        raise UserError(f"{message} (see --help)", status=2) from None
    flags = {name: value for group in vars(groups).values() for name, value in vars(group).items()}
    for name, value in flags.items():
        flag, limit = f"--{name.replace('_', '-')}", 63 if name == "seed" else 40
        require(not isinstance(value, int) or abs(value) < 2**limit, f"{flag} must be below 2^{limit}")
        require(not isinstance(value, float) or math.isfinite(value), f"{flag} must be a finite number")
    return config_class(**flags)


def _parse_in_wide_terminal(*arguments: Any, **options: Any) -> Any:
    """Calls `tyro.cli`, which draws frames and never ends in a terminal of one column; below 40 columns it gets 80."""
    import tyro

    before = os.environ.get("COLUMNS")
    if shutil.get_terminal_size().columns < 40:
        os.environ["COLUMNS"] = "80"
    try:
        return tyro.cli(*arguments, **options)
    finally:
        if before is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = before


def describe(config: DataclassInstance) -> str:
    """Returns the preset and the options that differ from the defaults of the config's class, as `name=value`."""
    defaults = {field.name: _default(field) for field in dataclasses.fields(config)}
    options = {name: value for name, value in plain(config).items() if getattr(config, name) != defaults[name]}
    if hasattr(config, "preset"):
        options = {"preset": config.preset, **options}
    return " ".join(f"{name}={_quoted(value)}" for name, value in options.items()) or "all options at their defaults"


def plain(config: DataclassInstance) -> dict[str, Any]:
    """Returns a config dataclass as a dict of numbers, strings and lists, fit for JSON and for a checkpoint."""

    def convert(value: Any) -> Any:
        if isinstance(value, tuple):
            return [convert(part) for part in value]
        return value if isinstance(value, int | float | None) else as_utf8(value)

    return {name: convert(value) for name, value in dataclasses.asdict(config).items()}


def command_line(add: str, drop: tuple[str, ...] = ()) -> str:
    """Returns the command of this run with one flag added and others dropped, for the user to type."""
    arguments = [argument for argument in sys.argv if argument not in drop and argument != add]
    return shlex.join(["python", *arguments, add])


def _preset_name(arguments: list[str], presets: Mapping[str, Any]) -> str:
    name = next(iter(presets))
    for i, argument in enumerate(arguments):
        if argument == "--preset" and i + 1 < len(arguments):
            name = arguments[i + 1]
        elif argument.startswith("--preset="):
            name = argument.partition("=")[2]
    require(name in presets, f"no preset {name!r}: choose from {', '.join(presets)}")
    return name


def _flags(config_class: type[DataclassInstance], preset: DataclassInstance | None) -> type:
    """Returns a dataclass of dataclasses with the fields of a config class, one for each heading of `--help`."""
    import tyro

    append_action: Any = tyro.conf.UseAppendAction
    positional: Any = tyro.conf.Positional
    hints, help_texts = get_type_hints(config_class, include_extras=True), _help_texts(config_class)
    groups: dict[type, list[tuple[str, Any, Any]]] = {cls: [] for cls in config_class.__mro__}
    for field in dataclasses.fields(config_class):
        default = getattr(preset, field.name) if preset else _default(field)
        hint = hints[field.name]
        marks = getattr(hint, "__metadata__", ())
        computed = next((mark.text for mark in marks if isinstance(mark, Help)), None)
        text = tyro.conf.arg(help=computed or help_texts.get(field.name), metavar=_metavar(hint))
        if REPEATABLE in marks:
            hint = append_action[hint]
        if POSITIONAL in marks:
            hint = positional[hint]
        item = (field.name, Annotated[hint, text], dataclasses.field(default=default, kw_only=True))
        groups[_first_class_with(field.name, config_class)].append(item)
    return dataclasses.make_dataclass(
        "Flags",
        [
            (f"group_{i}", Annotated[_heading(cls, fields), tyro.conf.arg(name=_title(cls, config_class))])
            for i, (cls, fields) in enumerate(groups.items())
            if fields
        ],
    )


def _heading(cls: type, fields: list[tuple[str, Any, Any]]) -> type:
    """Returns a dataclass whose docstring is the first line of another's, unless Python generated that one."""
    doc = (cls.__doc__ or "").strip().partition("\n")[0]
    doc = "" if doc.startswith(f"{cls.__name__}(") else doc
    return dataclasses.make_dataclass(cls.__name__, fields, namespace={"__doc__": doc})


def _title(cls: type, config_class: type) -> str:
    """Returns the name of a group of flags: of `LoggingConfig`, "logging"; of the script's own class, nothing."""
    if cls is config_class:
        return ""
    return re.sub("(?<=[a-z])(?=[A-Z])", " ", cls.__name__.removesuffix("Config")).lower()


def _first_class_with(field: str, config_class: type) -> type:
    """Returns the base-most class that declares a field."""
    return next(cls for cls in reversed(config_class.__mro__) if field in inspect.get_annotations(cls))


def _default(field: dataclasses.Field) -> Any:
    """Returns the default of a field, or `dataclasses.MISSING`."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _help_texts(config_class: type) -> dict[str, str]:
    """Returns the docstrings below the fields of a class and its bases; the most derived class wins."""
    texts = {}
    for cls in reversed(config_class.__mro__[:-1]):  # without `object`
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in itertools.pairwise(definition.body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                    texts[name] = " ".join(doc.split())
    return texts


def _metavar(hint: Any) -> str | None:
    """Returns what `--help` shows for an optional value, such as INT; None leaves the choice to tyro."""
    if _optional(hint) is None:
        return None
    if get_origin(_optional(hint)) is tuple:
        return f"[{_metavar(get_args(_optional(hint))[0] | None)}]"
    if get_origin(_optional(hint)) is Literal:
        return "{" + ",".join(map(str, get_args(_optional(hint)))) + "}"
    return {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}.get(_optional(hint))


def _optional(hint: Any) -> Any:
    """Returns `T` for the type `T | None`, otherwise None."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()
    others = [part for part in parts if part is not types.NoneType]
    return others[0] if len(others) == 1 < len(parts) else None


def _explain(complaint: str, config_class: type[DataclassInstance]) -> str:
    """Returns tyro's message about bad usage as one short sentence. A message of another kind stays as it is.

    tyro has no public hook for errors, so requirements.txt pins its version.
    """
    hints = {field.name: get_type_hints(config_class)[field.name] for field in dataclasses.fields(config_class)}
    quoted = r"""('.*?'|".*?")"""
    value = None
    if found := re.match(r"Unrecognized options: ([^\s,=]+)", complaint):
        return _explain_unknown(found[1], hints)
    if found := re.match(r"Missing from .*?: (--\S+)", complaint):
        return f"{found[1]} is required"
    if found := re.match(r"Error parsing (--\S+): Exceeds the limit", complaint):
        return f"{found[1]} must be below 2^63"
    if found := re.match(rf"Error parsing (--\S+): .*?{quoted}", complaint):
        flag, value = found.groups()
    elif found := re.match(rf"invalid choice {quoted} for argument '(--\S+?)'", complaint):
        value, flag = found.groups()
    elif found := re.match(r"Missing value for argument '(--\S+?)'", complaint):
        flag = found[1]
    else:
        return complaint
    wanted = _describe_type(hints[flag.removeprefix("--").replace("-", "_")])
    if value and len(value) > 60:
        value = f"{value[:60]}…{value[-1]}"
    return f"{flag} takes {wanted}, not {value}" if value else f"{flag} needs a value: {wanted}"


def _explain_unknown(argument: str, hints: dict[str, Any]) -> str:
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r}"
    flags = [f"--{name.replace('_', '-')}" for name in hints]
    flags += [f"--no-{name.replace('_', '-')}" for name, hint in hints.items() if hint is bool]
    similar = difflib.get_close_matches(argument.replace("_", "-"), flags, n=1, cutoff=0.7)
    return f"unknown flag {argument}: did you mean {similar[0]}?" if similar else f"unknown flag {argument}"


def _describe_type(hint: Any) -> str:
    """Returns what a user may write for a type: "a whole number", "auto, on or off"."""
    names = {int: "a whole number", float: "a number", str: "a text", Path: "a path"}
    parts = [part for part in get_args(hint) if part is not types.NoneType]
    if not parts:
        return names.get(hint, str(hint))
    if get_origin(hint) is tuple:
        return _describe_type(parts[0])
    *first, last = map(str, parts) if get_origin(hint) is Literal else map(_describe_type, parts)
    return f"{', '.join(first)} or {last}" if first else last


def _first_paragraph(message: str) -> str:
    """Returns what tyro says between the first two lines of dashes: no title and no suggestions."""
    lines = [line.strip() for line in message.splitlines()[2:]]
    return " ".join(" ".join(itertools.takewhile(lambda line: set(line) != {"-"}, lines)).split())


def _quoted(value: object) -> str:
    return repr(value) if isinstance(value, str) and (not value or any(c.isspace() for c in value)) else str(value)


def _exit(message: str, status: int) -> NoReturn:
    for stream in (sys.stderr, sys.stdout):  # the second if the first cannot be written
        with contextlib.suppress(OSError):
            print(printable(f"error: {' '.join(message.split())}"), file=stream, flush=True)
            break
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.exit(status)
    _discard_output()
    sys.exit(status)


def _discard_output() -> None:
    """Connects standard output to the null device: Python would report what it still cannot write when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
