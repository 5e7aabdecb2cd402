"""Text by strangers: whatever a file to read holds, it costs one line, in little memory, and no control characters."""

import gzip
import json
import os
import pty
import re
import subprocess

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ENVIRONMENT, command, run_script, succeed

import prepare_data
import prepare_sft_data
from interface.terminal import load_conversation, save_conversation
from system.errors import UserError
from system.files import read_utf8_lines
from system.untrusted import printable
from text import readers
from text.conversations import _first
from text.corpora import find_files
from text.readers import MAX_JSON_VALUES, Notes, opened, records
from text.token_files import read_tokens
from text.tokenizer import gpt2

DEEP = "[" * 30_000
MEGABYTES = 400
pytestmark = pytest.mark.usefixtures("bounded_memory")


def chat(i: int, **more: str) -> dict:
    return {"messages": [{"role": "user", "content": f"q{i}", **more}, {"role": "assistant", "content": f"a{i}"}]}


def rows_of(path) -> list:
    with opened(path) as (_, stream):
        return [row for _, row in records(path, stream, ["text"])]


HOSTILE_ROWS = {  # file name: content, the message behind the file's name
    "deep.json": (DEEP, "is not JSON after record 0: it is nested too deeply"),
    "closed.json": (DEEP + DEEP.replace("[", "]"), "is not JSON after record 0: it is nested too deeply"),
    "braces.json": ("[" + '{"a":' * 30_000, "is not JSON after record 0: it is nested too deeply"),
    "second.json": ('[{"text": "a"}, ' + DEEP, "is not JSON after record 1: it is nested too deeply"),
    "deep.jsonl": ('{"text": "a"}\n' + DEEP, "line 2 is not JSON: it is nested too deeply"),
    "deep.jsonl.gz": (DEEP, "line 1 is not JSON: it is nested too deeply"),
    "values.jsonl": ("[" + "[]," * MAX_JSON_VALUES, "line 1 is not JSON: it holds more than 1,048,576 values"),
    "values.json": ("[[" + "0," * 2 * MAX_JSON_VALUES, "is not JSON after record 0: it holds more than 1,048,576"),
    "keys.json": ('[{"text": "a"}, {' + '"":0,' * 2 * MAX_JSON_VALUES, "is not JSON after record 1: it holds more th"),
    "two.json": ('[{"text": "a"}] [{"text": "b"}]', "is not JSON after record 1: text follows the list"),
    "comma.json": ('[{"text": "a"},]', "is not JSON after record 1: Expecting value"),
    "garbage.json": ('[{"text": "a"} x' + " " * 2**21, "is not JSON after record 0: Expecting ',' or ']'"),
    "bytes.json": (b'[{"text": "caf\xe9"}]', "is not JSON after record 0: 'utf-8' codec can't decode"),
    "bytes.jsonl": (b'{"text": "caf\xe9"}', "line 1 is not UTF-8: invalid continuation byte at byte 14"),
    "number.json": ("[" + "9" * 5000 + "]", "is not JSON after record 0: Exceeds the limit"),
    "columns.csv": ("text" + "," * 20_000, "line 1: the row has more than 16,384 columns"),
    "columns.tsv": ("text\n" + "\t" * 20_000, "line 2: the row has more than 16,384 columns"),
}


@pytest.mark.parametrize("name", HOSTILE_ROWS)
def test_hostile_rows_cost_one_line_and_little_memory(tmp_path, name):
    content, message = HOSTILE_ROWS[name]
    write = gzip.open if name.endswith(".gz") else open
    with write(tmp_path / name, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=re.escape(message)) as error:
        rows_of(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)
    if "json" in name:
        with pytest.raises(UserError):
            load_conversation(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "begin", "message"),
    [
        ("a.jsonl.gz", '{"text": "', "line 1 is longer than 100,000 bytes"),
        ("a.json.gz", '[{"text": "', "after record 0: the next one is longer than 100,000 characters"),
        ("b.json.gz", "[ ", "after record 0: the next one is longer than 100,000 characters"),
        ("a.csv.gz", 'text\n"', "line 20001: the row is longer than 100,000 characters"),
        ("b.csv.gz", "", "line 1: the row is longer than 100,000 characters"),
        ("a.tsv.gz", "text\n", "line 2: the row is longer than 100,000 characters"),
    ],
)
def test_an_endless_row_is_not_read_to_its_end(tmp_path, monkeypatch, name, begin, message):
    for limit in ("MAX_JSON_ROW", "MAX_CSV_ROW"):
        monkeypatch.setattr(readers, limit, 100_000)
    filler = (" " if begin == "[ " else "word\n" if '\n"' in begin else "word ").encode() * 1000
    with gzip.open(tmp_path / name, "wb", 1) as file:
        file.write(begin.encode())
        for _ in range(20_000):
            file.write(filler)
    os.truncate(tmp_path / name, (tmp_path / name).stat().st_size // 2)  # whoever reads on finds a damaged file
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path / name)


