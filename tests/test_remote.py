"""Text at URLs: a web server, the protocol of the Hub, and the memory file system of `fsspec`."""

import base64
import gzip
import http.server
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ENVIRONMENT, command, hub_environment, run_script
from hub_server import HubHandler

import train
from system.cli import without_secrets
from system.errors import UserError
from text.corpus import open_corpus
from text.prepare import prepare
from text.sources import find_files
from text.token_files import read_tokens
from text.tokenizer import gpt2
from training.parallel import Processes
from training.prepared import prepared

ONE, TWO = Processes(), Processes(world_size=2)
TEXTS = [f"Document {i}: naïve 日本 🙂 " + "word " * (i % 40) for i in range(60)]
NAMES = ["a.txt", "b.txt.gz", "c.jsonl", "d.jsonl.zst", "e.parquet", "f.json", "g.csv"]


class FileHandler(http.server.SimpleHTTPRequestHandler):
    """Answers with files and lists of folders; asks for the name ann and the password s3cret below /private."""

    requests: list[str] = []

    def do_GET(self):
        self.requests.append(self.path)
        login = f"Basic {base64.b64encode(b'ann:s3cret').decode()}"
        if self.path.startswith("/private") and self.headers.get("Authorization") != login:
            self.send_error(403)
        else:
            (super().do_GET if self.command == "GET" else super().do_HEAD)()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


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
    (root / "f.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    (root / "g.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in TEXTS), encoding="utf-8")
    (root / "deep/er/h.md").write_text("a deep one, with no <a href='a.txt'>links</a>")
    (root / "deep/i.bin").write_bytes(b"\0\1\2")
    return root


