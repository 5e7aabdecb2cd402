"""The command line: flags, headings of `--help`, presets, and one line for every mistake."""

from __future__ import annotations

import importlib
import io
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from tyro.conf import Positional, UseAppendAction, arg

from system.cli import describe, parse, plain
from system.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """What to read."""

    data: Path = Path("data")
    """folder to read"""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """where to stop; may be given several times"""


@dataclass(frozen=True)
class SpeedOfLearningConfig:
    """How fast to learn."""

    hint: ClassVar[str] = "no flag"
    learning_rate: float = 1e-3
    """highest learning rate"""
    accumulate: int | Literal["auto"] = "auto"
    """micro-batches"""


@dataclass(frozen=True)
class SharedConfig(DataConfig, SpeedOfLearningConfig):
    """All that is shared."""


@dataclass(frozen=True)
class Config(SharedConfig):
    texts: Positional[tuple[str, ...]] = field(default=())
    """texts to read"""
    learning_rate: float = 1e-4
    """learning rate of this script"""
    data: Path = Path("mine")
    preset: str = "small"
    """the defaults of everything else"""
    max_steps: int | None = None
    """steps at most"""
    mode: Literal["fast", "slow"] | None = None
    """how to go"""
    files: Annotated[tuple[Path, ...] | None, arg(metavar="[FILE]")] = None
    """files to read"""
    verbose: bool = False
    """print
    more"""


@dataclass(frozen=True)
class Ordered(Config):
    first_in_help: ClassVar[tuple[str, ...]] = ("max_steps", "data")
    mine: int = 1
    """declared here, and not among the first"""


@dataclass(frozen=True)
class Required:
    out: Path
    """file to write"""


PRESETS = {"small": Config(), "large": Config(preset="large", max_steps=9, learning_rate=1.0, verbose=True)}


