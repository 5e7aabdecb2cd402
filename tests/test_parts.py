"""One corpus prepared by several real processes: the same bytes for any number, and nothing twice after a kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ENVIRONMENT, REPOSITORY, command
from test_preparation import expected, split_files

from prepare_data import Config, main
from system.errors import UserError
from system.locks import locked
from text.corpora import Files, OpenWebText, Texts, draw_held_out, open_corpus
from text.registry import TEXTS
from text.token_files import read_tokens

FLAGS = ["--input", "text", "--out", "data", "--shard-tokens", "2500", "--workers", "1"]
N_FILES, N_PARTS = 6, 5  # the last two files are small


@pytest.fixture()
def folder(tmp_path):
    """A folder with tables of documents, which make N_PARTS parts with FLAGS."""
    (tmp_path / "text").mkdir()
    documents = random.Random(0).sample(sorted(topics.values(), key=len)[:60], 60)
    for i in range(N_FILES):
        rows = documents[i * 12 : (i + 1) * 12] if i < 4 else [f"a small row {i}"]
        rows = rows * (3 if i == 2 else 1)
        content = "".join(json.dumps({"text": row}) + "\n" for row in [*rows, ""])
        (tmp_path / "text" / f"{i}.jsonl").write_text(content)
    return tmp_path


def start(folder: Path, rank: int, world_size: int, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        command("prepare_data.py", *FLAGS, *flags), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        encoding="utf-8", env={**ENVIRONMENT, "RANK": str(rank), "WORLD_SIZE": str(world_size)},
    )  # fmt: skip


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """Waits for processes that must succeed; returns what each printed."""
    results = [process.communicate(timeout=100) for process in processes]
    assert not any(process.returncode for process in processes), [stderr[-2000:] for _, stderr in results]
    return [stdout for stdout, _ in results]


def prepare(folder: Path, world_size: int, *flags: str) -> list[str]:
    """Prepares the text in so many processes; the last one starts first."""
    return finish([start(folder, rank, world_size, *flags) for rank in reversed(range(world_size))])[::-1]


def prepare_here(folder: Path, monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int, out: str = "data") -> None:
    """Prepares the text as FLAGS say, in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    main(Config(input=("text",), out=Path(out), shard_tokens=2500))


def contents(data: Path) -> dict[str, bytes]:
    """The files in a folder, meta.json without its command; fails if there is anything else."""
    files = {path.name: path.read_bytes() for path in data.iterdir()}
    meta = json.loads(files["meta.json"])
    del meta["command"]
    assert files.keys() == {"meta.json", *meta["files"]}
    return {**files, "meta.json": json.dumps(meta).encode()}


def part_folders(data: Path) -> list[Path]:
    return [path.parent for path in sorted(data.glob(".parts-*/part_*/part.json"))]


def identities(folders: list[Path]) -> dict[Path, tuple[int, int]]:
    """The inode and the time of the last change of every file in some folders."""
    paths = (path for folder in folders for path in folder.iterdir())
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def kill_with_parts(process: subprocess.Popen, data: Path, n: int) -> list[Path]:
    """Kills a process with SIGKILL as soon as `n` parts are complete; returns the folders of the complete parts."""
    while len(part_folders(data)) < n:
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.001)
    process.kill()
    process.wait()
    return part_folders(data)


def test_any_number_of_processes_writes_the_same_bytes(folder):
    found = []
    for world_size in (1, 2, 3):
        out = f"data{world_size}"
        prepare(folder, world_size, "--out", out, "--vocab-size", "300")
        found.append(contents(folder / out))
    assert found[0] == found[1] == found[2]
    assert {"tokenizer.json", "train_000001.bin", "val_000001.bin"} <= found[0].keys()
    notes = json.loads(found[0]["meta.json"])["notes"]
    assert notes["empty documents were skipped"]["number"] == N_FILES


def test_each_part_has_shards_and_held_out_documents_of_its_own(folder, monkeypatch):
    monkeypatch.chdir(folder)
    main(Config(input=("text",), out=Path("data"), shard_tokens=2500))
    groups = [["0"], ["1"], ["2"], ["3"], ["4", "5"]]
    assert [[path.stem for path in part.paths] for part in Files(["text"]).parts(10_000)] == groups
    sizes = {"train": [], "val": []}
    ids = split_files(Path("data"))
    rest = {"train": [], "val": []}
    for i, group in enumerate(groups):
        paths = [Path(f"text/{name}.jsonl") for name in group]
        texts = [json.loads(line)["text"] for path in paths for line in path.read_text().splitlines()]
        texts = [text for text in texts if text]
        part = Texts(texts).pieces(0.1, 1337 + i)
        part_ids = expected((split, text) for split, text, _ in part)
        for split, more in part_ids.items():
            rest[split] += more
            sizes[split] += [min(2500, len(more) - at) for at in range(0, len(more), 2500)]
    assert ids == rest
    for split in sizes:
        assert [len(read_tokens(path)) for path in sorted(Path("data").glob(f"{split}_*.bin"))] == sizes[split]


