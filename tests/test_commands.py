"""The commands as users type them: one walk through all of them, and one line for every plausible mistake."""

from __future__ import annotations

import array
import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, contents, log, run_fresh, succeed

from system.cli import parse
from system.errors import UserError


def test_the_steps_leave_models_logs_and_plots(toy):
    for name in ("toy", "sft"):
        assert {"model", "config", "tokenizer", "history"} <= contents(toy / f"checkpoints/{name}.pt").keys()
        losses = [entry["val_loss"] for entry in log(toy / f"checkpoints/{name}.jsonl") if "val_loss" in entry]
        assert losses[-1] < losses[0] - 0.1
        assert (toy / f"plots/{name}_loss.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in toy.rglob(".*") if path.suffix in (".tmp", ".lock")]


def test_a_model_is_used_evaluated_and_exported_and_the_export_is_used(toy):
    text = (toy / "text/39.txt").read_text(encoding="utf-8")
    figures = []
    succeed(toy, "export.py --model checkpoints/toy.pt --out exported")
    for model in ("checkpoints/toy.pt", "exported"):
        found = succeed(toy, "evaluate.py --device cpu --model", model, stdin=text)
        figures.append([float(figure) for figure in re.findall(r"\d\.\d+", found)])
        generate = ["generate.py", "--model", model, "--device", "cpu", "--max-new-tokens", "5", "--greedy"]
        assert succeed(toy, *generate, "--prompt", "What is 日本").startswith("What is 日本")
    assert len(figures[0]) >= 2 and figures[1] == pytest.approx(figures[0], rel=1e-3)
    assert (toy / "exported/model.safetensors").exists() and (toy / "exported/README.md").exists()
    chat = "generate.py --model checkpoints/sft.pt --chat --greedy --max-new-tokens 5 --device cpu"
    first, second = succeed(toy, chat, stdin="Hello\n/reset\nHello\n").splitlines()
    assert first == second


def test_alpaca_instructions_end_to_end(toy):
    entries = [
        {"instruction": f"Add {i} and 1.", "input": "" if i % 2 else "numbers", "output": str(i + 1)} for i in range(30)
    ]
    (toy / "alpaca.json").write_text(json.dumps(entries))
    prepare = "--input alpaca.json --template alpaca --tokenizer data/toy/tokenizer.json --block-size 64"
    succeed(toy, f"prepare_sft_data.py {prepare} --out data/alpaca")
    model = "--data data/alpaca --model checkpoints/toy.pt --out checkpoints/alpaca.pt"
    succeed(toy, f"train_sft.py {model} --max-steps 2 --device cpu")
    instruction = ["--instruction", "Add 2 and 1.", "--context", "numbers"]
    succeed(toy, "generate.py --model checkpoints/alpaca.pt --device cpu", *instruction, "--max-new-tokens", "5")


@pytest.mark.slow
def test_the_demo_runs_through(tmp_path):
    shutil.copy(REPOSITORY / "data/samples/chat.jsonl", tmp_path / "my.txt")
    arguments = ["--input", "my.txt", "--vocab-size", "400", "--max-steps", "3", "--sft-steps", "3"]
    result = run_fresh(tmp_path, "demo.py", *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.findall(r"^=== (\d|Done)", result.stdout, re.MULTILINE) == [*"123456", "Done"]
    assert "bits per byte" in result.stdout and result.stdout.count(" answered word for word (") == 2
    plots = sorted(path.name for path in (tmp_path / "plots/demo").iterdir())
    assert plots == ["pretrained_loss.png", "sft_loss.png"]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "data", "my.txt", "plots"}


SHORT = {
    "TRAIN": "train --data data/toy --out new.pt",
    "SFT": "train_sft --data data/toy --out new.pt --model checkpoints/toy.pt",
    "CLASSIFIER": "train_classifier --model checkpoints/toy.pt --out new.pt",
    "PREPARE": "prepare_data --out data/new",
    "PREPARE_SFT": "prepare_sft_data --out data/new",
    "GENERATE": "generate --prompt x --model",
}
SMALL = "--n-layer 1 --n-head 1 --n-embd 16 --max-steps 1"
MISTAKES = [  # exit status, a part of the message, the command
    (2, "at least 1", "train --max-steps 0"),
    (2, "exclude each other", "train --resume --overwrite"),
    (2, "must end in .pt", "TRAIN --out checkpoints/new"),
    (2, "files for --resume end in .last.pt", "TRAIN --out a.last.pt"),
    (2, "no preset 'gpt5': choose from gpt2, gpt2-medium", "train --preset gpt5"),
    (2, "--beta2 must be", "TRAIN --beta2 1.5"),
    (2, "--fsdp shards over several processes: start the run with torchrun", f"TRAIN --fsdp {SMALL}"),
    (2, "at least 1", "SFT --epochs 0"),
    (2, "together below 1", "CLASSIFIER --val-fraction 0.5 --test-fraction 0.5"),
    (2, "--train-layers 9: the model has 2 blocks", "CLASSIFIER --input t.jsonl --train-layers 9"),
    (2, "--context belongs to --instruction", "GENERATE x --context y"),
    (2, "--temperature", "GENERATE x --temperature -1"),
    (2, "--top-p", "GENERATE x --top-p 0"),
    (2, "exclude", "GENERATE x --chat"),
    (2, "exclude each other", "classify x --input bad/latin1.txt"),
    (1, "run prepare_data.py first", "TRAIN --data data/none"),
    (1, "cannot fetch shakespeare", "train --preset shakespeare --out new.pt"),
    (1, "no checkpoint", "TRAIN --init-from checkpoints/none.pt"),
    (1, "not a checkpoint", "TRAIN --init-from bad/notes.pt"),
    (1, "too few", f"TRAIN --block-size 100000 {SMALL}"),
    (1, "no device", f"TRAIN --device cuda:77 {SMALL}"),
    (1, "is damaged", "TRAIN --data bad/meta"),
    (1, "does not have", f"TRAIN --data bad/ids {SMALL}"),
    (1, "do not fit its meta.json", f"TRAIN --data bad/short {SMALL}"),
    (1, "tokenizer", "TRAIN --data data/other --init-from checkpoints/toy.pt"),
    (1, "checkpoints/toy.pt exists: add --resume to continue that run, --overwrite", "TRAIN --out checkpoints/toy.pt"),
    (1, "is of the kind 'sft'", "TRAIN --resume --out checkpoints/sft.pt"),
    (1, "is of the kind 'sft'", "SFT --resume --out checkpoints/sft.pt --lora-rank 2"),
    (1, "in data/toy, which holds other data: rename toy.txt", "TRAIN --data toy.txt --overwrite"),
    (1, "the run would write to toy.jsonl, which it reads", "TRAIN --data toy.jsonl --out toy.pt --overwrite"),
    (1, "no checkpoint", "SFT --model checkpoints/none.pt"),
    (1, "run prepare_sft_data.py first", "SFT --data data/other"),
    (1, "is a classifier", "SFT --model bad/classifier.pt"),
    (1, "put that file back", "SFT --model bad/adapter.pt"),
    (1, "the run would write to t.jsonl, which it reads", "CLASSIFIER --input t.jsonl --out t.pt --overwrite"),
    (1, "no column 'text', but ham", "CLASSIFIER --input bad/labels.tsv"),
    (
        1,
        "the label 'rare' has fewer than three texts",
        "CLASSIFIER --input bad/labels.tsv --label-column 1 --text-column 2",
    ),
    (1, "all rows have the label 'ham'", "CLASSIFIER --input bad/one_label.tsv --label-column 1 --text-column 2"),
    (1, "Hub", "CLASSIFIER --dataset sms-spam"),
    (1, "not a classifier", "classify --model checkpoints/toy.pt x"),
    (1, "no checkpoint", "classify --model checkpoints/none.pt x"),
    (1, "is not UTF-8", "classify --model bad/classifier.pt --input bad/latin1.txt"),
    (1, "bad/ids/val.bin holds the id", "evaluate --model checkpoints/toy.pt --data bad/ids/val.bin"),
    (1, "no checkpoint", "GENERATE checkpoints/none.pt"),
    (1, "is a classifier", "GENERATE bad/classifier.pt"),
    (1, "only completes text", "generate --model checkpoints/toy.pt --chat"),
    (1, "cannot read none.txt", "PREPARE --input none.txt"),
    (1, "run prepare_data.py first", "PREPARE --inspect bad"),
    (1, "data/toy/train.bin exists: add --overwrite", "prepare_data --input text --out data/toy"),
    (1, "sft_train.bin exists: add --overwrite", "prepare_sft_data --dataset builtins-qa --out data/toy"),
    (1, "Hub", "PREPARE_SFT --dataset oasst1"),
]


@pytest.fixture(scope="module")
def bad(toy, tmp_path_factory) -> Path:
    """A copy of the toy's folder, with damaged and foreign files."""
    folder = tmp_path_factory.mktemp("bad") / "toy"
    shutil.copytree(toy, folder)
    for name in ("bad/meta", "bad/ids", "bad/short"):
        (folder / name).mkdir(parents=True)
    for name, content in {
        "bad/notes.pt": b"hello",
        "bad/meta/meta.json": b"{",
        "bad/labels.tsv": b"ham\tsee you\nspam\twin\nham\tbye\nspam\tfree\nham\thome\nspam\tnow\nrare\tx\n",
        "bad/one_label.tsv": b"ham\tsee you\nham\tbye\n",
        "bad/latin1.txt": "naïve".encode("latin-1"),
        "my.txt": b"some text",
        "toy.txt": b"not what data/toy was made of",
        "toy.jsonl": b'{"prompt": "x", "response": "y"}\n',
        "t.jsonl": b"".join(b'{"text": "%d", "label": "%d"}\n' % (i, i % 2) for i in range(20)),
    }.items():
        (folder / name).write_bytes(content)
    for name, tokens in (("ids", [60_000] * 5000), ("short", [1] * 5000)):  # GPT-2's ids end before 60,000
        for split in ("train", "val"):
            (folder / f"bad/{name}/{split}.bin").write_bytes(array.array("H", tokens).tobytes())
    meta = {"files": ["train.bin", "val.bin"], "tokenizer": "gpt2", "splits": {"train": {"tokens": 6000, "bytes": 1}}}
    (folder / "bad/short/meta.json").write_text(json.dumps(meta))
    good = contents(folder / "checkpoints/toy.pt")
    shape = {**good["config"], "n_classes": 2, "tie_weights": False}
    weights = {**good["model"], "lm_head.weight": torch.zeros(2, 32)}
    classifier = {**good, "kind": "classifier", "labels": ["a", "b"], "config": shape, "model": weights}
    adapter = contents(REPOSITORY / "tests/samples/lora.pt")
    for name, state in {
        "classifier": classifier,
        "adapter": {**adapter, "lora": {**adapter["lora"], "base": "gone.pt"}},
    }.items():
        torch.save(state, folder / f"bad/{name}.pt")
    succeed(folder, "prepare_data.py --input text --vocab-size 300 --out data/other")
    return folder


@pytest.mark.parametrize(("status", "message", "line"), MISTAKES, ids=[line[:60] for _, _, line in MISTAKES])
def test_a_mistake_costs_one_line_and_leaves_nothing_behind(bad, monkeypatch, status, message, line):
    monkeypatch.chdir(bad)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network
    first, *rest = line.split()
    name, *arguments = [*SHORT.get(first, first).split(), *rest]
    script = importlib.import_module(name)
    with pytest.raises(UserError) as error:
        script.main(parse(script.Config, arguments, getattr(script, "PRESETS", None)))
    assert message in str(error.value) and error.value.status == status and "\n" not in str(error.value)
    assert not list(Path().rglob("*new*/*")) and not list(Path().rglob("new.*"))
