"""Text becomes tokens: from every kind of file and data set, with any number of workers, without half-written files."""

import gzip
import json
import re
import resource
import signal
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ENVIRONMENT, command, expected, run_script, split_files, succeed

from generation.config import SamplingConfig
from generation.text_model import TextModel
from prepare_data import Config, main
from system.errors import UserError
from system.files import atomic_folder
from text import tokenizer as tokenizers
from text.chat import encode_conversation
from text.corpus import CHUNK, Corpus, cut, open_corpus
from text.sources import content_suffix, draw_held_out
from text.token_files import read_token_meta, read_tokens
from training.classifier import encode


@pytest.fixture(scope="module")
def documents():
    """Texts of many lengths, with other scripts, control tokens, tabs and quotes."""
    texts = list(topics.values())
    assert sum(map(len, texts)) > 300_000
    special = ["naïve 日本 🙂", "<|endoftext|> and <|user|> are ordinary", "tab\tand\nline", 'a "quoted" text, twice']
    return [*texts, *special]


def prepare(folder: Path, *inputs: object, out: str = "data", **options: object) -> dict[str, list[int]]:
    """Prepares files in a folder; returns the ids of the token files by split."""
    main(Config(input=tuple(str(folder / str(name)) for name in inputs), out=folder / out, overwrite=True, **options))
    return split_files(folder / out)


def write_table(path, texts, column="text"):
    rows = [{"id": i, column: text} for i, text in enumerate(texts)]
    kind = content_suffix(str(path))
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=700)
        return
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    content = {
        ".csv": f"id,{column}\n" + "".join(f"{i},{text}\n" for i, text in enumerate(quoted)),
        ".tsv": f"id\t{column}\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(texts)),
        ".json": json.dumps(rows, ensure_ascii=False, indent=1),
        ".jsonl": "".join(json.dumps(row) + "\n" for row in rows),
    }[kind].encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def test_the_tokens_are_those_of_every_document_for_any_number_of_workers(documents, tmp_path):
    texts = [*documents[:30], "\n".join(documents * 4)]  # the last is longer than a chunk
    for i, text in enumerate(texts):
        (tmp_path / f"text{i:02}.txt").write_text(text, encoding="utf-8")
    outputs = [prepare(tmp_path, "*.txt", workers=workers) for workers in (1, 5)]
    assert outputs[0] == outputs[1] == expected(draw_held_out(texts, 0.1, 1337))


