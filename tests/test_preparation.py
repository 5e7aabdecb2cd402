"""Text becomes tokens: from every kind of file and data set, with any number of workers, without half-written files."""

import csv
import errno
import fcntl
import gzip
import hashlib
import http.server
import json
import os
import re
import resource
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ENVIRONMENT, REPOSITORY, command, hub_environment, run_script, succeed
from hub_server import HubHandler
from text.corpora import CHUNK, Files, OpenWebText, Texts, cut, draw_held_out, hold_out
from text.readers import Notes
from text.registry import CONVERSATIONS, LABELLED, TEXTS, Dataset
from text.templates import encode_conversation

from generation.config import SamplingConfig
from generation.text_model import TextModel
from prepare_data import Config, main
from prepare_sft_data import Config as SFTConfig
from prepare_sft_data import main as main_sft
from system.cli import parse
from system.errors import UserError
from system.files import atomic_folder
from text import readers
from text import tokenizer as tokenizers
from text.conversations import oasst1_trees, open_conversations, read_file
from text.token_files import read_tokens
from train_classifier import Config as ClassifierConfig
from training.classifier import encode


@pytest.fixture(scope="module")
def documents():
    """Texts of many lengths, with other scripts, control tokens, tabs and quotes."""
    texts = list(topics.values())
    assert sum(map(len, texts)) > 300_000
    return [
        *texts,
        "naïve 日本 🙂",
        "<|endoftext|> and <|user|> are ordinary",
        "tab\tand\nline",
        'a "quoted" text, twice',
    ]


def split_files(folder) -> dict[str, list[int]]:
    """Returns the ids of a folder's token files by split, shards in order."""
    names = json.loads((folder / "meta.json").read_text())["files"]
    return {
        split: [i for name in names if split in name for i in read_tokens(folder / name).tolist()]
        for split in ("train", "val")
    }


def expected(pairs) -> dict[str, list[int]]:
    """Returns the ids that (split, text) pairs must become, by the simplest use of the tokenizer."""
    ids = {"train": [], "val": []}
    for split, text in pairs:
        ids[split] += [*tokenizers.gpt2().encoding.encode_ordinary(text), 50256]
    return ids


def test_the_tokens_are_those_of_every_document_for_any_number_of_workers(documents, tmp_path):
    long = "\n".join(documents * 4)  # longer than a chunk
    for i, text in enumerate([*documents[:30], long]):
        (tmp_path / f"text{i:02}.txt").write_text(text, encoding="utf-8")
    outputs = []
    for workers in (1, 5):
        main(Config(input=(str(tmp_path / "*.txt"),), out=tmp_path / f"w{workers}", workers=workers))
        outputs.append(split_files(tmp_path / f"w{workers}"))
    assert outputs[0] == outputs[1] == expected(draw_held_out([*documents[:30], long], 0.1, 1337))


def test_line_ends_of_windows_become_those_of_unix_in_every_input(toy, tmp_path):
    unix, table = "one\ntwo\n\nthree\n" * 20, [f"row {i}\nof text" for i in range(25)]
    data = {}
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "a.txt").write_bytes(unix.replace("\n", end).encode())
        write_table(tmp_path / "b.jsonl", [text.replace("\n", end) for text in table])
        main(Config(input=(str(tmp_path / "*.*"),), out=tmp_path / "data", overwrite=True))
        question = [{"role": "user", "content": f"a{end}b", "input": f"c{end}d"}]
        text_model = TextModel.load(toy / "checkpoints/sft.pt", device="cpu")
        tokenizer = text_model.tokenizer
        data[end] = (
            split_files(tmp_path / "data"),
            text_model.prompt_ids(unix.replace("\n", end)),
            text_model.answer_ids(question, SamplingConfig()),
            encode_conversation([*question, {"role": "assistant", "content": f"e{end}f"}], tokenizer, "alpaca"),
            encode(f"a{end}b", tokenizer, 64),
        )
    assert data["\n"] == data["\r\n"] == data["\r"] and all(data["\n"])


def test_cutting_changes_no_token():
    rng = np.random.default_rng(0)
    characters = np.array([*"aZé日🙂0 '.\n\t\r", "  ", "\u00a0", "\u2028", "\x1c", "'s", " a", "\0"])
    encode = tokenizers.gpt2().encode
    for _ in range(200):
        text = "".join(rng.choice(characters, 400))
        chunks = [text[i : i + 37] for i in range(0, len(text), 37)]
        pieces = [piece for piece, _ in cut(chunks, size=50)]
        assert len(pieces) > 2 and "".join(pieces) == text
        assert [i for piece in pieces for i in encode(piece)] == encode(text)
    assert [len(piece) for piece, _ in cut(["x" * 50_000] * 3, size=40_000)] == [50_000] * 3


