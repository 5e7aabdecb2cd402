"""Odd environments: narrow terminals, other locales, wrong variables, closed streams. No traceback, no hang."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, REPOSITORY, command, wait_for_log
from system.threads import GENERATION, TRAINING, spin_count
from test_house import SCRIPTS
from training.distributed import Processes

from system.errors import UserError
from weights.loading import load_checkpoint

C_LOCALE = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TERM": "dumb"}
MEETING = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
CHAT = ["--model", "checkpoints/sft.pt", "--chat", "--max-new-tokens", "3", "--device", "cpu"]


def run_in(
    environment: dict[str, str], folder: Path, script: str, *arguments: object, **options
) -> subprocess.CompletedProcess:
    """Runs a script with more environment variables; returns its output as text."""
    return subprocess.run(
        command(script, *arguments), cwd=folder, env={**ENVIRONMENT, **environment}, text=True, timeout=60,
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )  # fmt: skip


def the_error(result: subprocess.CompletedProcess) -> str:
    """Returns the one line that a script must have failed with."""
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr[-2000:]
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return error


@pytest.mark.parametrize("columns", ["1", "39", "0", "abc"])
def test_help_is_readable_in_any_terminal(tmp_path, columns):
    result = subprocess.run(
        command("train.py", "--help"), cwd=tmp_path, env={**ENVIRONMENT, "COLUMNS": columns, "LINES": "0"},
        capture_output=True, encoding="utf-8", timeout=10,
    )  # fmt: skip
    assert result.returncode == 0 and "steps between evaluations (default: 1000)" in result.stdout


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x in the environment is not a whole number"),
        ({"RANK": "-1"}, "RANK=-1 in the environment is not a whole number"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK= in the environment is not a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and LOCAL_RANK=0 must be below WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "the 2 processes cannot meet"),
        ({"WORLD_SIZE": "2"}, "the 2 processes cannot meet (RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing)"),
        ({"RANK": "3"}, "RANK=3 and LOCAL_RANK=0 must be below WORLD_SIZE=1"),
        ({"LOCAL_RANK": "1"}, "RANK=0 and LOCAL_RANK=1 must be below WORLD_SIZE=1"),
        ({"WORLD_SIZE": "0"}, "RANK=0 and LOCAL_RANK=0 must be below WORLD_SIZE=0"),
        ({"WORLD_SIZE": "9" * 10}, "WORLD_SIZE=9999999999 in the environment is not a whole number"),
        ({**MEETING, "MASTER_PORT": "x"}, "the 2 processes cannot meet (invalid literal"),
        ({**MEETING, "MASTER_PORT": "99999"}, "the 2 processes cannot meet (port must have value"),
    ],
)
def test_wrong_variables_of_torchrun_get_one_line(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"^{re.escape(message)}.* torchrun, which sets them$"):
        Processes.join("cpu")


def test_a_script_reports_wrong_variables_of_torchrun(tmp_path):
    result = run_in({"RANK": "x"}, tmp_path, "train.py --device cpu")
    assert the_error(result).startswith("error: RANK=x in the environment is not a whole number")


@pytest.mark.parametrize("script", ["train.py", "generate.py"])
@pytest.mark.parametrize("chosen", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_waiting_threads_sleep_soon_unless_the_user_has_chosen(tmp_path, script, chosen):
    """The variable is there when torch is imported, which is when OpenMP reads it."""
    finder = "class Finder:\n def find_spec(self, name, path, target=None):\n  if name == 'torch': report()\n"
    report = "import os, sys\ndef report():\n print(os.environ.get('GOMP_SPINCOUNT')); os._exit(0)\n"
    run = f"sys.meta_path.insert(0, Finder())\nsys.argv = [{script!r}]\nimport runpy\n"
    program = f"{report}{finder}{run}runpy.run_path({str(REPOSITORY / script)!r}, run_name='__main__')"
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "GOMP_SPINCOUNT"} | chosen
    result = subprocess.run(
        [sys.executable, "-u", "-c", program], cwd=tmp_path, env={**environment, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=60,
    )  # fmt: skip
    microseconds = TRAINING if script == "train.py" else GENERATION
    default = None if "OMP_WAIT_POLICY" in chosen else str(spin_count(microseconds))
    assert result.stdout.strip() == str(chosen.get("GOMP_SPINCOUNT", default)), result.stderr


def test_a_run_does_not_depend_on_the_environment(toy, tmp_path):
    odd = {"MPLBACKEND": "nonsense", "TZ": "nonsense", "OMP_NUM_THREADS": "x", "TMPDIR": "/nowhere", "HOME": "/proc/no"}
    shape = "--n-layer 1 --n-head 1 --n-embd 16 --block-size 32 --batch-size 2 --eval-tokens 64 --max-steps 1"
    out = ["--out", tmp_path / "x.pt", "--device", "cpu", *shape.split()]
    result = run_in({**odd, **C_LOCALE}, toy, "train.py --data data/toy", *out, preexec_fn=close_standard_streams)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "x_loss.png").read_bytes().startswith(b"\x89PNG")


def close_standard_streams() -> None:
    os.close(0)
    os.close(1)


def test_a_closed_standard_input_is_an_empty_one(toy):
    result = run_in({}, toy, "generate.py", *CHAT, preexec_fn=close_standard_streams)
    assert result.returncode == 0, result.stderr


STARTS = [  # a script, a module that it imports: before it parses flags, while it does, or in `main`
    ("train.py --data none", "filelock"),
    ("train.py --data none", "tyro"),
    ("train.py --data none", "numpy"),
    ("prepare_data.py", "shlex"),
    ("generate.py", "difflib"),
    ("train_sft.py", "filelock"),
    ("train_classifier.py", "filelock"),
    ("classify.py x", "tyro"),
    ("evaluate.py", "tyro"),
    ("export.py --out x", "torch"),
    ("demo.py", "difflib"),
]


@pytest.mark.parametrize(("script", "module"), STARTS)
def test_ctrl_c_while_a_script_starts_ends_it_without_a_traceback(tmp_path, script, module):
    """Ctrl-C comes when the import of the module begins, and would raise KeyboardInterrupt inside of it."""
    name, *arguments = script.split()
    program = (
        "import os, runpy, signal, sys\n"
        "class Finder:\n"
        " def find_spec(self, name, path, target=None):\n"
        f"  if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"sys.argv = {[name, *arguments]!r}\n"
        f"runpy.run_path({str(REPOSITORY / name)!r}, run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={**ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (result.returncode, "Traceback" in result.stderr) == (-signal.SIGINT, False), result.stderr


@pytest.mark.parametrize("script", sorted(SCRIPTS - {"app.py"}))
def test_scripts_find_their_modules_in_isolated_mode(tmp_path, script):
    result = subprocess.run(
        [sys.executable, "-I", REPOSITORY / script, "--help"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True
    )
    assert result.returncode == 0 and b"usage" in result.stdout, result.stderr


TRAIN = "train.py --data data/toy --n-layer 1 --n-head 1 --n-embd 16 --block-size 32 --batch-size 2 --eval-tokens 64"


@pytest.mark.parametrize(
    "lost",
    ["stdout", pytest.param("stderr", marks=pytest.mark.slow), "terminal"],  # a line of progress comes after 30 s
)
def test_a_run_that_loses_its_output_saves_and_says_how_to_go_on(toy, tmp_path, lost):
    out = tmp_path / "a.pt"
    endless = ["--max-steps", "1000000", "--eval-every", "5", "--log-every", "5", "--device", "cpu", "--out", out]
    process = subprocess.Popen(
        command(TRAIN, *endless), cwd=toy, env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"}, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for_log(out.with_suffix(".jsonl"), 5, process)
    if lost == "terminal":
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGHUP)  # from the shell too
    else:
        getattr(process, lost).close()
        setattr(process, lost, None)
    text = "".join(filter(None, process.communicate(timeout=60)))
    assert process.returncode == (0 if lost == "terminal" else 1), text
    step = load_checkpoint(out.with_suffix(".last.pt"))["step"]
    assert step > 0 and "Traceback" not in text and re.search(r"continue with.*--resume", text, re.DOTALL), text
    if lost != "terminal":
        name = {"stdout": "standard output", "stderr": "standard error"}[lost]
        assert f"error: {name}: Broken pipe; the run is saved at step {step:,}: continue with" in text


def test_a_full_output_is_named(tmp_path):
    with open("/dev/full", "w") as full:
        for options in ({"stdout": full}, {"stderr": full}):
            result = run_in({}, tmp_path, "export.py --out x --model x", **options)
            assert result.returncode == 1 and "Traceback" not in (result.stderr or "")
        assert result.stdout == "error: standard output or error: No space left on device\n"


def test_a_deleted_current_folder_gets_one_line(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    code = f"import os, sys; os.rmdir({str(folder)!r}); os.execv(sys.executable, {command('train.py')!r})"
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert "the current folder does not exist any more" in the_error(result)


@pytest.mark.parametrize(
    ("script", "encoding"),
    [
        ("generate.py --model checkpoints/sft.pt --chat", "utf-16"),
        ("evaluate.py --model checkpoints/toy.pt", "utf-16-le"),  # without the mark at its beginning: valid UTF-8
    ],
)
def test_utf_16_on_standard_input_gets_one_line(toy, tmp_path, script, encoding):
    path = tmp_path / "typed.txt"
    path.write_bytes("Hello\nHow are you?\n".encode(encoding))
    with open(path, "rb") as file:
        result = run_in(C_LOCALE, toy, script, "--device", "cpu", stdin=file)
    assert the_error(result).startswith("error: standard input") and "is not UTF-8 text" in the_error(result)


def test_a_chat_in_the_c_locale_saves_what_was_typed(toy, tmp_path):
    """Bytes that are not UTF-8 become U+FFFD; UTF-8 stays what it is."""
    terminal, process_end = pty.openpty()
    process = subprocess.Popen(
        command("generate.py", *CHAT), cwd=toy, env={**ENVIRONMENT, **C_LOCALE, "PYTHONIOENCODING": ""},
        stdin=process_end, stdout=process_end, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(process_end)

    def read_to_the_prompt():
        text = b""
        while not text.endswith(b"you> "):
            assert select.select([terminal], [], [], 60)[0], text
            text += os.read(terminal, 1024)

    for line in ("naïve".encode(), b"caf\xe9 \xff", f"/save {tmp_path / 'talk.jsonl'}".encode(), b"/quit"):
        read_to_the_prompt()
        os.write(terminal, line + b"\n")
    _, stderr = process.communicate(timeout=60)
    os.close(terminal)
    assert process.returncode == 0 and b"Traceback" not in stderr and b"saved 2 exchanges" in stderr, stderr
    messages = json.loads((tmp_path / "talk.jsonl").read_text(encoding="utf-8"))["messages"]
    assert [message["content"] for message in messages[::2]] == ["naïve", "caf\ufffd \ufffd"]
