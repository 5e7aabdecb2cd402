"""Text at URLs: a web server that misbehaves, the protocol of the Hub, and the memory file system of `fsspec`."""

import gzip
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ENVIRONMENT, REPOSITORY, command, hub_environment, run_script
from file_server import FileHandler, Site
from hub_server import HubHandler
from text.corpora import Files, find_files
from text.readers import Notes

import prepare_data
import train
from system.cli import without_secrets
from system.errors import UserError
from text import remote
from text.conversations import read_file
from text.labelled import read_table
from training.prepared import prepare_first

TEXTS = [f"Document {i}: naïve 日本 🙂 " + "word " * (i % 40) for i in range(60)]


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """A folder with the same texts in files of many kinds."""
    root = tmp_path / "www"
    (root / "deep/er").mkdir(parents=True)
    whole, lines = "\n".join(TEXTS), "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (root / "a.txt").write_text(whole, encoding="utf-8")
    (root / "b.txt.gz").write_bytes(gzip.compress(whole.encode()))
    (root / "c.jsonl").write_text(lines)
    with pa.CompressedOutputStream(str(root / "d.jsonl.zst"), "zstd") as file:
        file.write(lines.encode())
    pq.write_table(pa.table({"text": TEXTS}), root / "e.parquet", row_group_size=7)
    (root / "e.parquet.gz").write_bytes(gzip.compress((root / "e.parquet").read_bytes()))
    (root / "f.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    (root / "g.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in TEXTS), encoding="utf-8")
    (root / "deep/er/h.md").write_text("a deep one")
    (root / "deep/i.bin").write_bytes(b"\0\1\2")
    return root


