"""Corpora, splits, files and meta files; the loader's batches."""

import json
import os
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from text.corpora import Texts, draw_held_out, hold_out
from text.readers import Notes

from system.errors import UserError
from system.files import atomic_folder, atomic_write, read_utf8, read_utf8_lines
from text import lessons, pydocs
from text.conversations import read_file
from text.token_files import read_tokens, require_ids_below
from training.loader import Batch, Conversations, Prefetcher, Windows, micro_batches, stack


@pytest.fixture(scope="module")
def entries():
    return list(pydocs.entries())


@pytest.mark.slow
def test_pydocs_is_a_corpus_of_unique_public_names_and_texts(entries):
    assert sum(len(entry.docstring) for entry in entries) > 1_500_000
    assert len({entry.docstring for entry in entries}) == len(entries)
    names = {entry.name for entry in entries}
    assert {
        "os.path.join",
        "json.JSONDecoder",
        "collections.abc.Mapping.get",
        "unittest.TestCase.assertEqual",
        "str.split",
    } <= names
    assert not any(name.startswith(("posixpath", "ntpath", "_", "test.")) for name in names)


def test_pydocs_entries_have_one_answer_each():
    pairs = [(entry.name, answer) for entry, answer in pydocs.answers(builtins_only=True)]
    assert len(pairs) > 300 and len(dict(pairs)) == len(pairs)
    answers = dict(pairs)
    assert answers["len"] == "Return the number of items in a container."
    assert answers["KeyError"] == "Mapping key not found."
    assert all(re.fullmatch(r"[A-Z].* .*\.", answer) and "\n" not in answer for answer in answers.values())


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("join(a, *p)\n\nJoin two or\n   more paths.  More.", "Join two or more paths."),
        ("len(obj, /) -> int\n\nReturn the length, e.g. of a list. Done.", "Return the length, e.g. of a list."),
        (">>> f(1)\n2", None),
        ("A list of:\n", None),
        ("", None),
        ("x", None),
    ],
)
def test_first_sentence(docstring, sentence):
    assert pydocs.first_sentence(docstring) == sentence


def as_heard(question: str) -> str:
    """Without what `as_typed` may change."""
    return question.lower().replace("'", "").rstrip("?.!")


@pytest.fixture(scope="module")
def all_lessons():
    return list(lessons.lessons(builtins_only=True))


def test_bundled_conversations_are_in_order(all_lessons):
    conversations = list(read_file(REPOSITORY / "data/samples/chat.jsonl", Notes()))
    bundled = [lesson for lesson in all_lessons if lesson.conversation in conversations]
    assert len(conversations) >= 350 and [lesson.conversation for lesson in bundled] == conversations
    assert sum(len(messages) > 2 for messages in conversations) >= 30
    assert conversations[0] == [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is Paris."},
    ]
    wordings = [as_heard(wording) for lesson in bundled for wording in lesson.taught + lesson.held_out]
    assert max(Counter(wordings).values()) == 1  # none asks for two answers
    assert min(len(lesson.taught) for lesson in bundled) >= 4 and {len(lesson.held_out) for lesson in bundled} == {2}


def test_each_builtin_is_asked_for_by_its_name_in_many_words(all_lessons):
    names = {f"What is {entry.name}?": entry.name for entry, _ in pydocs.answers(builtins_only=True)}
    of_builtins = {names[lesson.taught[0]]: lesson for lesson in all_lessons if lesson.taught[0] in names}
    assert of_builtins.keys() == set(names.values())
    for name, lesson in of_builtins.items():
        assert all(name in wording for wording in lesson.taught + lesson.held_out)
        assert len({as_heard(wording) for wording in lesson.taught}) >= 30 and len(lesson.held_out) == 2
    assert "Explain len." in of_builtins["len"].taught


def test_each_beginning_of_the_lessons_has_small_talk_and_functions(all_lessons):
    first = [lesson.taught[0] for lesson in all_lessons[:73]]  # a tenth: what the demo teaches on a slow machine
    assert {"What is the capital of France?", "What is a built-in?", "Hello", "Hi", "Thanks!", "How are you?"} <= set(
        first
    )
    assert {"What is abs?", "What is len?"} <= set(first)


def test_no_held_out_wording_is_trained_on(all_lessons):
    split = list(lessons.conversations(all_lessons, seed=1))
    taught = {as_heard(m["content"]) for name, messages in split if name == "train" for m in messages[::2]}
    asked = [as_heard(messages[0]["content"]) for name, messages in split if name == "val"]
    assert asked == [as_heard(wording) for lesson in all_lessons for wording in lesson.held_out]
    assert not taught & set(asked)


