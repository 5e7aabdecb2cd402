"""Conversations: from chats, tables and the Hub to tokens and loss masks; what is held out, joined and dropped."""

import gzip
import json
import re

import pytest
from conftest import run_script

from prepare_sft_data import Config, main
from system.errors import UserError
from text.conversations import COLUMNS, check_messages, oasst1_conversations, open_conversations, usable
from text.sources import Notes, read_rows
from text.token_files import read_tokens
from text.tokenizer import gpt2


def turn(role: str, content: object = "x") -> dict:
    return {"role": role, "content": content}


def chat(*texts: object) -> dict:
    return {"messages": [turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]}


def prepare(folder, rows=(), **options) -> tuple[dict[str, int], dict[str, str]]:
    """Prepares conversations; returns how many each split has, and its text."""
    if rows:
        options["input"] = str(folder / "a.jsonl")
        (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    main(Config(out=folder / "data", overwrite=True, **options))
    splits = json.loads((folder / "data/sft_meta.json").read_text())["splits"]
    texts = {name: gpt2().decode(read_tokens(folder / f"data/sft_{name}.bin").tolist()) for name in splits}
    return {name: counts["conversations"] for name, counts in splits.items()}, texts


def oasst1_row(id_, parent, role, text, rank=None, spam=0.0, **more):
    """Returns a message with the columns of OpenAssistant's data set that matter, and some others."""
    return {
        "message_id": id_, "parent_id": parent, "created_date": "2023-02-05T14:23:50", "text": text, "role": role,
        "lang": "en", "review_count": 3, "deleted": False, "rank": rank, "message_tree_id": id_[0],
        "labels": {"name": ["spam", "quality"], "value": [spam, 0.7], "count": [3, 3]},
        **more,
    }  # fmt: skip


OASST1 = [
    oasst1_row("a", None, "prompter", "Q"),
    oasst1_row("a1", "a", "assistant", "worse", 1),
    oasst1_row("a2", "a", "assistant", "best", 0),
    oasst1_row("a3", "a2", "prompter", "Q2"),
    oasst1_row("a4", "a3", "assistant", "A2", 0, labels=None),
    oasst1_row("a5", "a2", "prompter", "no answer"),
    oasst1_row("a6", "a2", "prompter", "gone", deleted=True),
    oasst1_row("b", None, "prompter", "Hola", lang="es"),
    oasst1_row("c", None, "prompter", "Buy now", spam=0.5),
    oasst1_row("d", None, "prompter", "D?"),
    oasst1_row("d1", "d", "assistant", "advertisement", 0, spam=0.9),
    oasst1_row("d2", "d", "assistant", "D.", 1, spam=0.49),
]


def test_oasst1_conversations_follow_the_best_reply_that_is_not_spam():
    notes, rows = Notes(), [(row["message_id"], row) for row in OASST1]
    found = [[message["content"] for message in messages] for messages in oasst1_conversations(rows, notes)]
    assert found == [["Q", "best", "Q2", "A2"], ["D?", "D."]]
    assert notes.lines()[0] == "3 messages that were deleted or marked as spam were left out, the first in a6"
    assert "1 answers that reviewers ranked below another one were left out, the first in a1" in notes.lines()


def test_oasst1_keeps_its_own_split(hub, tmp_path):
    keys = ("message_id", "parent_id", "text")
    trees = [[{**row, **{key: row[key] and f"{row[key]}-{i}" for key in keys}} for row in OASST1] for i in range(60)]
    hub("OpenAssistant/oasst1/data/train-00000.parquet", sum(trees[:30], []))
    hub("OpenAssistant/oasst1/data/validation-00000.parquet", sum(trees[30:], []))
    counts, texts = prepare(tmp_path)
    questions = {split: set(re.findall(r"<\|user\|> D\?-(\d+)<", text)) for split, text in texts.items()}
    assert questions == {"train": set(map(str, range(30))), "val": set(map(str, range(30, 60)))}
    assert counts == {"train": 60, "val": 60}
    assert prepare(tmp_path, max_conversations=40)[0] == {"train": 38, "val": 2}


def test_alpaca_gpt4_gives_instructions_with_inputs(hub, tmp_path):
    rows = [{"instruction": f"Add {i}.", "input": "1 and" * (i % 2), "output": f"={i}", "text": "…"} for i in range(40)]
    hub("vicgalle/alpaca-gpt4/data/train-00000-of-00001.parquet", rows)
    counts, texts = prepare(tmp_path, dataset="alpaca-gpt4", template="alpaca", val_fraction=0.05)
    text = "".join(texts.values())
    assert "### Instruction:\nAdd 7.\n\n### Input:\n1 and\n\n### Response:\n=7<|endoftext|>" in text
    assert sum(counts.values()) == 40


@pytest.mark.parametrize(
    "columns", [("question", "answer"), ("prompt", "response"), ("prompt", "completion"), ("instruction", "output")]
)
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl.gz"])
def test_a_table_of_questions_and_answers_becomes_conversations(tmp_path, columns, name):
    rows = [dict(zip(("id", *columns), (str(i), f"What is {i},\u2028 really?", "yes"), strict=True)) for i in (1, 2)]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if name == "a.csv":
        table = [list(rows[0]), *(row.values() for row in rows)]
        content = "".join('"' + '","'.join(fields) + '"\n' for fields in table).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert list(usable(read_rows(str(tmp_path / name), COLUMNS), Notes())) == [
        [{**turn("user", f"What is {i},\u2028 really?"), "input": ""}, turn("assistant", "yes")] for i in (1, 2)
    ]


@pytest.mark.parametrize(
    ("n", "val_fraction", "n_train", "n_val"),
    [(99, None, 99 + 15 * (99 + 50 + 33), 99), (100, None, 95, 5), (200, 0, 200, 200), (5, 0.1, 4, 1)],
)
def test_of_few_conversations_none_is_held_out(tmp_path, capsys, n, val_fraction, n_train, n_val):
    counts, _ = prepare(tmp_path, [{"prompt": str(i), "response": "yes"} for i in range(n)], val_fraction=val_fraction)
    meta = json.loads((tmp_path / "data/sft_meta.json").read_text())
    assert counts == {"train": n_train, "val": n_val}
    assert meta["is_held_out"] == (n_val < n) == ("all conversations are trained on" not in capsys.readouterr().out)


def test_few_conversations_of_one_exchange_are_also_trained_as_people_type_them_and_joined(tmp_path):
    def questions(*rows, joins=True):
        """The first letters of the questions of each conversation, by split."""
        (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pairs, is_held_out = open_conversations("", str(tmp_path / "chats.jsonl"), None, None, 1, Notes(), joins=joins)
        found = {"train": [], "val": []}
        for split, messages in pairs:
            found[split].append("".join(message["content"] for message in messages[::2]))
        assert not is_held_out
        return found

    three, longer = [chat(name, "yes") for name in "abc"], chat("c", "yes", "d", "yes")
    sentence = chat("Is this A?", "yes")
    assert questions(*three, joins=False) == {"train": ["a", "b", "c"], "val": ["a", "b", "c"]}
    found = questions(*three)
    assert found["val"] == found["train"][:3] == ["a", "b", "c"]
    assert sorted(map(len, found["train"][3:])) == 60 * [1] + 15 * [2] + 15 * [3]  # of two, one is left over
    assert sorted("".join(found["train"][3:])) == sorted("abc" * 45)
    typed = questions(three[0], sentence)["train"][2:]
    assert any("is this A?" in text for text in typed) and any("Thanks!" in text for text in typed)
    mixed = questions(*three[:2], longer)  # somebody asks twice already
    assert mixed["val"] == ["a", "b", "cd"] and all(set(joined) <= {"a", "b"} for joined in mixed["train"][3:])
    assert len(questions(three[0], longer)["train"]) == 2


def test_conversations_are_brought_into_one_form():
    notes = Notes()
    assert check_messages([turn("system", "Be kind."), *chat("x", "y")["messages"]], "f", notes) == [
        turn("user", "Be kind.\n\nx"),
        turn("assistant", "y"),
    ]
    assert not notes
    two = [turn("user"), turn("assistant")]
    assert check_messages([*two, turn("user")], "f", notes) == two and len(notes) == 1
    for bad in ("text", 3, [turn("user"), "text"], [{"role": "user"}], [turn("user", 1)], [turn(["user"])]):
        with pytest.raises(UserError, match="f: expected messages"):
            check_messages(bad, "f", notes)


def test_unusable_conversations_are_dropped_and_counted_by_reason():
    bad = {
        "without an answer": [[], [turn("user")], [turn("user"), turn("user")]],
        "do not take turns": [
            [turn("assistant"), turn("user")],
            [turn("user"), turn("user"), turn("assistant")],
            [turn("user"), turn("assistant"), turn("system"), turn("assistant")],
        ],
        "a role other than": [[turn("user"), turn("tool"), turn("assistant")]],
        "an empty turn": [[turn("user"), turn("assistant", " ")], [turn("user", None), turn("assistant")]],
    }
    rows = [{"messages": messages} for group in bad.values() for messages in group]
    rows[2:2] = [{"instruction": "Say hello.", "output": "Hello."}, {"instruction": "Say nothing.", "output": ""}]
    notes = Notes()
    kept = list(usable(((f"row {i}", row) for i, row in enumerate(rows)), notes))
    assert [[message["content"] for message in messages] for messages in kept] == [["Say hello.", "Hello."]]
    found = {reason: next(count for what, count in notes.items() if reason in what) for reason in bad}
    assert list(found.values()) == [(3, "row 0"), (3, "row 5"), (1, "row 8"), (3, "row 3")]
    with pytest.raises(UserError, match=r"row 1: expected `messages`, .* not colour"):
        list(usable([("row 1", {"colour": "blue"})], notes))


def test_repeated_conversations_and_lone_surrogates_are_counted(tmp_path, capsys):
    rows = [chat(f"q{i}", "a \ud800") for i in (1, 2, 1, 3, 1, 2)]
    counts, texts = prepare(tmp_path, rows, val_fraction=0.05)
    out = capsys.readouterr().out
    assert f"3 conversations that repeat another one were dropped, the first in {tmp_path}/a.jsonl, line 3" in out
    assert "6 characters or bytes that are not Unicode became U+FFFD" in out and "a \ufffd" in texts["val"]
    assert counts == {"train": 2, "val": 1}


@pytest.mark.parametrize("which", ["no conversation is left for train", "no conversation is left for val"])
def test_a_split_without_conversations_is_refused(tmp_path, which):
    rows = [chat("q0", "a0"), chat("q1", "a1")]  # the seed draws which of the two is held out
    rows[0 if "train" in which else 1]["messages"][1]["content"] = "long " * 3000
    with pytest.raises(UserError, match=rf"{which}.* \(1 conversations longer than 1,024 tokens"):
        prepare(tmp_path, rows, val_fraction=0.05)
    assert not list(tmp_path.glob("data/*"))


def test_a_missing_file_is_one_line_without_secrets(tmp_path):
    url = "http://ann:secret@127.0.0.1:9/a.jsonl?t0ken"
    for name in ("none.jsonl", url):
        result = run_script(tmp_path, "prepare_sft_data.py", "--input", name)
        assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith("error: cannot read ")
        assert "secret" not in result.stderr and "t0ken" not in result.stderr