def test_a_long_string_is_cut_too():
    text = "word " * 700_000
    pieces = list(cut([text]))
    assert "".join(piece for piece, _ in pieces) == text
    assert len(pieces) == 4 and all(len(piece) <= CHUNK + 10 and piece.endswith("d") for piece, _ in pieces[:-1])
    assert [ends for _, ends in pieces] == [False, False, False, True]


def write_table(path, texts, column="text"):
    rows = [{"id": i, column: text} for i, text in enumerate(texts)]
    opened = gzip.open if path.suffix == ".gz" else open
    kind = readers.content_suffix(path)
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=700)
        return
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if kind == ".csv":
            writer = csv.DictWriter(file, ["id", column])
            writer.writeheader()
            writer.writerows(rows)
        elif kind == ".tsv":
            file.write(f"id\t{column}\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(texts)))
        elif kind == ".json":
            json.dump(rows, file, ensure_ascii=False, indent=1)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.csv.gz", "a.tsv", "a.parquet"])
def test_a_row_of_a_table_is_a_document(documents, tmp_path, name):
    texts = [text.replace("\n", " ").replace("\t", " ") if "tsv" in name else text for text in documents]
    write_table(tmp_path / name, texts, column="content")
    main(Config(input=(str(tmp_path / name),), out=tmp_path / "data", text_column="content"))
    assert split_files(tmp_path / "data") == expected(draw_held_out(texts, 0.1, 1337))


def test_compressed_files_are_read_and_damaged_files_are_named(tmp_path):
    text = "All work and no play makes a dull boy.\n" * 100_000
    for name, kind in (("a.txt.zst", "zstd"), ("b.md.gz", "gzip"), ("c.py.zst", "zstd")):
        with pa.CompressedOutputStream(str(tmp_path / name), kind) as file:
            file.write(text.encode())
    corpus = Files([str(tmp_path)])
    assert ["".join(document) for document in corpus] == [text] * 3 and corpus.position == corpus.total
    whole = (tmp_path / "b.md.gz").read_bytes()
    (tmp_path / "b.md.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot read .*b\.md\.gz"):
        ["".join(document) for document in corpus]
    with gzip.open(tmp_path / "d.parquet.gz", "wb") as file:
        pq.write_table(pa.table({"text": ["x", None, "y"]}), file)
    assert [list(document) for document in Files([str(tmp_path / "d.parquet.gz")])] == [["x"], ["y"]]


def test_invalid_unicode_is_replaced_counted_and_located(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo caf\xe9 and \xff\nthree" * 3)
    (tmp_path / "b.jsonl").write_text(
        '{"text": "fine"}\n{"text": "a \\ud800 b \\ud83d\\ude42 \\u0000"}\n{"text": null}\n'
    )
    (tmp_path / "c.py").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "d.md").write_bytes(b"")
    main(Config(input=(str(tmp_path),), out=tmp_path / "data"))
    ids = split_files(tmp_path / "data")
    text = tokenizers.gpt2().decode(ids["train"]) + tokenizers.gpt2().decode(ids["val"])
    assert text.count("\ufffd") == 7 and "🙂" in text and "ELF" not in text
    out = capsys.readouterr().out
    assert re.search(r"7 characters or bytes that are not Unicode became U\+FFFD, the first in .*a\.txt, line 2\n", out)
    assert re.search(r"1 binary files were skipped, the first in .*c\.py\n", out)
    assert re.search(r"2 empty documents were skipped, the first in .*b\.jsonl, line 3\n", out)
    assert json.loads((tmp_path / "data/meta.json").read_text())["notes"]["binary files were skipped"]["number"] == 1


def test_a_single_document_is_split_at_its_end():
    for size in (1, 3, 100):
        text = "0123456789" * 10
        document = [text[i : i + size] for i in range(0, 100, size)]
        assert list(cut(document, split_at=90)) == [(text[:90], True), (text[90:], True)]
    split = [(name, text) for name, text, _ in hold_out(Texts(["0123456789"]), 0.1, seed=1)]
    assert split == [("train", "012345678"), ("val", "9")]


def test_the_report_counts_what_python_counts(documents, tmp_path, capsys):
    text = "\n".join(documents[:100])
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    main(Config(input=(str(tmp_path / "a.txt"),), out=tmp_path / "data"))
    report = capsys.readouterr().out
    halves = [tokenizers.gpt2().encode(part) for part in (text[: int(len(text) * 0.9)], text[int(len(text) * 0.9) :])]
    for row, total in {
        "documents": 2,
        "characters": len(text),
        "bytes": len(text.encode()),
        "tokens of text": sum(map(len, halves)),
        "separators": 2,
        "unique tokens": len({i for half in halves for i in half}),
    }.items():
        assert re.search(rf"^{row} .* {total:,}$", report, re.MULTILINE), (row, total, report)
    (line,) = re.findall(r"^the training text begins: .*$", report, re.MULTILINE)
    assert len(line) == 100 and line.endswith(f": {' '.join(text.split())[:73]}…")
    main(Config(inspect=tmp_path / "data"))
    assert capsys.readouterr().out == report.partition("wrote ")[0]
    (tmp_path / "data/meta.json").unlink()  # as nanoGPT leaves its files
    main(Config(inspect=tmp_path / "data"))
    assert capsys.readouterr().out == report.partition("wrote ")[0]


def test_two_runs_write_the_same_bytes(documents, tmp_path):
    write_table(tmp_path / "a.jsonl", documents)
    contents = []
    for _ in range(2):
        succeed(
            tmp_path, "prepare_data.py", "--input", "a.jsonl", "--out", "data", "--shard-tokens", "40000", "--overwrite"
        )
        contents.append({path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()})
    assert contents[0] == contents[1]
    sizes = [len(content) // 2 for name, content in sorted(contents[0].items()) if name.startswith("train_")]
    assert len(sizes) > 3 and set(sizes[:-1]) == {40_000} and "train_000001.bin" in contents[0]


def test_preparing_again_removes_outdated_files(tmp_path):
    (tmp_path / "a.txt").write_text("some text to tokenize " * 500)
    for shard_tokens in (300, None):
        main(Config(input=(str(tmp_path / "a.txt"),), out=tmp_path / "data", shard_tokens=shard_tokens, overwrite=True))
        names = {path.name for path in (tmp_path / "data").iterdir()}
        assert names == {"meta.json", *json.loads((tmp_path / "data/meta.json").read_text())["files"]}
    assert names == {"train.bin", "val.bin", "meta.json"}


@pytest.fixture()
def hub(tmp_path, monkeypatch):
    """Returns a function that writes a data set which `load_dataset("org/name")` finds in the current folder."""
    monkeypatch.chdir(tmp_path)

    def add(path, rows, schema=None):
        path = tmp_path / path
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)

    return add


def test_openwebtext_is_split_as_nanogpt_splits_it(hub, tmp_path):
    from datasets import Dataset

    texts = [f"page {i} of the web" for i in range(5000)]
    for k in range(2):
        rows = [{"text": text} for text in texts[k * 2500 : (k + 1) * 2500]]
        hub(f"Skylion007/openwebtext/plain_text/train-{k:05}-of-00002.parquet", rows)
    main(Config(out=tmp_path / "data"))
    reference = Dataset.from_dict({"text": texts}).train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    held_out = set(reference["test"]["text"])
    assert len(held_out) == 3 and OpenWebText(TEXTS["openwebtext"]).is_val().sum() == 3
    assert split_files(tmp_path / "data") == expected(("val" if text in held_out else "train", text) for text in texts)


def test_a_script_data_set_is_read_from_the_hubs_parquet_files(serve, tmp_path):
    folder = tmp_path / "www/Skylion007/openwebtext"
    (folder / "main").mkdir(parents=True)
    (folder / "main/openwebtext.py").write_text("raise SystemExit('never run')")
    parquet = folder / "refs/convert/parquet/plain_text/train"
    parquet.mkdir(parents=True)
    texts = [f"page {i} of the web" for i in range(3000)]
    for k in range(2):
        pq.write_table(pa.table({"text": texts[k * 1500 : (k + 1) * 1500]}), parquet / f"000{k}.parquet")
    environment = hub_environment(serve(partial(HubHandler, tmp_path / "www")), tmp_path / "cache")
    result = subprocess.run(
        command("prepare_data.py", "--out", "data"),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr
    assert "has 3,000 rows, not 8,013,769" in result.stdout
    ids = split_files(tmp_path / "data")
    assert len(ids["train"] + ids["val"]) == len(expected(("train", text) for text in texts)["train"])
    assert ids["val"].count(50256) == 2
    assert not list(tmp_path.glob("cache/**/*.parquet"))  # streamed, not stored


FINEWEB_EDU = pa.schema(
    [(name, pa.string()) for name in ("text", "id", "dump", "url", "file_path", "language")]
    + [
        ("language_score", pa.float64()),
        ("token_count", pa.int64()),
        ("score", pa.float64()),
        ("int_score", pa.int64()),
    ]
)


def test_fineweb_edu_holds_out_its_first_shard(hub, tmp_path):
    rows = [dict.fromkeys(FINEWEB_EDU.names) | {"text": f"lesson {i} " * 5, "score": 3.5} for i in range(600)]
    hub("HuggingFaceFW/fineweb-edu/data/CC-MAIN-2013-20/train-00000.parquet", rows[:1], FINEWEB_EDU)
    hub("HuggingFaceFW/fineweb-edu/sample/10BT/000_00000.parquet", rows, FINEWEB_EDU)
    (tmp_path / "HuggingFaceFW/fineweb-edu/README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: default\n  data_files:\n  - split: train\n    path: data/*/*\n"
        "- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
    )
    main(Config(dataset="fineweb-edu", out=tmp_path / "data", shard_tokens=1000, max_tokens=4500))
    everything = expected(("train", row["text"]) for row in rows)["train"]
    files = {path.name: read_tokens(path).tolist() for path in (tmp_path / "data").glob("*.bin")}
    assert files == {
        "val_000001.bin": everything[:1000],
        **{f"train_00000{i}.bin": everything[i * 1000 : min((i + 1) * 1000, 4500)] for i in (1, 2, 3, 4)},
    }
    with pytest.raises(UserError, match="smaller --shard-tokens"):
        main(Config(dataset="fineweb-edu", out=tmp_path / "more", max_tokens=4500))


def test_climbmix_holds_out_its_first_shard(hub, tmp_path):
    texts = [f"page {i} " * 9 for i in range(300)]
    for k in range(2):
        rows = [{"text": text} for text in texts[k * 150 : (k + 1) * 150]]
        hub(f"karpathy/climbmix-400b-shuffle/shard_0000{k}.parquet", rows)
    main(Config(dataset="climbmix", out=tmp_path / "data", shard_tokens=1000))
    files = {path.name: read_tokens(path).tolist() for path in sorted((tmp_path / "data").glob("*.bin"))}
    everything = expected(("train", text) for text in texts)["train"]
    assert files.pop("val_000001.bin") == everything[:1000] and len(files) > 2
    assert sum(files.values(), []) == everything[1000:]


def test_tinystories_has_its_own_validation_split(hub, tmp_path):
    stories = {split: [f"Once {i} {split}" for i in range(30)] for split in ("train", "validation")}
    for split, texts in stories.items():
        rows = [{"text": text} for text in texts]
        hub(f"roneneldan/TinyStories/data/{split}-00000-of-00001-0123456789abcdef.parquet", rows)
    main(Config(dataset="tinystories", out=tmp_path / "data"))
    held_out = (("val", text) for text in stories["validation"])
    assert split_files(tmp_path / "data") == expected([*held_out, *(("train", text) for text in stories["train"])])


def test_any_data_set_of_the_hub_is_read(hub, tmp_path):
    for split in ("train", "test"):
        hub(f"org/name/{split}.parquet", [{"body": f"{split} {i}"} for i in range(30)])
    main(Config(dataset="org/name", split="test", text_column="body", out=tmp_path / "data"))
    assert split_files(tmp_path / "data") == expected(draw_held_out([f"test {i}" for i in range(30)], 0.1, 1337))
    for complaint, wrong in {"no column 'text', but body": {}, "Bad split": {"split": "dev"}}.items():
        with pytest.raises(UserError, match=complaint):
            main(Config(dataset="org/name", out=tmp_path / "wrong", **wrong))


@pytest.mark.parametrize(
    ("config", "names"), [(Config, TEXTS), (SFTConfig, CONVERSATIONS), (ClassifierConfig, LABELLED)]
)
def test_help_lists_the_named_data_sets(capsys, config, names):
    with pytest.raises(SystemExit):
        parse(config, ["--help"])
    shown = re.sub(r"[\s│]", "", capsys.readouterr().out)
    assert names and all(re.sub(r"\s", "", str(dataset)) in shown for dataset in names.values())


def test_a_named_data_set_is_one_entry_and_may_come_with_its_own_split(hub, tmp_path, monkeypatch):
    for split in ("train", "validation"):
        hub(f"org/stories/{split}.parquet", [{"story": f"{split} {i}"} for i in range(3)])
    stories = Dataset("stories", "6 stories", "CC0-1.0", hub="org/stories", split="own", text_column="story")
    monkeypatch.setitem(TEXTS, stories.name, stories)
    main(Config(dataset="stories", out=tmp_path / "data"))
    assert split_files(tmp_path / "data") == expected(
        (split, f"{name} {i}") for split, name in (("train", "train"), ("val", "validation")) for i in range(3)
    )


def oasst1_row(id_, parent, role, text, rank=None, spam=0.0, **more):
    """Returns a message with all columns of OpenAssistant's data set."""
    return {
        "message_id": id_, "parent_id": parent, "user_id": "u", "created_date": "2023-02-05T14:23:50", "text": text,
        "role": role, "lang": "en", "review_count": 3, "review_result": True, "deleted": False, "rank": rank,
        "synthetic": False, "model_name": None,
        "detoxify": {"toxicity": 0.1, "severe_toxicity": 0.0, "obscene": 0.0, "identity_attack": 0.0, "insult": 0.0,
                     "threat": 0.0, "sexual_explicit": 0.0},
        "message_tree_id": id_[0], "tree_state": "ready_for_export",
        "emojis": {"name": ["+1"], "count": [2]},
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
    trees = [[[m["content"] for m in messages] for messages in tree] for tree in oasst1_trees(rows, notes)]
    assert trees == [[["Q", "best", "Q2", "A2"], ["Q", "best"]], [["D?", "D."]]]
    assert notes.lines()[0] == "3 messages that were deleted or marked as spam were left out, the first in a6"
    assert "1 answers that reviewers ranked below another one were left out, the first in a1" in notes.lines()


@pytest.mark.parametrize("has_validation", [True, False])
def test_oasst1_keeps_its_own_split_or_is_split_by_tree(hub, tmp_path, has_validation):
    trees = [
        [
            {**row, **{key: row[key] and row[key] + str(i) for key in ("message_id", "parent_id", "text")}}
            for row in OASST1
        ]
        for i in range(12)
    ]
    hub("OpenAssistant/oasst1/data/train-00000.parquet", sum(trees[:11], []))
    if has_validation:
        hub("OpenAssistant/oasst1/data/validation-00000.parquet", trees[11])
    main_sft(SFTConfig(out=tmp_path / "data"))
    texts = {}
    for split in ("train", "val"):
        text = tokenizers.gpt2().decode(read_tokens(tmp_path / f"data/sft_{split}.bin").tolist())
        texts[split] = set(re.findall(r"<\|user\|> (\S+?)<", text))
    assert texts["train"] and texts["val"] and not texts["train"] & texts["val"]  # no tree is in both splits
    if has_validation:
        assert texts["val"] == {"Q11", "Q211", "D?11"}


def test_alpaca_gpt4_gives_instructions_with_inputs(hub, tmp_path):
    rows = [{"instruction": f"Add {i}.", "input": "1 and" * (i % 2), "output": f"={i}", "text": "…"} for i in range(40)]
    hub("vicgalle/alpaca-gpt4/data/train-00000-of-00001.parquet", rows)
    main_sft(SFTConfig(dataset="alpaca-gpt4", template="alpaca", val_fraction=0.05, out=tmp_path / "data"))
    text = tokenizers.gpt2().decode(read_tokens(tmp_path / "data/sft_train.bin").tolist())
    assert "### Instruction:\nAdd 7.\n\n### Input:\n1 and\n\n### Response:\n=7<|endoftext|>" in text
    assert (
        sum(c["conversations"] for c in json.loads((tmp_path / "data/sft_meta.json").read_text())["splits"].values())
        == 40
    )


def test_conversations_are_read_from_compressed_json_lines(tmp_path):
    def turns(i):
        return [{"role": "user", "content": "line\u2028separator"}, {"role": "assistant", "content": f"kept {i}"}]

    with gzip.open(tmp_path / "chat.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"messages": turns(i)}, ensure_ascii=False) + "\n" for i in range(3))
    main_sft(SFTConfig(input=tmp_path / "chat.jsonl.gz", out=tmp_path / "data", val_fraction=0.05))
    splits = json.loads((tmp_path / "data/sft_meta.json").read_text())["splits"]
    assert {name: counts["conversations"] for name, counts in splits.items()} == {"train": 2, "val": 1}
    text = tokenizers.gpt2().decode(read_tokens(tmp_path / "data/sft_train.bin").tolist())
    assert re.fullmatch(
        "(<\\|user\\|> line\u2028separator<\\|endoftext\\|>\n<\\|assistant\\|> kept [012]<\\|endoftext\\|>\n){2}", text
    )


@pytest.mark.parametrize(
    "columns", [("question", "answer"), ("prompt", "response"), ("prompt", "completion"), ("instruction", "output")]
)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet"])
def test_a_table_of_questions_and_answers_becomes_conversations(tmp_path, columns, name):
    rows = [dict(zip(("id", *columns), (str(i), f"What is {i}, really?", f'"{i}"'), strict=True)) for i in range(3)]
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    elif name == "a.jsonl":
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(tmp_path / name, "w", newline="") as file:
            tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
            writer = csv.DictWriter(file, rows[0], **(tabs if name == "a.tsv" else {}))
            writer.writeheader()
            writer.writerows(rows)
    assert list(read_file(tmp_path / name, Notes())) == [
        [{"role": "user", "content": f"What is {i}, really?", "input": ""}, {"role": "assistant", "content": f'"{i}"'}]
        for i in range(3)
    ]


@pytest.mark.parametrize(
    ("n", "val_fraction", "n_train", "n_val"),
    [(99, None, 99 + 50 + 33, 99), (100, None, 95, 5), (200, 0, 200, 200), (5, 0.1, 4, 1)],
)
def test_of_few_conversations_none_is_held_out(tmp_path, capsys, n, val_fraction, n_train, n_val):
    (tmp_path / "a.csv").write_text("prompt,response\n" + "".join(f"{i},yes\n" for i in range(n)))
    main_sft(SFTConfig(input=tmp_path / "a.csv", out=tmp_path / "data", val_fraction=val_fraction))
    meta = json.loads((tmp_path / "data/sft_meta.json").read_text())
    assert [meta["splits"][split]["conversations"] for split in ("train", "val")] == [n_train, n_val]
    assert meta["is_held_out"] == (n_val < n) == ("all conversations are trained on" not in capsys.readouterr().out)


def test_few_conversations_of_one_exchange_are_joined_to_longer_ones_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second, third, fourth = (
        [{"role": "user", "content": name}, {"role": "assistant", "content": "yes"}] for name in "abcd"
    )

    def opened(*conversations, val_fraction=None):
        rows = "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations)
        Path("chats.jsonl").write_text(rows)
        return list(open_conversations("", Path("chats.jsonl"), None, val_fraction, 1, Notes()))

    alone, longer = opened(first, second, third)[:3], opened(first, second, third)[3:]
    assert alone == [("both", first), ("both", second), ("both", third)]
    assert [split for split, _ in longer] == ["joined"] * 3
    assert [len(messages) // 2 for _, messages in longer] == [2, 1, 3]  # each twice
    asked = sorted(message["content"] for _, messages in longer for message in messages[::2])
    assert asked == ["a", "a", "b", "b", "c", "c"]
    mixed = opened(first, second, [*third, *fourth])  # somebody asks twice already
    assert [split for split, _ in mixed] == ["both"] * 3 + ["joined"] * 2
    assert all({message["content"] for message in messages[::2]} == {"a", "b"} for _, messages in mixed[3:])
    assert len(opened(first, [*second, *third])) == 2
    assert not any(split == "joined" for split, _ in opened(first, second, third, val_fraction=0.5))


def test_downloads_are_checked_and_kept(serve, tmp_path, monkeypatch):
    (tmp_path / "www").mkdir()
    (tmp_path / "www/input.txt").write_text("First Citizen")
    url = serve(partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "www")) + "/input.txt"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    text = replace(TEXTS["shakespeare"], url=url, sha256="0" * 64)
    with pytest.raises(UserError, match="another SHA-256"):
        readers.download(text, "…", tmp_path / "raw")
    assert not list(tmp_path.glob("raw/*"))
    text = replace(text, sha256=hashlib.sha256(b"First Citizen").hexdigest())
    path = readers.download(text, "…", tmp_path / "raw")
    (tmp_path / "www/input.txt").unlink()
    assert readers.download(text, "…", tmp_path / "raw").read_text() == "First Citizen"
    path.unlink()
    with pytest.raises(UserError, match="cannot fetch shakespeare"):
        readers.download(text, "…", tmp_path / "raw")


def test_a_full_disk_prints_one_line_and_keeps_the_old_files(tmp_path):
    (tmp_path / "a.txt").write_text("some text to tokenize " * 20_000)
    arguments = ["--input", "a.txt", "--out", "data", "--overwrite"]
    succeed(tmp_path, "prepare_data.py", *arguments)
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    result = subprocess.run(
        command("prepare_data.py", *arguments), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, encoding="utf-8",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )  # fmt: skip
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: cannot write to data: ")
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before


@pytest.mark.parametrize("reason", ["a dead process", "no locks"])
def test_a_dead_process_or_missing_locks_do_not_block(tmp_path, monkeypatch, reason):
    if reason == "a dead process":
        code = f"""
import os, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from system.files import atomic_folder
with atomic_folder("data", last="meta.json") as folder:
    (folder / "train.bin").write_text("half")
    os._exit(0)
"""
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, check=True)
        assert (tmp_path / "data/.prepare-meta.json/train.bin").exists()
    else:
        monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented")))
    with atomic_folder(tmp_path / "data", last="meta.json") as folder:
        (folder / "meta.json").write_text("{}")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["meta.json"]


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    (tmp_path / "a.txt").write_text("text " * 100)
    with atomic_folder(tmp_path / "data", last="meta.json"):
        result = run_script(tmp_path, "prepare_data.py", "--input", "a.txt", "--out", "data")
    assert result.returncode == 1 and "data is being written by another run" in result.stderr.splitlines()[-1]
    succeed(tmp_path, "prepare_data.py", "--input", "a.txt", "--out", "data")


def test_a_corpus_is_prepared_with_another_models_tokenizer(toy, tmp_path):
    (tmp_path / "a.txt").write_text("Hello there. " * 200)
    for model in ("data/toy/tokenizer.json", "checkpoints/toy.pt", "checkpoints/sft.last.pt"):
        main(Config(input=(str(tmp_path / "a.txt"),), out=tmp_path / "data", tokenizer=toy / model, overwrite=True))
        meta = json.loads((tmp_path / "data/meta.json").read_text())
        assert meta["tokenizer"] == json.loads((toy / "data/toy/meta.json").read_text())["tokenizer"]
    main(Config(input=(str(tmp_path / "a.txt"),), out=tmp_path / "data", tokenizer=Path("gpt2"), overwrite=True))
    assert json.loads((tmp_path / "data/meta.json").read_text())["tokenizer"] == "gpt2"


@pytest.mark.parametrize("maker", ["nanoGPT", "llm.c"])
def test_token_files_of_nanogpt_and_llm_c_train_unconverted(tmp_path, maker):
    def little_endian(*numbers, size):
        return b"".join(n.to_bytes(size, "little") for n in numbers)

    ids = tokenizers.gpt2().encode("It was the best of times, it was the worst of times. " * 20) + [50256]
    for split, n in (("train", 2), ("val", 1)):
        for i in range(n):
            header = little_endian(20240520, 1, len(ids), *[0] * 253, size=4) if maker == "llm.c" else b""
            name = f"fineweb_{split}_{i:06}.bin" if maker == "llm.c" else f"{split}.bin"
            (tmp_path / name).write_bytes(header + little_endian(*ids, size=2))
    stdout = succeed(
        tmp_path, "train.py", "--data", ".", "--max-steps", "1", "--n-layer", "1", "--n-head", "1", "--n-embd", "8",
        "--block-size", "16", "--batch-size", "2", "--device", "cpu",
    )  # fmt: skip
    assert f"{len(ids) * (2 if maker == 'llm.c' else 1):,} training tokens" in stdout


def test_stopping_early_leaves_no_thread(documents, tmp_path):
    write_table(tmp_path / "a.jsonl", documents * 8)
    threads = threading.active_count()
    main(Config(input=(str(tmp_path / "a.jsonl"),), out=tmp_path / "data", max_tokens=500_000, workers=4))
    assert sum(map(len, split_files(tmp_path / "data").values())) == 500_000
    assert threading.active_count() == threads and not os.path.exists(tmp_path / "data/.prepare-meta.json")
