"""Damaged and foreign files: each costs one line, and nothing in them is executed."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from system.errors import UserError
from training.evaluation import mean_loss
from training.loader import Conversations
from weights import checkpoint
from weights.loading import load_checkpoint

SAMPLES = Path(__file__).parent / "samples"
NOT_OURS = "is not a checkpoint of this project, or damaged"
MISFIT = "its weights do not fit its config"


def error_of(read: Callable[[], object]) -> str:
    """Returns the one line in which a reader must end."""
    with pytest.raises(UserError) as error:
        read()
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    return str(error.value)


class Call(str):
    """A command that its pickle runs when it is read."""

    def __reduce__(self):
        return os.system, (str(self),)


@pytest.mark.parametrize("form", ["of torch", "with a call among the metadata", "plain pickle", "Hugging Face's"])
def test_nothing_in_a_file_is_executed(tmp_path, form):
    call, path = Call(f"touch {tmp_path}/executed"), tmp_path / "x.pt"
    if form == "of torch":
        torch.save(call, path)
    elif form == "with a call among the metadata":
        torch.save({**torch.load(SAMPLES / "base.pt", weights_only=True), "history": call}, path)
    elif form == "plain pickle":
        path.write_bytes(pickle.dumps(call))
    else:
        path = tmp_path / "hf"
        path.mkdir()
        (path / "config.json").write_text('{"model_type": "gpt2"}')
        torch.save(call, path / "pytorch_model.bin")
    message = error_of(lambda: load_checkpoint(path, verify=form == "of torch"))
    assert ("only weights in safetensors" if form == "Hugging Face's" else NOT_OURS) in message
    assert not (tmp_path / "executed").exists()


def test_cut_and_foreign_files_cost_one_line(tmp_path):
    path, whole = tmp_path / "x.pt", (SAMPLES / "base.pt").read_bytes()
    for content in (b"hello", *(whole[:n] for n in (0, 1, 100, 10_000, 24_000))):
        path.write_bytes(content)
        for verify in (False, True):
            assert NOT_OURS in error_of(lambda verify=verify: load_checkpoint(path, verify))
    for contents in ([1], torch.zeros(3), {"weights": torch.zeros(3)}, {"model_args": 1, "model": 2}):
        torch.save(contents, path)
        assert "or damaged" in error_of(lambda: load_checkpoint(path))
    (tmp_path / "x.last").mkdir()
    (tmp_path / "x.last/slices.json").write_text("{}")
    assert "in slices, which version 0.2 was the last" in error_of(lambda: load_checkpoint(tmp_path / "x.last"))
    assert "no checkpoint" in error_of(lambda: load_checkpoint(tmp_path / "none.pt"))


BASE = torch.load(SAMPLES / "base.pt", weights_only=True)
LORA = torch.load(SAMPLES / "lora.pt", weights_only=True)
CHANGES: list[tuple[str, dict, str]] = [
    ("base", {"format_version": 99}, "is from a newer version"),
    ("base", {"config": {**BASE["config"], "later": 1}}, "is from a newer version .*unknown field 'later'"),
    ("base", {"config": {**BASE["config"], "value_embeddings": True}}, "has value embeddings, which version 0.2"),
    ("base", {"config": {**BASE["config"], "n_layer": "x"}}, NOT_OURS),
    ("base", {"config": {**BASE["config"], "n_embd": 8.0}}, NOT_OURS),
    ("base", {"config": {**BASE["config"], "n_head": 3}}, "n_embd 8 must be a multiple of n_head 3"),
    ("base", {"config": {**BASE["config"], "n_layer": 10**9}}, "n_layer must be at most"),
    ("base", {"config": {**BASE["config"], "n_layer": 2}}, rf"{MISFIT} \(h.1.*is missing"),
    ("base", {"config": {**BASE["config"], "vocab_size": 10**9}}, rf"{MISFIT} \(wte.weight is \[320, 8\]"),
    ("base", {"config": {**BASE["config"], "n_tokens": 300}}, "its n_tokens is 300, its tokenizer has 260"),
    ("base", {"model": {**BASE["model"], "x": torch.zeros(1)}}, f"{MISFIT}.*no tensor x"),
    ("base", {"model": {**BASE["model"], "wte.weight": 1}}, f"{MISFIT}.*wte.weight is missing"),
    ("base", {"model": {**BASE["model"], "ln_f.bias": torch.zeros(8, dtype=torch.int64)}}, "not .* of floats"),
    ("base", {"kind": "classifier"}, NOT_OURS),
    ("base", {"template": "x"}, NOT_OURS),
    ("base", {"tokenizer": "{"}, "the tokenizer is not a byte-level BPE"),
    ("base", {"tokenizer": "gpt2"}, "its n_tokens is 260, its tokenizer has 50,259"),
    ("classifier", {"labels": ["a"]}, NOT_OURS),
    ("classifier", {}, "is a classifier: ask it with classify.py"),
    ("lora", {"lora": {**LORA["lora"], "base": "none.pt"}}, "adapts the model none.pt .*it is missing"),
    ("lora", {"lora": {**LORA["lora"], "base_sha256": "0" * 64}}, ".*base.pt has changed since: put that file back"),
    ("lora", {"lora": {**LORA["lora"], "rank": 3}}, MISFIT),
    ("lora", {"model": {**LORA["model"], "role_rows": torch.zeros(1, 8)}}, f"{MISFIT}.*role_rows"),
]


@pytest.mark.parametrize(("sample", "changes", "problem"), CHANGES)
def test_a_bad_checkpoint_costs_one_line_that_says_why(tmp_path, sample, changes, problem):
    shutil.copy(SAMPLES / "base.pt", tmp_path)
    torch.save({**torch.load(SAMPLES / f"{sample}.pt", weights_only=True), **changes}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=f"x.pt.* {problem}"):
        load_checkpoint(tmp_path / "x.pt")
    error_of(lambda: load_checkpoint(tmp_path / "x.pt"))


def test_fields_of_older_versions_and_other_precisions_load(tmp_path):
    config = {**BASE["config"], "value_embeddings": False}
    weights = {name: tensor.half() for name, tensor in BASE["model"].items()}
    torch.save({**BASE, "config": config, "model": weights}, tmp_path / "x.pt")
    state = load_checkpoint(tmp_path / "x.pt")
    assert {tensor.dtype for tensor in state["model"].values()} == {torch.float32}
    assert checkpoint.build(state)(torch.tensor([[1, 2]])).isfinite().all()


DAMAGED = [
    ("sft_train_index.bin", "<u8", lambda index: index + 2**40),
    ("sft_train_mask.bin", "u1", lambda mask: mask[:-1]),
    ("sft_val.bin", "<u2", lambda ids: ids * 0 + 65_535),
]


@pytest.mark.parametrize(("name", "dtype", "damaged"), DAMAGED)
def test_damaged_conversations_cost_one_line(tmp_path, name, dtype, damaged):
    shutil.copytree(SAMPLES / "data", tmp_path / "data")
    damaged(np.fromfile(tmp_path / "data" / name, dtype)).astype(dtype).tofile(tmp_path / "data" / name)
    model = checkpoint.build(load_checkpoint(SAMPLES / "base.pt"))

    def read() -> None:
        for split in ("train", "val"):
            data = Conversations(tmp_path / "data", split, model.config.block_size, 2, 0)
            mean_loss(model, data.in_order(), 2)

    error_of(read)