@pytest.fixture()
def help_text(capsys, monkeypatch) -> str:
    """What `--help` prints on a terminal with 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as exit_:
        parse(Config, ["--help"], PRESETS)
    assert not exit_.value.code
    return capsys.readouterr().out


def test_help_groups_flags_by_the_class_that_declares_them_first(help_text):
    own, data, speed = re.split(" data options|speed of learning options", help_text)
    assert all(flag in own for flag in ("--preset STR", "--max-steps INT", "--verbose, --no-verbose"))
    assert all(text in data for text in ("What to read.", "--data PATH", "--stop STR"))
    assert all(text in speed for text in ("How fast to learn.", "--learning-rate FLOAT", "--accumulate INT|auto"))
    assert "All that is shared." not in help_text


def test_help_shows_the_final_default_and_the_text_of_the_most_derived_class(help_text):
    assert "learning rate of this script (default: 0.0001)" in help_text and "highest" not in help_text
    assert "folder to read (default: mine)" in help_text
    assert "print more" in help_text and "texts to read" in help_text
    assert "hint" not in help_text


def test_help_shows_optional_values_without_none(help_text):
    assert "{None}" not in help_text
    assert all(flag in help_text for flag in ("--max-steps INT", "--mode {fast,slow}", "--files [FILE]"))


def test_help_says_the_default_in_words(help_text):
    assert all(f"(default: {text})" in help_text for text in ("none", "auto", "off", "small"))
    assert not any(text in help_text for text in ("None", "False", "True", "''", "()"))


def test_help_begins_with_the_flags_that_a_class_names(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse(Ordered, ["--help"])
    shown = capsys.readouterr().out
    order = ["--max-steps", "--data", "data options", "--stop", "--learning-rate", "other options", "--mine"]
    assert sorted(order, key=shown.index) == order
    with pytest.raises(UserError, match="did you mean --max-steps"):
        parse(Ordered, ["--step", "3"])


MISTYPED = {  # script: pairs of a flag that a user may type, and the right one
    "train": "lr learning-rate, batchsize batch-size, steps max-steps, layers n-layer, heads n-head, wd weight-decay, "
    "max_iters max-steps, eval_interval eval-every, out_dir out, no-resum no-resume, dataset data, seeds seed",
    "train_sft": "lr learning-rate, epoch epochs, rank lora-rank, bs batch-size, no-Resume no-resume, dataset data",
    "train_classifier": "lr learning-rate, text text-column, label label-column, layers train-layers",
    "generate": "temp temperature, max-tokens max-new-tokens, topk top-k, samples num-samples, checkpoint model, "
    "tokens max-new-tokens, no-chats no-chat, penalty repetition-penalty",
    "evaluate": "batchsize batch-size, texts text, checkpoint model",
    "export": "output out, ckpt model, force overwrite",
    "classify": "file input, checkpoint model",
    "prepare_data": "vocab vocab-size, vocabsize vocab-size, output out",
    "prepare_sft_data": "context block-size, blocksize block-size, force overwrite",
    "demo": "steps max-steps, file input, vocab vocab-size",
}


@pytest.mark.parametrize("script", MISTYPED)
def test_a_mistyped_flag_of_every_script_suggests_the_right_one(script):
    config_class = importlib.import_module(script).Config
    for pair in MISTYPED[script].split(", "):
        typed, meant = pair.split()
        with pytest.raises(UserError) as error:
            parse(config_class, [f"--{typed}"])
        assert str(error.value) == f"unknown flag --{typed}: did you mean --{meant}? (see --help)"


def test_flags_of_all_groups_fill_one_flat_config():
    arguments = ["a", "b", "--stop", "x", "--stop", "y", "--max_steps", "3", "--mode=slow", "--files", "f", "--verbose"]
    assert parse(Config, [*arguments, "--accumulate", "2"]) == Config(
        texts=("a", "b"), stop=("x", "y"), max_steps=3, mode="slow", files=(Path("f"),), verbose=True, accumulate=2
    )
    assert parse(Config, []) == Config()
    assert parse(Config, ["--files"]).files == ()
    assert parse(Required, ["--out", "x"]) == Required(Path("x"))


def test_flags_override_the_preset():
    assert parse(Config, ["--preset", "large"], PRESETS) == PRESETS["large"]
    config = parse(Config, ["--learning-rate", "2", "--preset=large", "--no-verbose", "--max-steps", "None"], PRESETS)
    assert config == Config(preset="large", learning_rate=2.0)
    with pytest.raises(UserError, match="no preset 'larger': choose from small, large"):
        parse(Config, ["--preset", "larger"], PRESETS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--learningrate 3", "unknown flag --learningrate: did you mean --learning-rate?"),
        ("--learnin_rate=3", "unknown flag --learnin_rate: did you mean --learning-rate?"),
        ("--no-verbos", "unknown flag --no-verbos: did you mean --no-verbose?"),
        ("--no_verbose_", "unknown flag --no_verbose_: did you mean --no-verbose?"),
        ("--lr 3", "unknown flag --lr: did you mean --learning-rate?"),
        ("--max-iters 3", "unknown flag --max-iters: did you mean --max-steps?"),
        ("--no-datas", "unknown flag --no-datas: did you mean --data?"),
        ("--verb", "unknown flag --verb: did you mean --verbose?"),
        ("-rate 3", "unknown flag -rate: did you mean --learning-rate?"),
        ("--anything-else", "unknown flag --anything-else"),
        ("--hint x", "unknown flag --hint"),
        ("--max-steps many", "--max-steps takes a whole number, not 'many'"),
        ("--max-steps=1.5", "--max-steps takes a whole number, not '1.5'"),
        ("--learning-rate fast", "--learning-rate takes a number, not 'fast'"),
        ("--accumulate some", "--accumulate takes a whole number or auto, not 'some'"),
        ("--mode other", "--mode takes fast or slow, not 'other'"),
        ("--learning-rate", "--learning-rate needs a value: a number"),
        ("--data", "--data needs a value: a path"),
        ("--mode", "--mode needs a value: fast or slow"),
    ],
)
def test_bad_usage_gets_one_line(arguments, message):
    with pytest.raises(UserError) as error:
        parse(Config, arguments.split())
    assert (str(error.value), error.value.status) == (f"{message} (see --help)", 2)


def test_a_number_of_thirty_digits_costs_one_line():
    with pytest.raises(UserError, match="^--max-steps must be below 2.40$"):
        parse(Config, ["--max-steps", "9" * 30])


def test_a_message_for_a_terminal_has_no_colours_and_no_frame(monkeypatch):
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(UserError, match=r"^--max-steps takes a whole number, not 'many' \(see --help\)$"):
        parse(Config, ["--max-steps", "many"])


def test_missing_and_unexpected_arguments_get_one_line():
    with pytest.raises(UserError, match=r"^--out is required \(see --help\)$"):
        parse(Required, [])
    with pytest.raises(UserError, match=r"^unexpected argument 'word' \(see --help\)$"):
        parse(Required, ["word", "--out", "x"])


def test_a_run_describes_only_what_the_user_chose():
    for arguments, described in {
        "": "preset small",
        "--preset large": "preset large",
        "--preset=large --max-steps 9": "preset large",
        "--max-steps 3 --preset large --no-verbose": "preset large, max_steps=3 verbose=False",
    }.items():
        assert describe(parse(Config, arguments.split(), PRESETS), PRESETS) == described
    assert describe(Config(stop=("a b",), data=Path("my data")), PRESETS) == "preset small, data='my data' stop=['a b']"
    assert describe(DataConfig()) == "all options at their defaults"
    assert describe(Required(Path("x"))) == "out=x"


def test_a_plain_config_holds_numbers_strings_and_lists():
    assert plain(Required(Path("x"))) == {"out": "x"}
    assert plain(Required(Path(os.fsdecode(b"caf\xe9")))) == {"out": "caf?"}
    assert plain(DataConfig(stop=("a",))) == {"data": "data", "stop": ["a"]}
    assert plain(SpeedOfLearningConfig()) == {"learning_rate": 1e-3, "accumulate": "auto"}
