"""Files written by earlier versions keep loading: `samples/` holds tiny ones, all of commit 68221e4.

`prepare_data.py`, `train.py` (Muon: base, AdamW: adamw), `prepare_sft_data.py`, `train_sft.py` (sft, lora) and
`train_classifier.py` wrote them: 4 steps of one layer, one head, 8 wide, context 32, with 257 tokens of their own.
"""

import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import log, succeed

from training.classifier import Classifier
from weights import checkpoint
from weights.loading import load_checkpoint

SAMPLES = Path(__file__).parent / "samples"
LANGUAGE_MODELS = ["base.pt", "base.last.pt", "adamw.last.pt", "sft.pt", "sft.last.pt", "lora.pt", "lora.last.pt"]
RESUME = {
    "base.pt": ["train.py", "--optimizer", "muon"],
    "adamw.pt": ["train.py"],
    "sft.pt": ["train_sft.py", "--model", "base.pt"],
    "lora.pt": ["train_sft.py", "--model", "base.pt", "--lora-rank", "2"],
}
SHAPE = ["--n-layer", "1", "--n-head", "1", "--n-embd", "8", "--block-size", "32"]
SCHEDULE = ["--warmup-steps", "1", "--eval-every", "2", "--save-every", "2", "--log-every", "1"]


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models_of_an_earlier_version_load(name):
    state = load_checkpoint(SAMPLES / name, verify=True)
    model = checkpoint.build(state)
    tokens = torch.tensor([checkpoint.tokenizer_of(state).encode("the fox")])
    logits = model(tokens)
    assert logits.shape == (1, tokens.size(1), 320) and logits.isfinite().all()
    assert state["kind"] == ("base" if name.startswith(("base", "adamw")) else "sft")


def test_an_adapter_of_an_earlier_version_loads_merged_with_its_base():
    base, merged = (load_checkpoint(SAMPLES / name)["model"] for name in ("base.pt", "lora.pt"))
    adapter = torch.load(SAMPLES / "lora.pt", weights_only=True)
    scale = adapter["lora"]["alpha"] / adapter["lora"]["rank"]
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    corrected = {name.replace("lora_A", "weight") for name in adapter["model"] if name.endswith("lora_A")}
    assert changed == corrected | {"wte.weight"} and len(corrected) == 4
    for name in corrected:
        a, b = (adapter["model"][name.replace("weight", part)] for part in ("lora_A", "lora_B"))
        torch.testing.assert_close(merged[name], base[name] + scale * b @ a)


def test_a_classifier_of_an_earlier_version_gives_probabilities():
    classifier = Classifier.load(SAMPLES / "classifier.pt", "cpu")
    assert classifier.labels == ["a", "b"]
    assert all(p.sum().item() == pytest.approx(1) for p in classifier.probabilities(["fox 1", "fox 2"]))


def validation_losses(state: dict) -> list[tuple[int, float]]:
    return [(entry["step"], entry["val_loss"]) for entry in state["history"]]


@pytest.mark.parametrize("name", RESUME)
def test_a_run_of_an_earlier_version_resumes(tmp_path, name):
    for sample in (SAMPLES / "base.pt", (SAMPLES / name).with_suffix(".last.pt")):
        shutil.copy(sample, tmp_path)
    last = tmp_path / Path(name).with_suffix(".last.pt").name
    before = torch.load(last, weights_only=True)
    script, *options = RESUME[name]
    shape = SHAPE if script == "train.py" else []
    arguments = ["--data", SAMPLES / "data", "--out", name, "--batch-size", "2", "--device", "cpu", "--resume"]
    succeed(tmp_path, script, *arguments, *options, *shape, *SCHEDULE, "--max-steps", "6")
    after = torch.load(last, weights_only=True)
    assert (before["step"], after["step"]) == (4, 6) and after["tokens"] > before["tokens"]
    assert validation_losses(after)[:3] == validation_losses(before) and len(validation_losses(after)) == 4
    entries = log(tmp_path / Path(name).with_suffix(".jsonl"))
    losses = {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}
    assert losses.keys() == {5, 6} and all(math.isfinite(loss) for loss in losses.values())
    assert any(not torch.equal(after["model"][part], before["model"][part]) for part in before["model"])
