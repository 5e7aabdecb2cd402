"""What the tests share: the scripts as real processes, and a toy base model and chat model that they trained."""

from __future__ import annotations

import functools
import http.server
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from model import GPT

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are tiny, and test processes run side by side
os.environ["HF_HUB_OFFLINE"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what it runs in the background
ENVIRONMENT = {**os.environ, "https_proxy": "http://127.0.0.1:9", "PYTHONIOENCODING": "utf-8"}  # no network

TOY_SHAPE = [
    "--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--block-size", "64", "--batch-size", "4",
    "--optimizer", "adamw", "--eval-every", "10", "--save-every", "10", "--warmup-steps", "2", "--device", "cpu",
]  # fmt: skip


def random_model(**fields: Any) -> GPT:
    """Returns a random model in evaluation mode whose output has many different tokens; its context is 64 tokens."""
    import torch

    from model import GPT, GPTConfig

    torch.manual_seed(0)
    shape = {"block_size": 64, "vocab_size": 320, "n_tokens": 300, "n_layer": 2, "n_head": 2, "n_embd": 48}
    model = GPT(GPTConfig(**{**shape, **fields})).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    if model.wpe is not None:
        torch.nn.init.normal_(model.wpe.weight)
    return model


def command(script: str, *arguments: object) -> list[str]:
    """Returns the command line that runs a script of the project; flags without spaces may follow its name."""
    name, *flags = script.split()
    return [sys.executable, str(REPOSITORY / name), *flags, *map(str, arguments)]


class CommandServer:
    """Runs jobs in a folder, each in a process of its own that has imported torch already (command_server.py)."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "tests/command_server.py")],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )

    def run(
        self,
        folder: Path,
        job: dict,
        stdin: str = "",
        timeout: int = 240,
        environments: Iterable[dict[str, str]] = ({},),
    ) -> subprocess.CompletedProcess:
        """Runs a job in a process for each of the environments, which are additional variables; `stdin` is its standard
        input. Fails after `timeout` seconds."""
        with tempfile.TemporaryDirectory() as streams:
            paths = {name: Path(streams) / name for name in ("stdin", "stdout", "stderr")}
            for path in paths.values():
                path.write_text(stdin if path.name == "stdin" else "", encoding="utf-8")
            job |= {"folder": str(folder), "environments": [{**ENVIRONMENT, **more} for more in environments]}
            job |= {name: str(path) for name, path in paths.items()}
            print(json.dumps(job), file=self.process.stdin, flush=True)
            if not select.select([self.process.stdout], [], [], timeout)[0]:
                os.killpg(self.process.pid, signal.SIGKILL)
                command_server.cache_clear()
                pytest.fail(f"{job} takes more than {timeout} s")
            status = int(self.process.stdout.readline())
            out, err = (paths[name].read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(job, status, out, err)


@functools.cache
def command_server() -> CommandServer:
    """Returns the server of this test process; it ends when its standard input does."""
    return CommandServer()


def run_script(
    folder: Path, script: str, *arguments: object, stdin: str = "", timeout: int = 240
) -> subprocess.CompletedProcess:
    """Runs a script in a folder as a process of its own; `stdin` is its standard input."""
    [_, path, *rest] = command(script, *arguments)
    return command_server().run(folder, {"script": path, "arguments": rest}, stdin, timeout)


def run_fresh(
    folder: Path, script: str, *arguments: object, timeout: int = 240, **variables: str
) -> subprocess.CompletedProcess:
    """Runs a script in a Python of its own, with variables that are read while torch is imported."""
    return subprocess.run(
        command(script, *arguments), cwd=folder, env={**ENVIRONMENT, **variables}, stdin=subprocess.DEVNULL,
        capture_output=True, encoding="utf-8", timeout=timeout,
    )  # fmt: skip


def run_in_processes(folder: Path, script: str, *arguments: object, n: int = 2) -> subprocess.CompletedProcess:
    """Runs a script in `n` processes, with the variables that torchrun and other schedulers set."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)]
    [_, path, *rest] = command(script, *arguments)
    return command_server().run(folder, {"script": path, "arguments": rest}, environments=ranks)


def succeed(folder: Path, script: str, *arguments: object, stdin: str = "") -> str:
    """Runs a script that must succeed; returns its standard output."""
    result = run_script(folder, script, *arguments, stdin=stdin)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def log(path: Path) -> list[dict]:
    """Returns the lines of a run's log, without the times."""
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def wait_for_log(path: Path, step: int, process: subprocess.Popen) -> None:
    """Waits until a run has logged a step. Fails after two minutes, or if the run ends before."""
    deadline = time.monotonic() + 120
    while not path.exists() or not any(entry["step"] >= step for entry in log(path)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-2000:]
        time.sleep(0.01)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all steps have run at toy size on bundled text: data, base model, chat model."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "text").mkdir()
    samples = (REPOSITORY / "data/samples/chat.jsonl").read_text(encoding="utf-8").splitlines()
    for i in range(40):
        text = "\n".join(samples[i * 5 : i * 5 + 5]) + " naïve 日本 🙂\n"
        (folder / "text" / f"{i:02}.txt").write_text(text, encoding="utf-8")
    for line in (
        "prepare_data.py --input text --vocab-size 400 --out data/toy",
        f"train.py --data data/toy --out checkpoints/toy.pt --max-steps 20 {' '.join(TOY_SHAPE)}",
        "prepare_sft_data.py --dataset builtins-qa --max-conversations 60 --out data/toy --block-size 64",
        "train_sft.py --model checkpoints/toy.pt --data data/toy --out checkpoints/sft.pt "
        "--epochs 1 --batch-size 64 --learning-rate 1e-3 --warmup-steps 1 --device cpu",
    ):
        succeed(folder, line)
    return folder


@pytest.fixture
def here(toy, tmp_path, monkeypatch) -> Path:
    """A folder of one's own, the current one, with the toy's data in `data` and its model in
    `checkpoints/pretrained.pt`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy / "data/toy", tmp_path / "data")
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(toy / "checkpoints/toy.pt", tmp_path / "checkpoints/pretrained.pt")
    return tmp_path


def pretrain(**options: Any) -> dict[str, Any]:
    """Pre-trains a toy on `data` in this process; returns what `--out` holds, or {}."""
    import train

    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "batch_size": 4, "device": "cpu"}
    steps = {"max_steps": 6, "warmup_steps": 0, "log_every": 1, "eval_every": 3, "save_every": 3, "eval_tokens": 512}
    config = train.Config(**{**shape, **steps, "learning_rate": 3e-3, "out": Path("checkpoints/a.pt"), **options})
    train.main(config)
    return contents(config.out) if config.out.exists() else {}


def fine_tune(**options: Any) -> dict[str, Any]:
    """Fine-tunes `checkpoints/pretrained.pt` on the conversations in `data`; returns what `--out` holds."""
    import train_sft

    steps = {"max_steps": 6, "batch_size": 16, "warmup_steps": 0, "log_every": 1, "eval_every": 3, "save_every": 3}
    config = train_sft.Config(**{**steps, "learning_rate": 3e-3, "min_lr": 3e-3, "device": "cpu", **options})
    train_sft.main(config)
    return contents(config.out)


def contents(path: Path | str) -> dict[str, Any]:
    """Returns what a checkpoint file holds."""
    import torch

    return torch.load(path, weights_only=True)


@pytest.fixture()
def serve() -> Iterator[Callable[[type[http.server.BaseHTTPRequestHandler]], str]]:
    """A function that starts an HTTP server with a handler and returns its address; the test's end stops the server."""
    servers = []

    def start(handler: type[http.server.BaseHTTPRequestHandler]) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()  # seconds to stop
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture()
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[dict]], None]:
    """A function that writes rows as Parquet where `load_dataset("org/name")` finds them, in the current folder."""
    monkeypatch.chdir(tmp_path)

    def add(path: str, rows: list[dict]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / path)

    return add