def test_rows_that_are_only_large_are_read(tmp_path):
    text = '[{,"' * (MAX_JSON_VALUES // 2)  # counts as text, not as values
    rows = [{"text": text}, {"text": "second", "n": [1.5, -3, 12345678901, True, None]}]
    for name, content in {"a.jsonl": "\n".join(map(json.dumps, rows)), "a.json": json.dumps(rows, indent=2)}.items():
        (tmp_path / name).write_text(content)
        assert rows_of(tmp_path / name) == rows
    (tmp_path / "b.csv").write_text('text,other\n"' + "line\n\n" * 300_000 + '",x\n\n\nshort\na,b,extra\n')
    texts = [("line\n\n" * 300_000, "x"), ("short", None), ("a", "b")]
    assert rows_of(tmp_path / "b.csv") == [{"text": a, "other": b} for a, b in texts]


def test_a_json_list_is_read_whatever_the_size_of_its_pieces(tmp_path, monkeypatch):
    rows = [
        12345,
        -1.5e-7,
        'a"b\\',
        "🙂 é",
        [],
        {},
        [[1, 2], {"a": None}],
        True,
        False,
        None,
        "]",
        {"a": "\n"},
    ]
    for text in (
        json.dumps(rows),
        json.dumps(rows, indent=1),
        json.dumps(rows, ensure_ascii=False) + " \n",
        "[]",
        " [ ] ",
    ):
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
        for size in (5, 6, 7, 11, 1000):
            monkeypatch.setattr(readers, "_JSON_CHUNK", size)
            assert rows_of(tmp_path / "a.json") == json.loads(text)


def test_parquet_with_values_that_python_lacks(tmp_path, capsys):
    raw = pa.array([b"caf\xe9 %d" % i for i in range(30)])
    text = pa.Array.from_buffers(pa.string(), 30, raw.buffers())
    days = pa.array([2**31 - 1] * 30, pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"text": text, "day": days}), tmp_path / "a.parquet")
    prepare_data.main(prepare_data.Config(input=(str(tmp_path / "a.parquet"),), out=tmp_path / "data"))
    assert "30 characters or bytes that are not Unicode became U+FFFD, the first in" in capsys.readouterr().out
    with pytest.raises(UserError, match="a.parquet: column 'day' cannot be read: .*days"):
        prepare_data.main(
            prepare_data.Config(input=(str(tmp_path / "a.parquet"),), out=tmp_path / "x", text_column="day")
        )
    with pytest.raises(UserError, match="row 1: no column 'body', but text, day"):
        prepare_data.main(
            prepare_data.Config(input=(str(tmp_path / "a.parquet"),), out=tmp_path / "x", text_column="body")
        )
    pq.write_table(
        pa.table({"instruction": [f"q{i}" for i in range(30)], "output": text, "day": days}), tmp_path / "b.parquet"
    )
    prepare_sft_data.main(prepare_sft_data.Config(input=tmp_path / "b.parquet", out=tmp_path / "sft"))
    assert "30 characters or bytes" in capsys.readouterr().out