@pytest.fixture()
def address(folder, serve, monkeypatch) -> str:
    """The address of a web server of the folder."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return serve(partial(FileHandler, directory=str(folder)))


@pytest.fixture()
def memory(folder):
    """The URL of the same files in the memory of `fsspec`."""
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/www", recursive=True)
    yield "memory://www"
    store.rm("/www", recursive=True)


def documents(name: object) -> list[str]:
    return ["".join(document) for _, document in open_corpus("", [str(name)]).documents()]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_has_the_same_text_everywhere(folder, address, memory, name):
    expected = documents(folder / name)
    assert "".join(expected).count("日本") == len(TEXTS)
    assert documents(f"{memory}/{name}") == documents(f"{address}/{name}?download=1") == expected


def test_globs_and_folders_name_the_same_files_everywhere(folder, address, memory):
    for pattern, n in {"*.jsonl*": 2, "[ab].txt*": 2, "**/*.md": 1, "deep/": 1, "": 8}.items():
        expected = [Path(path).relative_to(folder).as_posix() for path in find_files([f"{folder}/{pattern}"])]
        assert len(expected) == n
        for base in (address, memory):
            urls = find_files([f"{base}/{pattern}"])
            assert [url.partition("www/")[2] or url.removeprefix(f"{address}/") for url in urls] == expected
    assert find_files([f"{address}/a.txt", f"{address}/*.txt"]) == [f"{address}/a.txt"]
    with pytest.raises(UserError, match=r"no text in .*\*\.tex: name files"):
        find_files([f"{address}/*.tex"])


def test_a_name_that_exists_is_no_glob(tmp_path):
    for name in ("a[1].txt", "a1.txt", "b[1]/c.txt", "b1/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for pattern, found in {"a[1].txt": ["a[1].txt"], "b[1]": ["b[1]/c.txt"], "a?.txt": ["a1.txt"]}.items():
        assert find_files([str(tmp_path / pattern)]) == [str(tmp_path / name) for name in found]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ADDRESS/none.txt", "404"),
        ("ADDRESS/private/a.txt", "403"),
        ("http://127.0.0.1:9/a.txt", "Connect"),
        ("s3://bucket/*.txt", "s3fs"),
        ("gs://bucket/a.txt", "gcsfs"),
        ("warp://host/a.txt", "Protocol not known"),
    ],
)
def test_what_cannot_be_read_is_one_line(address, monkeypatch, url, reason):
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)  # Python then finds no such module
    with pytest.raises(UserError, match=rf"cannot read \S+: .*{reason}") as error:
        documents(url.replace("ADDRESS", address).replace("://", "://ann:secret@", 1))
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def run_on_hub(serve, tmp_path: Path, *arguments: str) -> dict:
    """Runs `prepare_data.py` with a Hub whose files are in `hub`; returns the content of meta.json."""
    environment = hub_environment(serve(partial(HubHandler, tmp_path / "hub")), tmp_path / "cache")
    result = subprocess.run(
        command("prepare_data.py", *arguments, "--out", "data"),
        cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.glob("cache/**/*.parquet"))  # streamed, not stored
    return json.loads((tmp_path / "data/meta.json").read_text())


def test_files_of_the_hub_are_read_by_url_and_by_revision(folder, serve, tmp_path):
    root = tmp_path / "hub/org/name"
    root.mkdir(parents=True)
    (root / "main").symlink_to(folder)
    url = "hf://datasets/org/name/*.parquet"
    meta = run_on_hub(serve, tmp_path, "--input", url)
    assert meta["source"] == [url] and sum(split["documents"] for split in meta["splits"].values()) == len(TEXTS)
    for k in range(2):  # the Hub's own conversion of a data set that is a script
        path = root / f"refs/convert/parquet/plain_text/train/000{k}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": TEXTS[k::2]}), path)
    run_on_hub(serve, tmp_path, "--dataset", "org/name", "--revision", "refs/convert/parquet", "--overwrite")
    text = "".join(gpt2().decode(read_tokens(tmp_path / f"data/{split}.bin").tolist()) for split in ("train", "val"))
    assert sorted(text.split("<|endoftext|>")[:-1]) == sorted(TEXTS)


TINY = "--n-layer 1 --n-head 1 --n-embd 16 --block-size 32 --batch-size 2 --warmup-steps 1 --device cpu --max-steps 2"


@pytest.mark.parametrize(
    ("script", "written"),
    [
        ("prepare_data.py --out data/b.txt --input", "data/b.txt/meta.json"),
        pytest.param(f"train.py {TINY} --vocab-size 300 --out new.pt --data", "new.pt", marks=pytest.mark.slow),
    ],
)
def test_no_secret_of_a_url_is_printed_or_written(folder, address, tmp_path, monkeypatch, script, written):
    monkeypatch.setitem(ENVIRONMENT, "no_proxy", "127.0.0.1")
    (folder / "private").mkdir()
    (folder / "b.txt.gz").rename(folder / "private/b.txt.gz")
    url = f"{address.replace('://', '://ann:s3cret@')}/private/b.txt.gz?token=t0ken"
    result = run_script(tmp_path, script, url)
    assert result.returncode == 0 and (tmp_path / written).exists(), result.stderr
    assert "/private/b.txt.gz?token=t0ken" in FileHandler.requests
    meta, shown = json.loads((tmp_path / "data/b.txt/meta.json").read_text()), f"{address}/private/b.txt.gz?…"
    assert meta["source"] == [shown] and shown in meta["command"]
    refused = run_script(tmp_path, "prepare_data.py --out refused --input", url.replace("s3cret", "wr0ng"))
    assert refused.returncode == 1 and refused.stderr.splitlines()[-1].startswith(f"error: cannot read {shown}: 403")
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and folder not in path.parents]
    for secret in ("s3cret", "wr0ng", "t0ken", "ann:"):
        assert not any(secret in said.stdout + said.stderr for said in (result, refused))
        assert len(files) >= 3 and not any(secret.encode() in content for content in files)
    monkeypatch.chdir(tmp_path)  # a resumed run needs neither the text nor the secrets
    assert prepared_text(shown, train.Config(resume=True), gpt2(), ONE) == Path("data/b.txt")


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


def prepared_text(data, config, tokenizer, processes):
    """As `train.py` does it."""

    def prepare_it(data, folder, overwrite):
        return prepare(open_corpus("", [data]), tokenizer, folder, overwrite=overwrite)

    return prepared(data, [], "meta.json", config, processes, prepare_it)


def test_a_training_script_prepares_a_file_once_and_never_over_other_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("book.txt", "book.md"):
        Path(name).write_text("Some text. " * 100)
    assert prepared_text("./book.txt", train.Config(), 280, ONE) == Path("data/book")
    assert "bytes per token" in capsys.readouterr().out
    for data, processes in (("book.txt", ONE), ("data/book", TWO)):
        assert prepared_text(data, train.Config(), 280, processes) == Path("data/book")
    with pytest.raises(UserError, match="which holds other data: rename book.md"):
        prepared_text("book.md", train.Config(overwrite=True), 280, ONE)
    with pytest.raises(UserError, match="several processes cannot prepare book.txt"):
        prepared_text("book.txt", train.Config(), 280, TWO)
    for url in ("https://host/texts/", "s3://bucket/*.txt", "https://host"):
        with pytest.raises(UserError, match=r"takes the URL of one file, not .*prepare_data\.py"):
            prepared_text(url, train.Config(), gpt2(), ONE)
    capsys.readouterr()
    plan = prepared_text("book.md", train.Config(plan=True), 280, ONE)
    assert (plan / "train.bin").exists() and tmp_path not in plan.parents and not capsys.readouterr().out
