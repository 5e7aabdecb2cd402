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
from system.wording import without_secrets

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
    """Runs a script: parses `sys.argv` into its config, prints what the user chose, calls `main(config)`, and exits.

    An error that the user can correct ends in one line on standard error and exit status 1 (2 for bad usage); Ctrl-C
    ends in status 130.
    """
    limit_spinning()
    _replace_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Print a substitute for characters that the terminal lacks. A log file gets each line at once, in order.
            stream.reconfigure(errors="replace", line_buffering=True)
    _drop_variables_of_tqdm()
    config = None
    try:
        config = parse(config_class, sys.argv[1:], presets)
        print(printable(f"{os.path.basename(sys.argv[0])}: {describe(config, presets)}"), file=sys.stderr)
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


def _drop_variables_of_tqdm() -> None:
    """Removes variables such as TQDM_MININTERVAL: `datasets` imports tqdm, and a wrong value ends in a traceback."""
    for name in [name for name in os.environ if name.startswith("TQDM_") and name != "TQDM_DISABLE"]:
        del os.environ[name]


def _require_current_folder() -> None:
    """Raises UserError if the current folder was deleted: torch would end the process."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder does not exist any more: change to another one") from None


def parse(config_class: type[Config], arguments: list[str], presets: Mapping[str, Config] | None = None) -> Config:
    """Parses flags into a config dataclass with tyro. `--preset NAME` chooses the defaults; other flags override them.

    `--help` shows a field under the heading of the class that declares it first: a config class that inherits from
    small dataclasses has a heading for each of them, with the first line of that class's docstring. The names in a
    class variable `first_in_help` come before all headings, in that order; the other fields of the class then come
    last.

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
        message = _explain(_first_paragraph(complaint.getvalue()), config_class, arguments)
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


def describe(config: Config, presets: Mapping[str, Config] | None = None) -> str:
    """Returns what the user chose: the preset, if there are presets, and the options that differ from its defaults."""
    name = getattr(config, "preset", "")
    preset = presets[name] if presets else None
    values = plain(config)
    options = [
        f"{field.name}={_quoted(values[field.name])}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != (getattr(preset, field.name) if preset else _default(field))
    ]
    parts = [f"preset {name}"] if preset else []
    if options:
        parts.append(" ".join(options))
    return ", ".join(parts) or "all options at their defaults"


def plain(config: DataclassInstance) -> dict[str, Any]:
    """Returns a config dataclass as a dict of numbers, strings and lists, fit for JSON and for a checkpoint.

    URLs have no secrets.
    """

    def convert(value: Any) -> Any:
        if isinstance(value, tuple):
            return [convert(part) for part in value]
        return value if isinstance(value, int | float | None) else without_secrets(as_utf8(value))

    return {name: convert(value) for name, value in dataclasses.asdict(config).items()}


def command_line(*add: str, drop: tuple[str, ...] = ()) -> str:
    """Returns the command of this run with flags added and others dropped, for the user to type.

    URLs have no secrets.
    """
    arguments = [without_secrets(argument) for argument in sys.argv if argument not in (*drop, *add)]
    return shlex.join(["python", *arguments, *add])


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
    own, *bases = config_class.__mro__
    first = getattr(config_class, "first_in_help", ())
    order = [_First, *bases, own] if first else [own, *bases]
    groups: dict[type, list[tuple[str, Any, Any]]] = {cls: [] for cls in order}
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for name, field in {**{name: fields[name] for name in first}, **fields}.items():
        default = getattr(preset, name) if preset else _default(field)
        hint = hints[name]
        marks = getattr(hint, "__metadata__", ())
        computed = next((mark.text for mark in marks if isinstance(mark, Help)), None)
        help_text = computed or help_texts.get(name, "")
        text = tyro.conf.arg(
            help=help_text, metavar=_metavar(hint), help_behavior_hint=_default_in_words(default, help_text)
        )
        if REPEATABLE in marks:
            hint = append_action[hint]
        if POSITIONAL in marks:
            hint = positional[hint]
        item = (name, Annotated[hint, text], dataclasses.field(default=default, kw_only=True))
        groups[_First if name in first else _first_class_with(name, config_class)].append(item)
    return dataclasses.make_dataclass(
        "Flags",
        [
            (f"group_{i}", Annotated[_heading(cls, fields), tyro.conf.arg(name=_title(cls, own, bool(first)))])
            for i, (cls, fields) in enumerate(groups.items())
            if fields
        ],
    )


class _First:
    """The flags that most users need"""


def _default_in_words(default: Any, help_text: str) -> str | None:
    """Returns what `--help` says after the text of a flag about its default; None leaves a required flag to tyro."""
    if default is dataclasses.MISSING:
        return None
    if isinstance(default, bool):
        return f"(default: {'on' if default else 'off'})"
    if default is None or default in ("", ()):
        return "" if "default" in help_text else "(default: none)"
    return f"(default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"