@pytest.fixture()
def site(folder, serve, monkeypatch) -> Iterator[tuple[Site, str]]:
    """A server of the folder, and its address; tries follow each other at once."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote, "WAITS", (0.01, 0.01, 0.01))
    site = Site(folder)
    return site, serve(partial(FileHandler, site))


@pytest.fixture()
def memory(folder) -> Iterator[str]:
    """The URL of the same files in the memory of `fsspec`."""
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/www", recursive=True)
    yield "memory://www"
    store.rm("/www", recursive=True)


def documents(*inputs: object) -> list[str]:
    """Returns the documents of files, folders, globs or URLs."""
    corpus = Files(map(str, inputs))
    texts = ["".join(document) for document in corpus]
    assert corpus.total is None or corpus.position == corpus.total
    return texts


NAMES = ["a.txt", "b.txt.gz", "c.jsonl", "d.jsonl.zst", "e.parquet", "e.parquet.gz", "f.json", "g.csv"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_has_the_same_text_everywhere(folder, site, memory, name):
    expected = documents(folder / name)
    assert "".join(expected).count("日本") == len(TEXTS)
    server, address = site
    assert documents(f"{memory}/{name}") == documents(f"{address}/{name}") == expected
    server.has_ranges = server.tells_size = False
    assert documents(f"{address}/{name}") == expected


def test_globs_and_folders_name_the_same_files_everywhere(folder, site, memory):
    _, address = site
    for pattern, n in {"*.jsonl*": 2, "[ab].txt*": 2, "**/*.md": 1, "deep/": 1, "": 9}.items():
        expected = [path.relative_to(folder).as_posix() for path in find_files([f"{folder}/{pattern}"])]
        assert len(expected) == n
        for base in (address, memory):
            urls = [str(file) for file in find_files([f"{base}/{pattern}"])]
            assert [url.partition("www/")[2] or url.removeprefix(f"{address}/") for url in urls] == expected
    assert [str(file) for file in find_files([f"{address}/a.txt", f"{address}/*.txt"])] == [f"{address}/a.txt"]
    with pytest.raises(UserError, match=r"no text in .*\*\.tex: .* its server must list it"):
        find_files([f"{address}/*.tex"])


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("tells_size", [True, False])
@pytest.mark.parametrize("name", ["a.txt", "d.jsonl.zst", "e.parquet"])
def test_a_broken_connection_loses_no_text(folder, site, capsys, name, has_ranges, tells_size):
    server, address = site
    server.has_ranges, server.tells_size = has_ranges, tells_size
    corpus = Files([f"{address}/{name}"])
    server.breaks_after = [100, 90, 80]
    assert ["".join(document) for document in corpus] == documents(folder / name)
    assert not server.breaks_after and "trying again" in capsys.readouterr().err


def test_a_broken_connection_is_resumed_at_the_byte_reached(folder, site):
    """Less what had arrived and was not read yet, which is dropped: up to 350 kB were seen on a busy machine."""
    server, address = site
    (folder / "long.txt").write_text("many words " * 300_000)
    corpus = Files([f"{address}/long.txt"])
    server.breaks_after, server.requests, buffer = [1_000_000] * 2, [], 2**19
    assert "".join(*corpus) == "many words " * 300_000
    starts = [int(request.partition("bytes=")[2].rstrip("-") or 0) for request in server.requests]
    assert len(starts) == 3 and 1_000_000 - buffer <= starts[1] <= 1_000_000
    assert starts[1] + 1_000_000 - buffer <= starts[2] <= starts[1] + 1_000_000
    assert server.bytes_sent <= 3_300_000 + 2 * buffer


def test_tries_end_in_one_line_and_each_waits_longer(site, capsys):
    server, address = site
    server.statuses = [503] * 20
    with pytest.raises(UserError, match=r"cannot read http.*/a.txt: HTTP status 503; tried 4 times"):
        documents(f"{address}/a.txt")
    assert capsys.readouterr().err.count("trying again in") == 3
    server.statuses = [503] * 3  # asks with HEAD and GET
    assert len(documents(f"{address}/a.txt")) == 1
    server.breaks_after = [10] + [0] * 20
    with pytest.raises(UserError, match="tried 4 times"):
        documents(f"{address}/a.txt")


@pytest.mark.parametrize(
    ("status", "reason"), [(404, "no such file"), (403, "403 .check your credentials"), (410, "410")]
)
def test_what_no_new_try_mends_is_said_at_once(site, capsys, status, reason):
    server, address = site
    server.statuses = [status] * 20
    with pytest.raises(UserError, match=rf"cannot read http\S*/a.txt: .*{reason}"):
        documents(f"{address}/a.txt")
    assert len(server.statuses) == 18 and not capsys.readouterr().err


def test_a_silent_server_counts_as_broken(folder, site, monkeypatch):
    monkeypatch.setattr(remote, "SILENT_SECONDS", 0.3)
    server, address = site
    server.pauses = [1.5]
    assert documents(f"{address}/a.txt") == documents(folder / "a.txt")
    assert len(server.requests) == 3 and "bytes=" in server.requests[-1]


def test_a_file_that_changes_between_two_tries_is_refused(site):
    server, address = site
    corpus = Files([f"{address}/a.txt"])
    server.breaks_after = [500]
    raw = corpus.paths[0].open()
    assert raw.read(400)
    server.version = "2"
    with pytest.raises(UserError, match="changed while it was read"):
        raw.read()


def test_of_parquet_only_the_column_of_text_is_fetched(folder, site):
    noise = random.Random(1).randbytes(3_000_000)
    rows = {"text": TEXTS, "image": [noise[i * 50_000 : (i + 1) * 50_000] for i in range(60)]}
    pq.write_table(pa.table(rows), folder / "wide.parquet", row_group_size=20)
    server, address = site
    assert documents(f"{address}/wide.parquet") == TEXTS
    assert server.bytes_sent < 0.05 * (folder / "wide.parquet").stat().st_size
    server.has_ranges = False
    assert documents(f"{address}/wide.parquet") == TEXTS


def test_a_file_larger_than_the_buffers_streams_in_constant_memory(folder, serve):
    with open(folder / "large.txt", "wb") as file:
        file.truncate(120_000_000)
    code = (
        "import sys, resource; sys.path.insert(0, sys.argv[1]); from text.corpora import find_files\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "def read(url):\n"
        "    [file] = find_files([url]); n = 0\n"
        "    with file.open() as stream:\n"
        "        while data := stream.read(2**20): n += len(data)\n"
        "    return n\n"
        "read(sys.argv[2] + '/a.txt'); before = peak(); print(read(sys.argv[2] + '/large.txt'), peak() - before)"
    )
    arguments = [sys.executable, "-c", code, str(REPOSITORY), serve(partial(FileHandler, Site(folder)))]
    result = subprocess.run(arguments, env={**ENVIRONMENT, "no_proxy": "127.0.0.1"}, capture_output=True, text=True)
    n_bytes, megabytes = map(int, result.stdout.split())
    assert n_bytes == 120_000_000 and megabytes < 40, result.stderr


def test_the_token_files_are_those_of_local_files(folder, memory, tmp_path):
    for name, source in {"local": str(folder / "*.jsonl"), "remote": f"{memory}/*.jsonl"}.items():
        prepare_data.main(prepare_data.Config(input=(source,), out=tmp_path / name))
    for name in ("train.bin", "val.bin"):
        assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "remote" / name).read_bytes()


def test_files_of_the_hub_are_read_by_url(folder, serve, tmp_path):
    (tmp_path / "hub/org/name").mkdir(parents=True)
    (tmp_path / "hub/org/name/main").symlink_to(folder)
    environment = hub_environment(serve(partial(HubHandler, tmp_path / "hub")), tmp_path / "cache")
    url = "hf://datasets/org/name/*.parquet"
    result = subprocess.run(
        command("prepare_data.py", "--input", url, "--out", "data"),
        cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    meta = json.loads((tmp_path / "data/meta.json").read_text())
    assert meta["source"] == [url] and sum(split["documents"] for split in meta["splits"].values()) == len(TEXTS)
    assert not list(tmp_path.glob("cache/**/*.parquet"))  # streamed, not stored


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/*.txt", "s3fs"), ("gs://bucket/a.txt", "gcsfs")])
def test_a_missing_package_is_named(monkeypatch, url, package):
    monkeypatch.setitem(sys.modules, package, None)  # Python then finds no such module
    with pytest.raises(UserError, match=rf"needs a package that is missing .*: pip install {package}$"):
        find_files([url])


def test_an_unknown_scheme_is_one_line():
    with pytest.raises(UserError, match="cannot read warp://host/a.txt: Protocol not known"):
        find_files(["warp://ann:secret@host/a.txt"])


TRAIN = (
    "train.py --n-layer 1 --n-head 1 --n-embd 16 --block-size 32 --batch-size 2 --warmup-steps 1 --device cpu "
    "--max-steps 2 --vocab-size 300 --eval-tokens 64 --out new.pt --data"
)


@pytest.mark.parametrize(
    ("script", "written"),
    [
        ("prepare_data.py --out data/b.txt --input", "data/b.txt/meta.json"),
        pytest.param(TRAIN, "new.pt", marks=pytest.mark.slow),
    ],
)
def test_no_secret_of_a_url_is_printed_or_written(folder, serve, tmp_path, monkeypatch, script, written):
    monkeypatch.setitem(ENVIRONMENT, "no_proxy", "127.0.0.1")
    server = Site(folder, login="ann:s3cret")
    address = serve(partial(FileHandler, server))
    url = f"{address.replace('://', '://ann:s3cret@')}/b.txt.gz?token=t0ken"
    result = run_script(tmp_path, script, url)
    assert result.returncode == 0 and (tmp_path / written).exists(), result.stderr
    assert "GET /b.txt.gz?token=t0ken" in server.requests
    meta, shown = json.loads((tmp_path / "data/b.txt/meta.json").read_text()), f"{address}/b.txt.gz?…"
    assert meta["source"] == [shown] and shown in meta["command"]
    server.statuses = [403] * 100
    refused = run_script(tmp_path, "prepare_data.py --out refused --input", url)
    assert refused.returncode == 1 and refused.stderr.splitlines()[-1].startswith(f"error: cannot read {shown}: HTTP")
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and folder not in path.parents]
    for secret in ("s3cret", "t0ken", "ann:"):
        assert not any(secret in said.stdout + said.stderr for said in (result, refused))
        assert len(files) >= 3 and not any(secret.encode() in content for content in files)
    monkeypatch.chdir(tmp_path)  # a resumed run needs neither the text nor the secrets
    resumed = train.Config(data=shown, resume=True)
    assert prepare_first(shown, (), "meta.json", resumed, 1, lambda *_: pytest.fail("prepared")) == Path("data/b.txt")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://key:pass@bucket/a?.txt", "s3://bucket/a?.txt"),  # a glob
        ("--input=https://ann:p@ss@host:80/a.txt?sig=x&y#z", "--input=https://host:80/a.txt?…"),
        ("https:/ann:pass@host/a", "https:/host/a"),  # a URL that was a Path
        ("HTTPS://Token@host/a#key", "HTTPS://host/a#…"),
        ("403, url='http://h/a?t=1' now", "403, url='http://h/a?… now"),
        ("https://host/a?t=1 and https://host/a?…: HTTP", "https://host/a?… and https://host/a?…: HTTP"),
        ("write to ann@host or C:/a@b", "write to ann@host or C:/a@b"),
        ("hf://datasets/org/name@refs%2Fpr%2F1/a.txt", "hf://datasets/org/name@refs%2Fpr%2F1/a.txt"),
    ],
)
def test_secrets_are_cut_out_of_any_text(text, expected):
    assert without_secrets(text) == expected == without_secrets(expected)


@pytest.mark.parametrize("url", ["https://host/texts/", "s3://bucket/*.txt", "https://host"])
def test_a_training_script_takes_the_url_of_one_file(url):
    with pytest.raises(UserError, match=r"takes the URL of one file, not .*prepare_data\.py"):
        prepare_first(url, (), "meta.json", train.Config(data=url), 1, lambda *_: pytest.fail("prepared"))


READERS: list[Callable[[Path], object]] = [
    lambda path: list(read_file(path, Notes())),
    lambda path: read_table(path, "text", "label", Notes()),
]


@pytest.mark.parametrize("read", READERS)
def test_chats_and_labelled_tables_are_read_from_paths_only(read):
    with pytest.raises(UserError, match=r"^https:/host/a\.jsonl is a URL, which only prepare_data\.py and train\.py"):
        read(Path("https://ann:secret@host/a.jsonl"))


def test_a_url_of_chats_is_one_line(tmp_path):
    result = run_script(tmp_path, "prepare_sft_data.py", "--input", "https://ann:secret@host/a.jsonl", "--out", "new")
    assert result.returncode == 1 and "download the file" in result.stderr.splitlines()[-1]
    assert "secret" not in result.stderr and not list(tmp_path.glob("new/*"))