def test_names_that_are_not_utf8_cost_nothing(tmp_path):
    (tmp_path / "books").mkdir()
    with open(os.fsencode(tmp_path) + b"/books/caf\xe9.txt", "wb") as file:
        file.write(b"\xff one of many texts" * 100)
    stdout = succeed(tmp_path, "prepare_data.py", "--input", "books/caf\udce9.txt", "--out", "d\udce9")
    assert "1 documents" not in stdout and "caf?.txt" in stdout
    [meta] = (json.loads(path.read_text()) for path in tmp_path.glob("d*/meta.json"))
    assert os.fsencode(meta["source"][0]) == b"books/caf\xe9.txt"
    succeed(tmp_path, "prepare_data.py", "--inspect", "d\udce9")
    with open(os.fsencode(tmp_path) + b"/chat\xe9.jsonl", "w") as file:
        file.writelines(json.dumps(chat(i)) + "\n" for i in range(3))
    succeed(tmp_path, "prepare_sft_data.py", "--input", "chat\udce9.jsonl", "--out", "sft")


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_lone_surrogates_are_replaced_in_conversations(tmp_path, capsys, suffix):
    rows = [chat(i, name="\udfff") for i in range(3)] + [chat(4)]
    for row in rows[:3]:
        row["messages"][1]["content"] += " \ud800"
    path = tmp_path / f"chat.{suffix}"
    path.write_text(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    prepare_sft_data.main(prepare_sft_data.Config(input=path, out=tmp_path / "data"))
    assert "3 characters or bytes that are not Unicode became U+FFFD" in capsys.readouterr().out
    messages = load_conversation(path)
    assert messages == [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0 \ufffd"}]
    save_conversation(tmp_path / "saved.jsonl", messages)
    assert load_conversation(tmp_path / "saved.jsonl") == messages


@pytest.mark.parametrize("content", [DEEP, "x" * 2**25, "[[]]"], ids=["deep", "long", "another"])
def test_saving_to_a_hostile_file_keeps_it(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match="not the beginning of this conversation"):
        save_conversation(tmp_path / "a.jsonl", chat(0)["messages"])
    assert (tmp_path / "a.jsonl").read_text() == content


def test_a_device_is_no_file_to_save_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not the beginning of this conversation"):
        save_conversation(tmp_path / "pipe", chat(0)["messages"])


def test_repeated_conversations_are_dropped_and_counted(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(chat(i)) for i in (1, 2, 1, 3, 1, 2)))
    prepare_sft_data.main(prepare_sft_data.Config(input=tmp_path / "a.jsonl", out=tmp_path / "data", val_fraction=0.05))
    where = f"the first in {tmp_path}/a.jsonl, line 3"
    assert f"3 conversations that repeat another one were dropped, {where}" in capsys.readouterr().out
    splits = json.loads((tmp_path / "data/sft_meta.json").read_text())["splits"]
    assert {name: counts["conversations"] for name, counts in splits.items()} == {"train": 2, "val": 1}


@pytest.mark.parametrize("which", ["no conversation to train on", "no conversation is left to validate with"])
def test_a_split_without_conversations_is_refused(tmp_path, which):
    rows = [chat(0), chat(1)]  # the seed draws which of the two is held out
    rows[0 if "train" in which else 1]["messages"][1]["content"] = "long " * 3000
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=rf"{which}.* \(1 conversations longer than 1,024 tokens"):
        prepare_sft_data.main(
            prepare_sft_data.Config(input=tmp_path / "a.jsonl", out=tmp_path / "d", val_fraction=0.05)
        )
    assert not list(tmp_path.glob("d/*"))


def test_the_first_conversations_come_from_both_splits():
    pairs = [("train", [i]) for i in range(50)] + [("val", [i]) for i in range(50)]
    assert [split for split, _ in _first(pairs, 40, 0.05)] == ["train"] * 38 + ["val"] * 2
    assert list(_first(pairs, 2, 0.05)) == [pairs[0], pairs[50]] and list(_first(pairs, None, 0.05)) == pairs