def _heading(cls: type, fields: list[tuple[str, Any, Any]]) -> type:
    """Returns a dataclass whose docstring is the first line of another's, unless Python generated that one."""
    doc = (cls.__doc__ or "").strip().partition("\n")[0]
    doc = "" if doc.startswith(f"{cls.__name__}(") else doc
    return dataclasses.make_dataclass(cls.__name__, fields, namespace={"__doc__": doc})


def _title(cls: type, own: type, is_own_last: bool) -> str:
    """Returns the name of a group of flags: of `LoggingConfig`, "logging"; of the first group, nothing."""
    if cls is own and is_own_last:
        return "other"
    if cls in (own, _First):
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
    """Returns what `--help` shows for a union, such as INT or INT|auto; None leaves other types to tyro."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()
    others = [part for part in parts if part is not types.NoneType]
    if not others:
        return None
    if len(others) == 1 and get_origin(others[0]) is tuple:
        return f"[{_metavar(get_args(others[0])[0] | None)}]"
    if len(others) == 1 and get_origin(others[0]) is Literal:
        return "{" + ",".join(map(str, get_args(others[0]))) + "}"
    names = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}
    return "|".join(names.get(part) or "|".join(map(str, get_args(part))) for part in others)


def _explain(complaint: str, config_class: type[DataclassInstance], arguments: list[str]) -> str:
    """Returns tyro's message about bad usage as one short sentence. A message of another kind stays as it is.

    tyro has no public hook for errors, so requirements.txt pins its version.
    """
    hints = {field.name: get_type_hints(config_class)[field.name] for field in dataclasses.fields(config_class)}
    first = getattr(config_class, "first_in_help", ())
    quoted = r"""('.*?'|".*?")"""
    value = None
    if found := re.match(r"Unrecognized options: ([^\s,=]+)", complaint):
        return _explain_unknown(found[1], hints, first)
    if found := re.match(r"Missing from .*?: (--\S+)", complaint):
        flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
        names = {flag: flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in flags}
        unknown = next((flag for flag, name in names.items() if name not in hints), None)
        return _explain_unknown(unknown, hints, first) if unknown else f"{found[1]} is required"
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


def _explain_unknown(argument: str, hints: dict[str, Any], first: tuple[str, ...]) -> str:
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r}"
    switches = [name.replace("_", "-") for name, hint in hints.items() if hint is bool]
    flags = [name.replace("_", "-") for name in {**dict.fromkeys(first), **hints}]
    wanted = argument.lstrip("-").replace("_", "-").lower()
    found = _similar_flag(wanted, flags)
    if wanted.startswith("no-") and (switch := _similar_flag(wanted.removeprefix("no-"), switches)):
        found = f"no-{switch}"
    return f"unknown flag {argument}: did you mean --{found}?" if found else f"unknown flag {argument}"


_OTHER_NAMES = {  # in nanoGPT, transformers and others
    "block-size": ("context", "context-length", "seq-len", "seq-length", "max-length"),
    "eval-every": ("eval-interval", "eval-steps"),
    "log-every": ("log-interval", "logging-steps"),
    "save-every": ("save-interval", "save-steps"),
    "grad-accum-steps": ("gradient-accumulation-steps", "accumulate"),
    "init-from": ("model", "from", "checkpoint"),
    "max-new-tokens": ("length", "max-tokens", "max-length"),
    "max-steps": ("iters", "max-iters", "steps", "iterations"),
    "model": ("checkpoint", "ckpt", "init-from"),
    "n-embd": ("width", "dim", "hidden-size", "d-model"),
    "num-samples": ("n",),
    "out": ("output", "output-dir", "out-dir", "save"),
    "overwrite": ("force", "replace"),
    "data": ("dataset", "input"),
    "input": ("data", "file", "files"),
    "resume": ("continue",),
    "warmup-steps": ("warmup-iters",),
}


def _similar_flag(wanted: str, flags: list[str]) -> str | None:
    """Returns the flag that a user probably meant: the same letters, another program's name, initials such as lr, one
    of its words such as epoch, or a misspelling. `flags` have no dashes in front; the important ones come first."""
    letters, words = wanted.replace("-", ""), {word.removesuffix("s") for word in wanted.split("-")}

    def words_of(flag: str) -> set[str]:
        return {word.removesuffix("s") for word in flag.split("-")}

    tests: tuple[Callable[[str], bool], ...] = (
        lambda flag: flag.replace("-", "") == letters,
        lambda flag: wanted in _OTHER_NAMES.get(flag, ()),
        lambda flag: "-" in flag and "".join(word[0] for word in flag.split("-")) == letters,
        lambda flag: words <= words_of(flag),
        lambda flag: words_of(flag) < words and len(flag) > 3,
        lambda flag: len(letters) >= 3 and flag.replace("-", "").startswith(letters),
    )
    found = (flag for test in tests for flag in flags if test(flag))
    return next(found, None) or next(iter(difflib.get_close_matches(wanted, flags, n=1, cutoff=0.7)), None)


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
            print(printable(f"error: {without_secrets(' '.join(message.split()))}"), file=stream, flush=True)
            break
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.exit(status)
    _discard_output()
    sys.exit(status)


def _discard_output() -> None:
    """Connects standard output to the null device: Python would report what it still cannot write when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
