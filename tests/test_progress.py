"""Progress: a bar on a terminal, plain lines in a log file, and nothing that a variable of tqdm can break."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
from test_environments import run_in

from system import progress
from system.progress import Progress, with_progress
from system.wording import duration, shorten


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture()
def clock(monkeypatch) -> list[float]:
    """The time in seconds that `Progress` reads, in a list of one."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def shown(stream: io.StringIO, clock: list[float], monkeypatch) -> str:
    """What a job of 200 steps, 50 of them done by an earlier run, writes to a stream. A step takes a second."""
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(200, done=50) as job:
        for step in range(51, 201):
            clock[0] += 1
            job.show(step, f"step {step} of 200")
    return stream.getvalue()


def test_a_log_file_gets_a_plain_line_every_30_seconds(clock, monkeypatch):
    assert shown(io.StringIO(), clock, monkeypatch).splitlines() == [
        "40%: step 80 of 200, 2 min 0 s left",
        "55%: step 110 of 200, 1 min 30 s left",
        "70%: step 140 of 200, 1 min 0 s left",
        "85%: step 170 of 200, 30 s left",
        "100%: step 200 of 200, 0.0 s left",
    ]


@pytest.mark.parametrize("columns", [20, 60, 200])
def test_a_terminal_gets_a_bar_that_fits_into_it_and_is_gone_at_the_end(clock, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    drawn = shown(Terminal(), clock, monkeypatch).split("\r")
    assert "\n" not in "".join(drawn) and max(map(len, drawn)) < columns
    bars = [line for line in drawn if line.strip()]
    assert len(bars) == 150 and bars[0].startswith(" 26% ") and not drawn[-1]
    assert not drawn[-2].strip() and len(drawn[-2]) == len(bars[-1])
    hashes = [line.count("#") for line in bars]
    assert hashes[-1] == {20: 0, 60: 24, 200: 30}[columns] and (columns == 60 or hashes == sorted(hashes))


def test_a_line_can_be_printed_where_the_bar_was(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    job = Progress(None)
    clock[0] = 1
    job.show(7, "7 documents")
    job.clear()
    job.clear()
    assert re.fullmatch(r" +7 documents\r +\r", sys.stderr.getvalue())


def test_items_pass_through(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())

    def items():
        for i in range(4):
            clock[0] += 20
            yield i

    assert list(with_progress(items(), 4, "questions")) == [0, 1, 2, 3]
    assert sys.stderr.getvalue() == "50%: 2 of 4 questions, 40 s left\n100%: 4 of 4 questions, 0.0 s left\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"), (4.24, "4.2 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 0 s"),
        (125, "2 min 5 s"), (3599.4, "59 min 59 s"), (3599.6, "1 h 0 min"), (11_520, "3 h 12 min"),
        (86_399, "1 d 0 h"), (187_200, "2 d 4 h"), (1e8, "1,157 d 10 h"),
    ],
)  # fmt: skip
def test_a_time_has_units(seconds, text):
    assert duration(seconds) == text


def test_a_text_is_cut_to_one_line():
    assert shorten("a\n b\tc", 5) == "a b c" and shorten("a\n b\tc", 4) == "a b…"


def test_training_into_a_pipe_writes_no_control_characters_whatever_tqdm_is_told(tmp_path: Path):
    (tmp_path / "my.txt").write_text("Once upon a time there was a test. " * 300, encoding="utf-8")
    result = run_in(
        {"TQDM_MININTERVAL": "x"}, tmp_path, "train.py --data my.txt --out a.pt --max-steps 2 --n-layer 1 --n-head 1",
        "--n-embd", 16, "--block-size", 16, "--batch-size", 2, "--device", "cpu", "--vocab-size", 270,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "done at step 2" in result.stdout and "\r" not in result.stdout + result.stderr
    (said,) = result.stderr.splitlines()
    assert said.startswith("train.py: preset gpt2, ") and "n_layer=1" in said and "learning_rate" not in said
    before = result.stdout.partition("token embedding")[0].splitlines()
    assert len(before) <= 5 and not any("Once" in line for line in before)
    assert re.search(r"^10,500 characters became [\d,]+ tokens: ", "\n".join(before), re.MULTILINE)


def test_a_wrong_variable_of_tqdm_does_not_reach_the_hub(tmp_path: Path):
    result = run_in({"TQDM_MININTERVAL": "x"}, tmp_path, "prepare_data.py --dataset org/none --out data")
    assert result.returncode == 1 and "Traceback" not in result.stderr and "Hub" in result.stderr.splitlines()[-1]