def test_a_name_that_exists_is_no_glob(tmp_path):
    for name in ("a[1].txt", "a1.txt", "b[1]/c.txt", "b1/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for pattern, found in {"a[1].txt": ["a[1].txt"], "b[1]": ["b[1]/c.txt"], "a?.txt": ["a1.txt"]}.items():
        assert find_files([str(tmp_path / pattern)]) == [tmp_path / name for name in found]


def test_control_characters_become_escapes():
    assert printable("a\tb\nc é 日 🙂") == "a\tb\nc é 日 🙂"
    assert printable("\x1b[2J\a\r\0\x7f\x9b\u202e\u2066\udce9") == r"\x1b[2J\x07\r\x00\x7f\x9b\u202e\u2066\udce9"


EVIL = "\x1b[31m\a\x9b2J\u202e"


@pytest.mark.parametrize(
    "arguments",
    [
        ["prepare_data.py", "--input", "evil.csv"],
        ["prepare_data.py", "--input", "evil.jsonl"],
        ["prepare_data.py", "--input", f"{EVIL}.jsonl"],
        ["prepare_data.py", f"--{EVIL}"],
        ["prepare_data.py", "--input", "evil.csv", "--text-column", EVIL],
        ["prepare_sft_data.py", "--input", "evil.jsonl"],
    ],
)
def test_an_error_message_has_no_control_characters(tmp_path, arguments):
    (tmp_path / "evil.csv").write_text(f"a{EVIL}\n1\n", encoding="utf-8")
    (tmp_path / "evil.jsonl").write_text(json.dumps({f"a{EVIL}": 1}))
    result = run_script(tmp_path, *arguments)
    assert result.returncode in (1, 2) and "error: " in result.stderr and "Traceback" not in result.stderr
    assert not set(EVIL) - set("[312mJ") & set(result.stdout + result.stderr)


def on_a_terminal(folder, *arguments) -> str:
    """Returns what a script writes to standard output, a terminal."""
    terminal, process_end = pty.openpty()
    process = subprocess.Popen(
        command(*arguments), cwd=folder, env=ENVIRONMENT, stdout=process_end, stderr=subprocess.PIPE
    )
    os.close(process_end)
    output = b""
    try:
        while piece := os.read(terminal, 1000):
            output += piece
    except OSError:  # the process has closed its end
        pass
    os.close(terminal)
    assert process.communicate()[1].splitlines()[1:] is not None and process.returncode == 0
    return output.decode()


def test_text_reaches_a_terminal_without_control_characters_and_a_pipe_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_text(f"{EVIL} évil\t🙂\n" * 100, encoding="utf-8")
    prepare_data.main(prepare_data.Config(input=(str(tmp_path / "a.txt"),), out=tmp_path / "data"))
    shown = on_a_terminal(tmp_path, "prepare_data.py", "--inspect", "data")
    assert r"\x1b[31m\x07\x9b2J\u202e évil 🙂 \x1b" in shown and "\r\nthe training text begins: " in shown
    assert not set(EVIL) - set("[312mJ") & set(shown)
    assert f"{EVIL} évil 🙂 {EVIL} " in succeed(tmp_path, "prepare_data.py", "--inspect", "data")


@pytest.mark.parametrize(
    ("digits", "script", "message"),
    [
        (20, "generate.py --num-samples", "--num-samples must be below 2^40"),
        (30, "prepare_sft_data.py --max-conversations", "--max-conversations must be below 2^40"),
        (5000, "generate.py --num-samples", "--num-samples must be below 2^63 (see --help)"),
        (5000, "prepare_data.py --max-tokens", f"--max-tokens takes a whole number, not '{'9' * 59}…' (see --help)"),
    ],
)
def test_a_number_with_too_many_digits_is_refused(tmp_path, digits, script, message):
    result = run_script(tmp_path, script, "9" * digits)
    assert (result.returncode, result.stderr) == (2, f"error: {message}\n")


def test_a_line_without_end_is_refused(tmp_path):
    with pytest.raises(UserError, match="/dev/zero, line 1 is longer than 16,777,216 bytes"):
        next(read_utf8_lines("/dev/zero"))
    result = subprocess.run(
        [*command("generate.py", "--model", "none.pt")], cwd=tmp_path, env=ENVIRONMENT, stdin=subprocess.DEVNULL,
        capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert result.stderr.splitlines()[-1].startswith("error: no checkpoint")


def test_notes_about_a_hostile_file_are_few():
    notes = Notes()
    for i in range(1000):
        notes.add(f"roles like {i}", f"row {i}")
    assert len(notes.lines()) == 51 and notes["other problems were found"] == (950, "row 50")
    assert sum(number for number, _ in notes.values()) == 1000


def test_text_of_the_tokens_is_that_of_the_rows(tmp_path):
    rows = [{"text": f"row {i} \ud800"} for i in range(30)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    prepare_data.main(prepare_data.Config(input=(str(tmp_path / "a.json"),), out=tmp_path / "data"))
    text = gpt2().decode(read_tokens(tmp_path / "data/train.bin").tolist())
    assert text.count(" \ufffd") == 30 - 3 and "\ud800" not in text
