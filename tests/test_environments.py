"""Odd environments: narrow terminals, other locales, wrong variables, closed streams. No traceback, no hang."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, REPOSITORY, command

from system.errors import UserError
from system.threads import GENERATION, TRAINING, spin_count
from training.distributed import Processes

C_LOCALE = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TERM": "dumb"}
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
    ],
)
def test_wrong_variables_of_torchrun_get_one_line(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"^{message}.* torchrun, which sets them$"):
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
