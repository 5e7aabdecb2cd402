"""Python's documentation, lessons, and the files on the disk: which split they belong to, what is damaged."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from conftest import REPOSITORY

from gpt_config import GPTConfig
from system.errors import UserError
from system.files import atomic_folder, atomic_write, read_utf8, read_utf8_lines
from text import lessons, pydocs
from text.conversations import COLUMNS, usable
from text.sources import Notes, read_rows
from text.token_files import files_by_split, read_token_meta, read_tokens, require_ids_below
from training.loader import Windows


@pytest.mark.slow
def test_pydocs_is_a_corpus_of_unique_public_names_and_texts():
    entries = list(pydocs.entries())
    assert sum(len(entry.docstring) for entry in entries) > 1_500_000
    assert len({entry.docstring for entry in entries}) == len(entries)
    names = {entry.name for entry in entries}
    public = "os.path.join json.JSONDecoder collections.abc.Mapping.get unittest.TestCase.assertEqual str.split"
    assert set(public.split()) <= names
    assert not any(name.startswith(("posixpath", "ntpath", "_", "test.")) for name in names)


def test_pydocs_entries_have_one_answer_each():
    pairs = [(entry.name, answer) for entry, answer in pydocs.answers(builtins_only=True)]
    answers = dict(pairs)
    assert len(pairs) > 300 and len(answers) == len(pairs)
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
    conversations = list(usable(read_rows(str(REPOSITORY / "data/samples/chat.jsonl"), COLUMNS), Notes()))
    bundled = [lesson for lesson in all_lessons if lesson.conversation in conversations]
    assert len(conversations) >= 350 and [lesson.conversation for lesson in bundled] == conversations
    assert sum(len(messages) > 2 for messages in conversations) >= 30
    assert conversations[0] == [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is Paris."},
    ]
    paraphrases = [as_heard(question) for lesson in bundled for question in lesson.taught + lesson.held_out]
    assert max(Counter(paraphrases).values()) == 1  # none asks for two answers
    assert min(len(lesson.taught) for lesson in bundled) >= 4 and {len(lesson.held_out) for lesson in bundled} == {2}


def test_each_builtin_is_asked_for_by_its_name_in_many_words(all_lessons):
    names = {f"What is {entry.name}?": entry.name for entry, _ in pydocs.answers(builtins_only=True)}
    of_builtins = {names[lesson.taught[0]]: lesson for lesson in all_lessons if lesson.taught[0] in names}
    assert of_builtins.keys() == set(names.values())
    for name, lesson in of_builtins.items():
        assert all(name in question for question in lesson.taught + lesson.held_out)
        assert len({as_heard(question) for question in lesson.taught}) >= 30 and len(lesson.held_out) == 2
    assert "Explain len." in of_builtins["len"].taught


def test_each_beginning_of_the_lessons_has_small_talk_and_functions(all_lessons):
    first = {lesson.taught[0] for lesson in all_lessons[:73]}  # a tenth: what the demo teaches on a slow machine
    assert {"What is the capital of France?", "What is a built-in?", "Hello", "Thanks!", "How are you?"} <= first
    assert {"What is abs?", "What is len?"} <= first


def test_no_held_out_paraphrase_is_trained_on(all_lessons):
    split = list(lessons.conversations(all_lessons, seed=1))
    taught = {as_heard(m["content"]) for name, messages in split if name == "train" for m in messages[::2]}
    asked = [as_heard(messages[0]["content"]) for name, messages in split if name == "val"]
    assert asked == [as_heard(question) for lesson in all_lessons for question in lesson.held_out]
    assert not taught & set(asked)


def test_lessons_come_in_many_paraphrases_alone_and_joined(all_lessons):
    train = [messages for name, messages in lessons.conversations(all_lessons, seed=1) if name == "train"]
    exchanges = [messages[i : i + 2] for messages in train for i in range(0, len(messages), 2)]
    assert all([m["role"] for m in exchange] == ["user", "assistant"] for exchange in exchanges)
    answer = "Return the number of items in a container."
    questions = {question["content"] for question, reply in exchanges if reply["content"] == answer}
    assert len(questions) >= 15 and any(question.islower() for question in questions)
    assert not all(question.endswith(("?", ".")) for question in questions)
    assert {2, 4, 6} <= {len(messages) for messages in train}
    assert next(lessons.conversations(all_lessons, seed=1)) != next(lessons.conversations(all_lessons, seed=2))


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


def test_only_utf_8_is_read(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("naïve\r\n日本\n".encode())
    assert read_utf8(path) == "naïve\r\n日本\n" and list(read_utf8_lines(path)) == ["naïve", "日本"]
    path.write_bytes(b"one\ntwo\ncaf\xe9\n")
    for read in (read_utf8, lambda path: list(read_utf8_lines(path))):
        with pytest.raises(UserError, match=r"a\.txt.* is not UTF-8"):
            read(path)
        with pytest.raises(UserError, match=f"cannot read {tmp_path}: "):
            read(tmp_path)


def write_ids(path, ids, header=()):
    path.write_bytes(np.array(header, "<i4").tobytes() + np.asarray(ids, "<u2").tobytes())


def test_llm_c_shards_are_read(tmp_path):
    path, header = tmp_path / "s.bin", [20240520, 1, 7] + [0] * 253
    write_ids(path, range(7), header)
    assert read_tokens(path).tolist() == list(range(7))
    llama, future = [20240801, 7, *header[2:]], [20240520, 2, *header[2:]]
    for ids, header_, complaint in (
        (range(6), header, "damaged"),
        (range(14), llama, "another format"),
        (range(14), future, "another format"),
    ):
        write_ids(path, ids, header_)
        with pytest.raises(UserError, match=complaint):
            read_tokens(path)
    path.write_bytes(b"odd")
    with pytest.raises(UserError, match="damaged"):
        read_tokens(path)


def test_splits_come_from_exact_names():
    names = "val.bin train.bin medieval_train.bin constrained_val.bin sft_train.bin train_val.bin training.bin x.bin"
    assert files_by_split(names.split()) == {"train": ["train.bin"], "val": ["val.bin"]}
    names = "train_000002.bin train_000001.bin fineweb_val_000000.bin my_val_train_000003.bin train_00000.bin.tmp"
    assert files_by_split(names.split()) == {
        "train": ["my_val_train_000003.bin", "train_000001.bin", "train_000002.bin"],
        "val": ["fineweb_val_000000.bin"],
    }
    names = "train_00000_shuffled.ds train_00000_shuffled.ds.index val_00000_unshuffled.ds"
    assert files_by_split(names.split()) == {"train": ["train_00000_shuffled.ds"], "val": ["val_00000_unshuffled.ds"]}


def test_no_file_is_in_the_wrong_split(tmp_path):
    for name, i in {"medieval_train": 1, "train": 2, "val": 3, "constrained_val": 4}.items():
        write_ids(tmp_path / f"{name}.bin", [i] * 50)
    meta = read_token_meta(tmp_path)
    shape = GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=8, vocab_size=64, n_tokens=64)
    for split, i in {"train": 2, "val": 3}.items():
        data = Windows.from_folder(tmp_path, meta, split, shape, 1, 0)
        assert {int(id_) for shard in data.shards for id_ in shard} == {i}
    (tmp_path / "val.bin").unlink()
    with pytest.raises(UserError, match=r"meta\.json is missing"):
        read_token_meta(tmp_path)


def test_meta_files_of_the_released_format_are_read():
    folder = REPOSITORY / "tests/samples/data"
    assert isinstance(json.loads((folder / "meta.json").read_text())["files"], list)
    assert read_token_meta(folder)["files"] == {"train": ["train.bin"], "val": ["val.bin"]}


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", '{"tokenizer": 1, "splits": {}}', '{"tokenizer": "gpt2", "splits": 3}', '{"tokenizer": "gpt2"}',
        '{"tokenizer": "gpt2", "splits": {}}', '{"tokenizer": "gpt2", "splits": {}, "files": ["train.bin"]}',
        '{"tokenizer": "gpt2", "splits": {}, "files": {"train": ["train.bin"], "val": []}}',
    ],
)  # fmt: skip
def test_a_damaged_meta_file_is_one_line(tmp_path, content):
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(UserError, match=r"meta\.json is damaged.*: run prepare_data\.py again"):
        read_token_meta(tmp_path)


def test_nanogpts_characters_are_refused(tmp_path):
    for name in ("train.bin", "val.bin", "meta.pkl"):
        (tmp_path / name).write_bytes(bytes(100))
    with pytest.raises(UserError, match=r"holds characters, not tokens, as its meta\.pkl of nanoGPT says"):
        read_token_meta(tmp_path)


def test_ids_outside_a_vocabulary_are_named_with_their_place():
    ids = np.array([1, 2, 3, 4, 5, 6, 9, 7, 8], dtype=np.uint16)
    require_ids_below(ids, 10, "a.bin", "do something")
    require_ids_below(ids[:0], 1, "a.bin", "do something")
    with pytest.raises(UserError, match=r"a\.bin holds the id 9 \(token 6\), .* of 9 does not have: do something"):
        require_ids_below(ids, 9, "a.bin", "do something")


def test_meta_json_describes_the_token_files(toy):
    meta = json.loads((toy / "data/toy/meta.json").read_text())
    for split in ("train", "val"):
        assert len(read_tokens(toy / f"data/toy/{split}.bin")) == meta["splits"][split]["tokens"] > 0
    assert meta["files"] == {"train": ["train.bin"], "val": ["val.bin"], "tokenizer": ["tokenizer.json"]}
    text = sum(len(path.read_bytes()) for path in (toy / "text").iterdir())
    assert sum(split["bytes"] for split in meta["splits"].values()) == text