def test_line_ends_of_windows_become_those_of_unix_in_every_input(toy, tmp_path):
    unix, table = "one\ntwo\n\nthree\n" * 20, [f"row {i}\nof text" for i in range(25)]
    text_model = TextModel.load(toy / "checkpoints/sft.pt", device="cpu")
    data = {}
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "a.txt").write_bytes(unix.replace("\n", end).encode())
        write_table(tmp_path / "b.jsonl", [text.replace("\n", end) for text in table])
        question = [{"role": "user", "content": f"a{end}b", "input": f"c{end}d"}]
        answer = {"role": "assistant", "content": f"e{end}f"}
        data[end] = (
            prepare(tmp_path, "*.*"),
            text_model.prompt_ids(unix.replace("\n", end)),
            text_model.answer_ids(question, SamplingConfig()),
            encode_conversation([*question, answer], text_model.tokenizer, "alpaca"),
            encode(f"a{end}b", text_model.tokenizer, 64),
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
    pieces = list(cut(["word " * 700_000]))
    assert len(pieces) == 4 and all(len(piece) <= CHUNK + 10 and piece.endswith("d") for piece, _ in pieces[:-1])
    assert [ends for _, ends in pieces] == [False, False, False, True]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.csv.gz", "a.tsv", "a.parquet"])
def test_a_row_of_a_table_is_a_document(documents, tmp_path, name):
    texts = [text.replace("\n", " ").replace("\t", " ") if "tsv" in name else text for text in documents]
    write_table(tmp_path / name, texts, column="content")
    assert prepare(tmp_path, name, text_column="content") == expected(draw_held_out(texts, 0.1, 1337))


def test_compressed_files_are_read_and_damaged_files_are_named(tmp_path):
    text = "All work and no play makes a dull boy.\n" * 100_000
    for name, kind in (("a.txt.zst", "zstd"), ("b.md.gz", "gzip")):
        with pa.CompressedOutputStream(str(tmp_path / name), kind) as file:
            file.write(text.encode())
    with gzip.open(tmp_path / "d.parquet.gz", "wb") as file:
        pq.write_table(pa.table({"text": ["x", None, "y"]}), file)
    corpus = open_corpus("", [str(tmp_path)])
    assert ["".join(document) for _, document in corpus.documents()] == [text, text, "x", "y"]
    (tmp_path / "b.md.gz").write_bytes((tmp_path / "b.md.gz").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"cannot read .*b\.md\.gz"):
        ["".join(document) for _, document in corpus.documents()]


BROKEN = {  # file name: content, the message behind the file's name
    "a.jsonl": ('{"text": "a"}\n{"text"', "line 2 is not JSON: "),
    "bytes.jsonl": (b'{"text": "caf\xe9"}', "line 1 is not JSON: 'utf-8' codec can't decode"),
    "a.json": ('[{"text": "a"},]', "Expecting value"),
    "a.csv": ('text\n"never closed', "unexpected end of data"),
    "column.csv": ("body,day\nx,y\n", "line 2: no column 'text', but body, day: name the right one with --text-column"),
    "number.jsonl": ('{"text": 3}', "line 1: column 'text' holds a int, not text"),
    "list.jsonl": ("[1]", "line 1: no column 'text', but a list"),
    "a.parquet": ("text", "Parquet"),
    "empty.txt": ("", "use more text, or a smaller --shard-tokens (1 empty documents were skipped, the first in "),
    "none.txt": (None, "No such file"),
    "*.tex": (None, "no text in "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_costs_one_line_that_names_the_place(tmp_path, name):
    content, message = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=re.escape(message)) as error:
        prepare(tmp_path, name)
    assert name in str(error.value) and "\n" not in str(error.value) and not list(tmp_path.glob("data/*.bin"))


def test_invalid_unicode_is_replaced_counted_and_located(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo caf\xe9 and \xff\nthree" * 3)
    (tmp_path / "b.jsonl").write_text(
        '{"text": "fine"}\n{"text": "a \\ud800 b \\ud83d\\ude42 \\u0000"}\n{"text": null}\n'
    )
    (tmp_path / "c.py").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "d.md").write_bytes(b"")
    ids = prepare(tmp_path, "")
    text = tokenizers.gpt2().decode(ids["train"]) + tokenizers.gpt2().decode(ids["val"])
    assert text.count("\ufffd") == 7 and "🙂" in text and "ELF" not in text
    out = capsys.readouterr().out
    assert re.search(r"7 characters or bytes that are not Unicode became U\+FFFD, the first in .*a\.txt, line 2\n", out)
    assert re.search(r"1 binary files were skipped, the first in .*c\.py\n", out)
    assert re.search(r"2 empty documents were skipped, the first in .*b\.jsonl, line 3\n", out)
    assert "1 binary files were skipped" in json.loads((tmp_path / "data/meta.json").read_text())["notes"][2]


def test_whole_documents_are_held_out_or_the_end_of_a_few():
    def pieces(texts, seed=1):
        corpus = Corpus(lambda notes: (("", [text]) for text in texts), "texts")
        return [(split, text) for split, text, _ in corpus.pieces(0.05, seed)]

    documents = [f"document {i}" for i in range(1000)]
    split = pieces(documents)
    assert [text for _, text in split] == documents
    assert Counter(name for name, _ in split) == {"train": 950, "val": 50}
    assert split == pieces(documents) != pieces(documents, seed=2)
    assert all(any(name == "val" for name, _ in draw_held_out(range(20), 0.01, seed)) for seed in range(50))
    assert pieces(["0123456789" * 2]) == [("train", "0123456789012345678"), ("val", "9")]
    text = "0123456789" * 10
    for size in (1, 3, 100):
        document = [text[i : i + size] for i in range(0, 100, size)]
        assert list(cut(document, split_at=90)) == [(text[:90], True), (text[90:], True)]


def test_the_report_counts_what_python_counts(documents, tmp_path, capsys):
    text = "\n".join(documents[:100])
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    prepare(tmp_path, "a.txt")
    report = capsys.readouterr().out
    halves = [tokenizers.gpt2().encode(part) for part in (text[: int(len(text) * 0.9)], text[int(len(text) * 0.9) :])]
    for row, total in {
        "documents": 2,
        "characters": len(text),
        "bytes": len(text.encode()),
        "tokens": sum(map(len, halves)) + 2,
        "unique": len({i for half in halves for i in half}),
    }.items():
        assert re.search(rf"^{row} .* {total:,}$", report, re.MULTILINE), (row, total, report)
    (line,) = re.findall(r"^the training text begins: .*$", report, re.MULTILINE)
    assert len(line) == 100 and line.endswith(f": {' '.join(text.split())[:73]}…")
    main(Config(inspect=tmp_path / "data"))
    assert capsys.readouterr().out == report.partition("wrote ")[0]
    (tmp_path / "data/meta.json").unlink()  # as nanoGPT leaves its files
    main(Config(inspect=tmp_path / "data"))
    assert capsys.readouterr().out == report.partition("wrote ")[0]


def test_shards_have_one_size_and_outdated_files_go(documents, tmp_path):
    write_table(tmp_path / "a.jsonl", documents)
    assert prepare(tmp_path, "a.jsonl", shard_tokens=30_000) == expected(draw_held_out(documents, 0.1, 1337))
    sizes = [path.stat().st_size for path in sorted((tmp_path / "data").glob("train_*"))]
    assert len(sizes) > 3 and set(sizes[:-1]) == {60_000} and (tmp_path / "data/train_000001.bin").exists()
    prepare(tmp_path, "a.jsonl")
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"train.bin", "val.bin", "meta.json"}


def test_a_killed_preparation_leaves_the_old_files_and_its_complete_shards_are_kept(documents, tmp_path):
    write_table(tmp_path / "a.jsonl", documents * 12)
    (tmp_path / "b.txt").write_text("old")
    arguments = ["prepare_data.py", "--input", "a.jsonl", "--shard-tokens", "50000", "--workers", "1", "--overwrite"]
    succeed(tmp_path, *arguments, "--out", "whole")
    prepare(tmp_path, "b.txt")
    old = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    process = subprocess.Popen(
        command(*arguments, "--out", "data"), cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    while not (saved := tmp_path / "data/.meta.json.tmp/progress.json").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir() if path.name in old} == old
    first = saved.with_name("train_000001.bin").stat().st_ino
    succeed(tmp_path, *arguments, "--out", "data")
    assert (tmp_path / "data/train_000001.bin").stat().st_ino == first  # the same file, not an equal one
    for path in (tmp_path / "whole").glob("*.bin"):
        assert (tmp_path / "data" / path.name).read_bytes() == path.read_bytes(), path.name
    metas = [json.loads((tmp_path / name / "meta.json").read_text()) for name in ("whole", "data")]
    assert metas[0] | {"command": ""} == metas[1] | {"command": ""} and len(metas[0]["files"]["train"]) > 3
    assert not list((tmp_path / "data").glob(".meta*"))


def test_shards_of_other_settings_are_not_kept_and_a_changed_text_is_refused(documents, tmp_path, monkeypatch):
    write_table(tmp_path / "a.jsonl", documents)
    with monkeypatch.context() as patch, pytest.raises(pytest.fail.Exception):
        patch.setattr("text.prepare.count_tokens", lambda *_: pytest.fail("as if it was killed"))
        prepare(tmp_path, "a.jsonl", shard_tokens=20_000)
    assert (tmp_path / "data/.meta.json.tmp/train_000002.bin").exists()
    write_table(tmp_path / "a.jsonl", documents[::-1])
    with pytest.raises(UserError, match=r"the text is not that of the interrupted run: remove .*\.meta\.json\.tmp"):
        prepare(tmp_path, "a.jsonl", shard_tokens=20_000)
    ids = prepare(tmp_path, "a.jsonl", shard_tokens=20_000, seed=7)
    assert ids == expected(draw_held_out(documents[::-1], 0.1, 7))


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
    assert re.match("error: .*: File too large", result.stderr.splitlines()[-1])
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    (tmp_path / "a.txt").write_text("text " * 100)
    with atomic_folder(tmp_path / "data", last="meta.json"):
        result = run_script(tmp_path, "prepare_data.py", "--input", "a.txt", "--out", "data")
    assert result.returncode == 1 and "is being written by another run" in result.stderr.splitlines()[-1]
    succeed(tmp_path, "prepare_data.py", "--input", "a.txt", "--out", "data")


def test_a_corpus_is_prepared_with_another_models_tokenizer(toy, tmp_path):
    (tmp_path / "a.txt").write_text("Hello there. " * 200)
    name = json.loads((toy / "data/toy/meta.json").read_text())["tokenizer"]
    models = {toy / "data/toy/tokenizer.json": name, toy / "checkpoints/sft.last.pt": name, Path("gpt2"): "gpt2"}
    for model, expected_name in models.items():
        prepare(tmp_path, "a.txt", tokenizer=model)
        assert json.loads((tmp_path / "data/meta.json").read_text())["tokenizer"] == expected_name
    assert not (tmp_path / "data/tokenizer.json").exists()


TINY = "--max-steps 1 --n-layer 1 --n-head 1 --n-embd 8 --block-size 16 --batch-size 2 --device cpu"


@pytest.mark.parametrize("maker", ["nanoGPT", "llm.c"])
def test_token_files_of_nanogpt_and_llm_c_train_unconverted(tmp_path, maker):
    ids = tokenizers.gpt2().encode("It was the best of times, it was the worst of times. " * 20) + [50256]
    for split, n in (("train", 2), ("val", 1)):
        for i in range(n):
            header = [20240520, 1, len(ids), *[0] * 253] if maker == "llm.c" else []
            name = f"fineweb_{split}_{i:06}.bin" if maker == "llm.c" else f"{split}.bin"
            (tmp_path / name).write_bytes(np.array(header, "<i4").tobytes() + np.array(ids, "<u2").tobytes())
    stdout = succeed(tmp_path, f"train.py --data . {TINY}")
    assert f"{len(ids) * (2 if maker == 'llm.c' else 1):,} training tokens" in stdout


@pytest.mark.slow
def test_token_files_of_datatrove_train_unconverted(tmp_path, documents, monkeypatch):
    pytest.importorskip("datatrove")
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    monkeypatch.chdir(tmp_path)
    tokenizer = tokenizers.train_bpe(documents[:20], 400)
    Path("shards").mkdir()
    Path("shards/tokenizer.json").write_text(tokenizer.spec)
    for split, texts in {"train": documents[:40], "val": documents[40:50]}.items():
        for i in range(2):
            Path(f"text/{split}").mkdir(parents=True, exist_ok=True)
            write_table(Path(f"text/{split}/{i}.jsonl"), texts[i::2])
        pipeline = [
            JsonlReader(f"text/{split}"),
            DocumentTokenizer(
                "shards",
                local_working_dir="work",
                save_filename=split,
                tokenizer_name_or_path="shards/tokenizer.json",
                eos_token="<|endoftext|>",
            ),
        ]
        LocalPipelineExecutor(pipeline, tasks=2, workers=2, logging_dir=f"logs/{split}").run()
    files = read_token_meta(tmp_path / "shards")["files"]
    assert {split: len(names) for split, names in files.items()} == {"train": 2, "val": 2}
    ids = [i for name in files["train"] for i in read_tokens(tmp_path / "shards" / name).tolist()]
    found = tokenizer.decode(ids).split("<|endoftext|>")[:-1]
    assert sorted(found) == sorted(documents[:40])
    assert f"{len(ids):,} training tokens" in succeed(tmp_path, f"train.py --data shards {TINY}")


def test_max_tokens_stops_early_and_leaves_no_thread(documents, tmp_path):
    write_table(tmp_path / "a.jsonl", documents * 8)
    threads = threading.active_count()
    ids = prepare(tmp_path, "a.jsonl", max_tokens=500_000, workers=4)
    assert sum(map(len, ids.values())) == 500_000 and threading.active_count() == threads
