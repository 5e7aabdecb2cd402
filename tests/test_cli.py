"""The command line: flags, presets, what a run says of its options, and how every script begins and ends."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from conftest import ENVIRONMENT, REPOSITORY, command
from tyro.conf import Positional, UseAppendAction

import train
from system import cli
from system.cli import describe, parse, plain
from system.errors import UserError, is_out_of_memory, require_at_least


@dataclass(frozen=True)
class Config:
    texts: Positional[tuple[str, ...]] = ()
    stop: UseAppendAction[tuple[str, ...]] = ()
    learning_rate: float = 1e-4
    accumulate: int | Literal["auto"] = "auto"
    data: Path = Path("mine")
    preset: str = "small"
    max_steps: int | None = None
    mode: Literal["fast", "slow"] | None = None
    verbose: bool = False


PRESETS = {"small": Config(), "large": Config(preset="large", max_steps=9, learning_rate=1.0, verbose=True)}


def test_flags_fill_one_flat_config_and_override_the_preset():
    line = "a b --stop x --stop y --max_steps 3 --mode=slow --verbose --accumulate 2 --data d"
    assert parse(Config, line.split()) == Config(
        texts=("a", "b"), stop=("x", "y"), max_steps=3, mode="slow", verbose=True, accumulate=2, data=Path("d")
    )
    assert parse(Config, []) == Config() and parse(Config, [], PRESETS) == PRESETS["small"]
    assert parse(Config, ["--preset", "large"], PRESETS) == PRESETS["large"]
    changed = parse(Config, ["--learning-rate", "2", "--preset=large", "--no-verbose", "--max-steps", "None"], PRESETS)
    assert changed == Config(preset="large", learning_rate=2.0)
    with pytest.raises(UserError, match="no preset 'larger': choose from small, large") as error:
        parse(Config, ["--preset", "larger"], PRESETS)
    assert error.value.status == 2


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("--learningrate 3", "--learning-rate"), ("--max-steps many", "many"), ("--max-steps", "--max-steps"),
        ("--mode other", "other"), ("--accumulate some", "some"),
        ("--n-head 5", "n_embd 768 must be a multiple of n_head 5"),
    ],
)  # fmt: skip
def test_bad_usage_ends_with_status_2_in_tyros_words(capsys, arguments, word):
    with pytest.raises(SystemExit, match="^2$"):
        parse(train.Config if "head" in arguments else Config, arguments.split())
    assert word in capsys.readouterr().err


def test_a_run_describes_only_what_the_user_chose():
    for arguments, described in {
        "": "preset small",
        "--preset=large --max-steps 9": "preset large",
        "--max-steps 3 --preset large --no-verbose": "preset large, max_steps=3 verbose=False",
        "--stop a --data /x": "preset small, stop=a data=/x",
    }.items():
        assert describe(parse(Config, arguments.split(), PRESETS), PRESETS) == described
    assert describe(Config(data=Path("my data")), PRESETS) == "preset small, data='my data'"
    assert describe(Config()) == "all options at their defaults"
    assert [plain(Config(stop=("a",)))[name] for name in ("data", "stop", "max_steps")] == ["mine", ["a"], None]
    with pytest.raises(UserError, match="^--max-steps must be at least 1$"):
        require_at_least(1, Config(max_steps=0), "max_steps")
    require_at_least(1, Config(), "max_steps")


SECRETS = {
    "see https://me:key@host/a.txt?token=x, now": "see https://host/a.txt?… now",
    "s3://id:key@bucket/a b": "s3://bucket/a b",
    "https://host/a.txt?…: gone": "https://host/a.txt?…: gone",
    "https://host/a.txt": "https://host/a.txt",
    "me@host.org wrote": "me@host.org wrote",
}


def test_no_url_keeps_its_secrets():
    assert {text: cli.without_secrets(text) for text in SECRETS} == SECRETS


def test_the_command_to_go_on_is_that_of_the_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--overwrite", "--data", "https://me:key@host/a b", "--resume"])
    expected = "python train.py --data 'https://host/a b' --resume"
    assert cli.command_line("--resume", drop=("--overwrite",)) == expected


def test_how_figures_and_texts_look_in_print():
    times = {0.04: "0.0 s", 9.94: "9.9 s", 9.96: "10 s", 59.6: "1 min 0 s", 125: "2 min 5 s", 3600: "1 h 0 min"}
    times |= {11_520: "3 h 12 min", 86_399: "1 d 0 h", 187_200: "2 d 4 h"}
    assert {seconds: cli.duration(seconds) for seconds in times} == times
    assert cli.printable("a\x1b[2J\r\tb\n\u202e\ud800é🙂") == "a\\x1b[2J\\r\tb\n\\u202e\\ud800é🙂"
    assert cli.shorten(" a\n b  c ", 5) == "a b c" and cli.shorten("abcdef", 4) == "abc…"
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))


FLAGS = {
    "prepare_data.py": "--vocab-size", "train.py": "--grad-accum-steps", "generate.py": "--top-p",
    "prepare_sft_data.py": "--template", "train_sft.py": "--epochs", "train_classifier.py": "--train-layers",
    "classify.py": "--json", "evaluate.py": "--hellaswag", "export.py": "--out", "demo.py": "--input",
}  # fmt: skip


@pytest.mark.parametrize("script", FLAGS)
def test_help_is_quick_and_needs_no_large_library(tmp_path, script):
    program = (
        f"import runpy, sys; sys.path[0] = {str(REPOSITORY)!r}\n"
        f"try: sys.argv = ['x', '--help']; runpy.run_path({str(REPOSITORY / script)!r}, run_name='__main__')\n"
        "except SystemExit as e: assert not e.code\n"
        "assert not {'torch', 'datasets', 'transformers', 'pyarrow'} & sys.modules.keys()"
    )
    run, seconds = [sys.executable, "-c", program], []
    for _ in range(3):
        before = os.times()
        result = subprocess.run(run, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, encoding="utf-8")
        assert result.returncode == 0 and FLAGS[script] in result.stdout, result.stderr
        seconds.append(sum(os.times()[2:4]) - sum(before[2:4]))  # of the processor, which others may keep busy
    assert min(seconds) < 0.6


def test_waiting_threads_sleep_soon_unless_the_user_has_chosen(monkeypatch):
    for chosen in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", None):
        environment = {chosen: "7"} if chosen else {}
        monkeypatch.setattr(os, "environ", environment)
        cli.limit_spinning(cli.GENERATION)
        assert environment == {chosen: "7"} if chosen else 400_000 // int(environment["GOMP_SPINCOUNT"]) in (1, 18, 50)


RAISES = """
import sys
from dataclasses import dataclass
from system.cli import run
from system.errors import UserError
@dataclass(frozen=True)
class Config:
    memory_savers = "smaller --batch-size or a "