def hub_environment(address: str, cache: Path) -> dict[str, str]:
    """Returns the environment of a process that finds the Hugging Face Hub at an address and caches in a folder."""
    return {
        **ENVIRONMENT,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": address,
        "HF_HOME": str(cache),
        "no_proxy": "127.0.0.1",
    }


def split_files(folder: Path) -> dict[str, list[int]]:
    """Returns the ids of a folder's token files by split, shards in order."""
    from text.token_files import read_token_meta, read_tokens

    files = read_token_meta(folder)["files"]
    return {split: [i for name in names for i in read_tokens(folder / name).tolist()] for split, names in files.items()}


def expected(pairs) -> dict[str, list[int]]:
    """Returns the ids that (split, text) pairs must become, by the simplest use of the tokenizer."""
    from text.tokenizer import gpt2

    ids = {"train": [], "val": []}
    for split, text in pairs:
        ids[split] += [*gpt2().encoding.encode_ordinary(text), 50256]
    return ids


@pytest.fixture
def page_folder(toy, tmp_path, monkeypatch) -> Path:
    """A working folder with the toy models and their logs."""
    (tmp_path / "checkpoints").mkdir()
    for name in ("toy.pt", "toy.last.pt", "toy.jsonl", "sft.pt", "sft.jsonl"):
        shutil.copy2(toy / "checkpoints" / name, tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    return tmp_path