def test_a_killed_process_goes_on_and_writes_nothing_twice(folder, monkeypatch, capsys):
    prepare_here(folder, monkeypatch, 0, 1, "whole")
    first = start(folder, 1, 2)
    kept = kill_with_parts(first, folder / "data", 1)
    assert [path.name for path in kept] == ["part_000002"]
    before = identities(kept)
    [stdout] = finish([start(folder, 1, 2)])
    assert "rank 1 of 2: 1 of 2 parts are complete already" in stdout and "1 of 5 parts written" in stdout
    assert identities(kept) == before
    before = identities(part_folders(folder / "data"))
    zero = start(folder, 0, 2)
    shards = {inode for path, (inode, _) in before.items() if path.name.startswith(("train", "val"))}
    finish([zero])
    assert shards <= {path.stat().st_ino for path in (folder / "data").iterdir()}  # moved, not written again
    assert contents(folder / "data") == contents(folder / "whole")
    prepare_here(folder, monkeypatch, 1, 2)  # a late restart
    assert "already holds this text" in capsys.readouterr().out
    assert contents(folder / "data") == contents(folder / "whole")


def test_one_process_with_shards_goes_on_after_a_kill_too(folder):
    flags = ["--vocab-size", "300"]
    prepare(folder, 1, "--out", "whole", *flags)
    kept = kill_with_parts(start(folder, 0, 1, *flags), folder / "data", 2)
    assert not (folder / "data/meta.json").exists() and not list((folder / "data").glob("*.bin"))
    [stdout] = prepare(folder, 1, *flags)
    assert f"{len(kept)} of {N_PARTS} parts are complete already" in stdout and "training a tokenizer" not in stdout
    assert contents(folder / "data") == contents(folder / "whole")


def test_rank_0_names_the_missing_parts_and_waits(folder):
    zero = start(folder, 0, 3)
    lines = iter(zero.stderr.readline, "")
    line = next(line for line in lines if "missing" in line)
    assert (
        line.startswith("2 of 5 parts are complete")
        and "missing: part 2 (rank 1), part 3 (rank 2), part 5 (rank 1)" in line
    )
    assert not (folder / "data/meta.json").exists()
    finish([start(folder, 1, 3), start(folder, 2, 3), zero])
    assert (folder / "data/meta.json").exists()


@pytest.mark.slow
def test_a_kill_while_files_are_moved_needs_no_overwrite(folder, monkeypatch):
    prepare_here(folder, monkeypatch, 0, 1, "whole")
    code = f"""
import os, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from prepare_data import Config, main
from system import files
move = files.os.replace
def replace(source, target):
    if str(target).endswith("val_000001.bin") and ".prepare" not in str(target):
        os._exit(9)
    move(source, target)
files.os.replace = replace
main(Config(input=("text",), out=files.Path("data"), shard_tokens=2500))
"""
    environment = {**ENVIRONMENT, "WORLD_SIZE": "1"}
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=False).returncode == 9
    assert (folder / "data/train_000001.bin").exists() and not (folder / "data/meta.json").exists()
    prepare_here(folder, monkeypatch, 0, 1)
    assert contents(folder / "data") == contents(folder / "whole")


def test_two_processes_of_one_rank_do_not_write_one_part(folder, monkeypatch):
    prepare_here(folder, monkeypatch, 1, 2)
    (staging,) = (folder / "data").glob(".parts-*")
    (staging / "part_000002/part.json").unlink()
    with locked(staging / "part_000002.lock", "", ""):
        process = start(folder, 1, 2)
        assert "error: part 2 of 5 of data is being written by another run" in process.communicate()[1]
    assert process.returncode == 1