def test_lessons_come_in_many_wordings_alone_and_joined(all_lessons):
    train = [messages for name, messages in lessons.conversations(all_lessons, seed=1) if name == "train"]
    wordings = {
        m["content"]
        for messages in train
        for m, a in zip(messages[::2], messages[1::2], strict=True)
        if a["content"] == "Return the number of items in a container."
    }
    assert (
        len(wordings) >= 15 and any(w.islower() for w in wordings) and not all(w.endswith(("?", ".")) for w in wordings)
    )
    assert all(m["role"] == ("user", "assistant")[i % 2] for messages in train for i, m in enumerate(messages))
    assert {2, 4, 6} <= {len(messages) for messages in train}
    assert next(lessons.conversations(all_lessons, seed=1)) != next(lessons.conversations(all_lessons, seed=2))


def test_whole_documents_are_held_out():
    documents = [f"document {i}" for i in range(1000)]

    def held_out(seed):
        return [(name, text) for name, text, _ in hold_out(Texts(documents), 0.05, seed)]

    split = held_out(seed=1)
    assert [text for _, text in split] == documents
    assert Counter(name for name, _ in split) == {"train": 950, "val": 50}
    assert split == held_out(seed=1) != held_out(seed=2)
    assert all(any(name == "val" for name, _ in draw_held_out(range(20), 0.01, seed)) for seed in range(50))


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path, "w") as file:
        file.write("new")
        raise RuntimeError
    with pytest.raises(RuntimeError), atomic_folder(tmp_path, last="file") as folder:
        (folder / "file").write_text("new")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_later_write_removes_what_a_killed_write_left_behind(tmp_path):
    for name, age in ((".file.1.tmp", 7200), (".file.2.tmp", 60)):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with atomic_write(tmp_path / "file", "w") as file:
        file.write("new")
    assert {path.name for path in tmp_path.iterdir()} == {"file", ".file.2.tmp"}


def test_only_utf_8_is_read(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("naïve\r\n日本\n".encode())
    assert read_utf8(path) == "naïve\r\n日本\n" and list(read_utf8_lines(path)) == ["naïve", "日本"]
    path.write_bytes(b"one\ntwo\ncaf\xe9\n")
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8"):
        read_utf8(path)
    with pytest.raises(UserError, match=r"a\.txt, line 3 is not UTF-8"):
        list(read_utf8_lines(path))
    for unreadable in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(UserError, match=f"cannot read {unreadable}: "):
            read_utf8(unreadable)


def test_llm_c_shards_are_read(tmp_path):
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, 7
    (tmp_path / "s.bin").write_bytes(header.tobytes() + np.arange(7, dtype="<u2").tobytes())
    assert read_tokens(tmp_path / "s.bin").tolist() == list(range(7))
    (tmp_path / "s.bin").write_bytes(header.tobytes() + np.arange(6, dtype="<u2").tobytes())
    with pytest.raises(UserError, match="damaged"):
        read_tokens(tmp_path / "s.bin")
    for magic, version in ((20240801, 7), (20240520, 2)):  # Llama's 32-bit tokens, a future version
        header[:2] = magic, version
        (tmp_path / "s.bin").write_bytes(header.tobytes() + bytes(28))
        with pytest.raises(UserError, match="another kind"):
            read_tokens(tmp_path / "s.bin")
    (tmp_path / "s.bin").write_bytes(b"odd")
    with pytest.raises(UserError, match="damaged"):
        read_tokens(tmp_path / "s.bin")


def test_ids_outside_a_vocabulary_are_named_with_their_place(monkeypatch):
    monkeypatch.setattr("text.token_files._SLICE", 4)
    ids = np.array([1, 2, 3, 4, 5, 6, 9, 7, 8], dtype=np.uint16)
    require_ids_below(ids, 10, "a.bin", "do something")
    require_ids_below(ids[:0], 1, "a.bin", "do something")
    for offset, place in ((0, "6"), (1000, "1,006")):
        message = rf"a\.bin holds the id 9 \(token {place}\), .* vocabulary of 9 does not have: do something"
        with pytest.raises(UserError, match=message):
            require_ids_below(ids, 9, "a.bin", "do something", offset)


def test_meta_json_describes_the_token_files(toy):
    meta = json.loads((toy / "data/toy/meta.json").read_text())
    for split in ("train", "val"):
        assert len(read_tokens(toy / f"data/toy/{split}.bin")) == meta["splits"][split]["tokens"] > 0
    assert meta["files"] == ["train.bin", "val.bin", "tokenizer.json"]
    text = sum(len(path.read_bytes()) for path in (toy / "text").iterdir())
    assert sum(split["bytes"] for split in meta["splits"].values()) == text