def main(config):
    {statement}
run(main, Config)
"""
ENDS = {  # what a script does: its exit status and the last line on standard error
    "pass": (0, "-c: all options at their defaults"),
    "raise UserError('no file\\nhttps://me:key@host \\x1b')": (1, "error: no file https://host \\x1b"),
    "raise UserError('bad', status=2)": (2, "error: bad"),
    "raise KeyboardInterrupt": (130, "error: interrupted"),
    "open('none/x')": (1, "error: none/x: No such file or directory"),
    "with open('/dev/full', 'w') as file: file.write('x')": (1, "error: standard output: No space left on device"),
    "raise MemoryError": (1, "error: out of memory: try a smaller --batch-size or a smaller model"),
    "raise ValueError('a bug')": (1, "ValueError: a bug"),
}


@pytest.mark.parametrize("statement", ENDS)
def test_how_a_script_ends(tmp_path, statement):
    environment = {**ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}
    program = [sys.executable, "-c", RAISES.format(statement=statement)]
    result = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
    status, line = ENDS[statement]
    assert result.returncode == status and result.stderr.splitlines()[-1] == line, result.stderr
    assert ("Traceback" in result.stderr) == ("a bug" in statement)


def test_output_into_a_closed_pipe_is_no_error(toy):
    process = subprocess.Popen(
        command("evaluate.py --model checkpoints/toy.pt --data data/toy --device cpu"),
        cwd=toy, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    stderr = process.stderr.read().decode()
    assert process.wait(60) == 1 and "Traceback" not in stderr and "Exception" not in stderr, stderr


def test_writing_does_not_import_the_compiler(toy):
    """`torch._dynamo` takes about a second to import, and only `--compile on` needs it."""
    program = (
        "import sys; from generation.config import SamplingConfig; from generation.text_model import TextModel; "
        "TextModel.load('checkpoints/toy.pt', 'cpu').write([1], SamplingConfig(max_new_tokens=2)); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run([sys.executable, "-c", program], cwd=toy, env=environment, timeout=60).returncode == 0