def test_changed_files_make_other_parts(folder, monkeypatch, capsys):
    prepare_here(folder, monkeypatch, 1, 2)
    (old,) = (folder / "data").glob(".parts-*")
    os.utime(folder / "text/0.jsonl", (1, 1))
    prepare_here(folder, monkeypatch, 1, 2)
    assert "already" not in capsys.readouterr().out
    prepare_here(folder, monkeypatch, 0, 2)
    assert f"data/{old.name} holds parts of a run with other settings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variables", "flags", "message"),
    [
        ({"WORLD_SIZE": "2"}, [], "the 2 processes cannot meet (RANK missing): unset these variables"),
        ({"RANK": "3"}, [], "RANK=3 and LOCAL_RANK=0 must be below WORLD_SIZE=1"),
        ({"WORLD_SIZE": "x"}, [], "WORLD_SIZE=x in the environment is not a whole number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, [], "RANK=-1 in the environment is not a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["--max-tokens", "9"], "--max-tokens takes the first tokens, which several"),
    ],
)
def test_what_several_processes_cannot_do_gets_one_line(folder, monkeypatch, variables, flags, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as error:
        main(Config(input=("text",), max_tokens=int(flags[1]) if flags else None))
    assert str(error.value).startswith(message) and not Path("data").exists()


def test_every_rank_refuses_a_folder_with_other_data(folder, monkeypatch):
    (folder / "data").mkdir()
    (folder / "data/train.bin").touch()
    for rank in range(2):
        with pytest.raises(UserError, match=r"^data/train\.bin exists: add --overwrite"):
            prepare_here(folder, monkeypatch, rank, 2)
    assert [path.name for path in (folder / "data").iterdir()] == ["train.bin"]


def test_a_refused_text_leaves_no_parts(folder, monkeypatch):
    monkeypatch.chdir(folder)
    Path("bad.jsonl").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        main(Config(input=("bad.jsonl",), out=Path("data"), shard_tokens=2500))
    Path("bad.jsonl").write_text('{"text": ""}')
    with pytest.raises(UserError, match="no text to train on"):
        main(Config(input=("bad.jsonl",), out=Path("data"), shard_tokens=2500))
    assert not Path("data").exists() or not list(Path("data").iterdir())


@pytest.fixture()
def web(tmp_path, monkeypatch):
    """Returns a function that writes a data set of the Hub in three files into the current folder."""
    monkeypatch.chdir(tmp_path)

    def add(path):
        texts = [f"page {i} of the web" for i in range(3000)]
        for k in range(3):
            file = tmp_path / path / f"train-{k:05}-of-00003.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({"text": texts[k * 1000 : (k + 1) * 1000]}), file)
        return texts

    return add


def test_the_files_of_a_hub_data_set_are_parts(web):
    texts = web("org/name")
    parts = open_corpus("org/name").parts(1)
    assert [text for part in parts for (text,) in part] == texts and len(parts) == 3
    main(Config(dataset="org/name", out=Path("data"), shard_tokens=4000))
    splits = [draw_held_out(texts[i * 1000 : (i + 1) * 1000], 0.1, 1337 + i) for i in range(3)]
    assert split_files(Path("data")) == expected(pair for part in splits for pair in part)


def test_the_parts_of_openwebtext_hold_out_the_rows_of_nanogpt(web):
    web("Skylion007/openwebtext/plain_text")
    corpus = OpenWebText(TEXTS["openwebtext"])
    parts = corpus.parts(1)
    assert len(parts) == 3 and [part.total for part in parts] == [1000] * 3
    assert [piece for part in parts for piece in part.pieces(0.1, 1)] == list(corpus.pieces(0.1, 1))


def test_the_first_shard_of_the_first_file_of_fineweb_edu_is_held_out(web):
    texts = web("HuggingFaceFW/fineweb-edu/sample/10BT")
    Path("HuggingFaceFW/fineweb-edu/README.md").write_text(
        "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
    )
    main(Config(dataset="fineweb-edu", out=Path("data"), shard_tokens=1000))
    everything = expected(("train", text) for text in texts)["train"]
    assert split_files(Path("data")) == {"val": everything[:1000], "train": everything[1000:]}


@pytest.mark.slow
def test_torchrun_prepares_in_processes_and_restarts_a_killed_one(folder):
    prepare(folder, 1, "--out", "whole", "--vocab-size", "300")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "--max-restarts", "2"]
    script = [str(REPOSITORY / "prepare_data.py"), *FLAGS, "--vocab-size", "300"]
    job = subprocess.Popen(
        [sys.executable, *launcher, *script], cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, encoding="utf-8",
    )  # fmt: skip
    while not part_folders(folder / "data"):
        assert job.poll() is None, job.communicate()[0][-2000:]
        time.sleep(0.001)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    output, _ = job.communicate(timeout=100)
    assert job.returncode == 0, output[-3000:]
    assert "complete already" in output
    assert contents(folder / "data") == contents(folder / "whole")
