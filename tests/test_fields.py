"""Every field of GPTConfig that changes the network works with everything that the project does with a model."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import TOY_SHAPE, log, run_in_processes, succeed
from streamlit.testing.v1 import AppTest
from test_app import open_page, say
from test_distributed import losses
from test_finetuning import here, labelled, sft, write_csv  # noqa: F401

import export
import train
import train_classifier
from generation.decoding import CompiledDecoder, decode_one, generate
from generation.text_model import TextModel
from model import GPT, GPTConfig
from system.errors import UserError
from text.token_files import read_tokens
from training.evaluation import evaluate_text
from weights import checkpoint, huggingface
from weights.loading import load_checkpoint

CHANGED = {
    "bias": False,
    "tie_weights": False,
    "rotary": True,
    "qk_norm": True,
    "value_embeddings": True,
    "squared_relu": True,
}
VARIANTS = {**{name: {name: value} for name, value in CHANGED.items()}, "all": CHANGED}


def flags(fields: dict[str, bool]) -> list[str]:
    return [f"--{'' if value else 'no-'}{name.replace('_', '-')}" for name, value in fields.items()]


def pretrain(fields: dict[str, bool], out: str, **options) -> dict:
    """Trains a toy of two layers for a few steps; returns what --out holds."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "batch_size": 4, "optimizer": "muon"}
    steps = {"max_steps": 4, "warmup_steps": 1, "log_every": 1, "eval_every": 4, "device": "cpu"}
    learning = {"learning_rate": 1e-2, "embedding_lr_scale": 3.0, "cooldown": 0.5, "keep": "last"}
    config = train.Config(data=Path("data"), out=Path(out), **{**shape, **steps, **learning, **fields, **options})
    train.main(config)
    return torch.load(out, weights_only=True)


def test_every_switch_of_the_network_is_tried():
    switches = {field.name for field in dataclasses.fields(GPTConfig) if isinstance(field.default, bool)}
    assert switches == CHANGED.keys()
    assert all(getattr(GPTConfig(), name) is not value for name, value in CHANGED.items())


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_each_position_sees_itself_and_earlier_ones_only(fields):
    model = random_model(fields)
    tokens = torch.randint(300, (2, 32))
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 300
    with torch.no_grad():
        difference = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
    assert difference[:20].max() == 0 and difference[20:].min() > 0


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_cached_logits_equal_uncached_ones(fields):
    model, prompt = random_model(fields), torch.randint(300, (2, 9))
    static = CompiledDecoder(model)
    static.decode_one = decode_one  # the function itself, not compiled

    def logits(**how):
        return torch.stack([logits for _, logits in generate(model, prompt, 80, temperature=0, **how)])

    expected = logits(use_cache=False)  # past the context of 64 tokens
    torch.testing.assert_close(logits(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(compiled=static), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_gradients_do_not_depend_on_what_is_recomputed(fields):
    tokens, targets = torch.randint(300, (2, 2, 32))
    model, gradients = random_model(fields).train(), []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(tokens, targets).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(g.abs().sum() > 0 for g in gradients[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "fields",
    [pytest.param(VARIANTS[name], id=name, marks=[] if name == "all" else pytest.mark.slow) for name in VARIANTS],
)
def test_a_model_is_trained_resumed_tuned_and_used(here, fields):  # noqa: F811
    whole = pretrain(fields, "checkpoints/whole.pt")
    assert {name: whole["config"][name] for name in fields} == fields
    pretrain(fields, "checkpoints/pretrained.pt", overwrite=True, target_loss=100.0)
    resumed = pretrain(fields, "checkpoints/pretrained.pt", resume=True)
    assert resumed["step"] == 4 and log(Path("checkpoints/pretrained.jsonl"))[-1]["step"] == 4
    for name, tensor in whole["model"].items():  # bit for bit: the same processor computes the same sums
        assert torch.equal(tensor, resumed["model"][name]), name

    text_model = TextModel.load("checkpoints/pretrained.pt", dtype="float32")
    int8 = TextModel.load("checkpoints/pretrained.pt", dtype="float32", quantize="int8")
    ids = read_tokens(Path("data/val.bin"))[:60].astype("int64")
    loss, losses_of_int8 = evaluate_text(text_model, ids)["loss"], [t.logprob for t in int8.score(ids.tolist(), 1)[1:]]
    assert -sum(losses_of_int8) / len(losses_of_int8) == pytest.approx(loss, rel=0.03)  # only 32 wide

    for rank in (0, 2):
        tuned = sft(lora_rank=rank, max_steps=3, out=Path(f"checkpoints/sft{rank}.pt"))
        assert tuned["history"][-1]["val_loss"] < tuned["history"][0]["val_loss"]
    write_csv("t.csv", labelled(60))
    train_classifier.main(train_classifier.Config(input=Path("t.csv"), max_steps=2, eval_every=2, device="cpu"))
    assert load_checkpoint("checkpoints/spam.pt", kinds=("classifier",))["config"].n_classes == 3


@pytest.mark.parametrize("name", [name for name in CHANGED if name not in ("bias", "tie_weights")])
def test_export_names_the_field_that_transformers_lacks(toy, tmp_path, name):
    spec = (toy / "data/toy/tokenizer.json").read_text(encoding="utf-8")
    model = random_model({name: CHANGED[name]}, vocab_size=448, n_tokens=403)
    checkpoint.save(tmp_path / "x.pt", checkpoint.pack(model, kind="base", tokenizer=spec, template=None))
    with pytest.raises(UserError, match=f"^cannot export the model: .* no setting for {name}=True; use .*"):
        export.main(export.Config(out=tmp_path / "out", model=tmp_path / "x.pt"))
    assert not (tmp_path / "out").exists()


def test_export_refuses_what_it_does_not_know(toy, tmp_path, monkeypatch):
    contents = torch.load(toy / "checkpoints/toy.pt", weights_only=True)
    contents["config"]["n_experts"] = 8
    torch.save(contents, tmp_path / "x.pt")
    with pytest.raises(
        UserError, match=r"newer version of this project \(its config has the unknown field 'n_experts'\)"
    ):
        export.main(export.Config(out=tmp_path / "out", model=tmp_path / "x.pt"))
    monkeypatch.setattr(huggingface, "EXPORTED_FIELDS", huggingface.EXPORTED_FIELDS - {"n_head"})  # as a new field is
    with pytest.raises(UserError, match="^cannot export the model: .* no setting for n_head=2; use .*"):
        export.main(export.Config(out=tmp_path / "out", model=toy / "checkpoints/toy.pt"))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def figures_of_processes(toy) -> dict[str, list[list[float]]]:
    """For each variant the figures of two steps with Muon: of one process, of two with DDP, of two with FSDP."""
    result = run_in_processes(toy, "tests/workers.py", "fields", json.dumps(VARIANTS))
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(re.search("^found: (.*)$", result.stdout, re.MULTILINE)[1])


@pytest.mark.parametrize("name", VARIANTS)
def test_several_processes_and_slices_train_like_one_process(figures_of_processes, name):
    one, ddp, fsdp = figures_of_processes[name]
    assert ddp == pytest.approx(one, rel=1e-3) and fsdp == pytest.approx(one, rel=1e-3)
    assert len(one) > 14 and one[0] > one[2]  # it learns


def test_a_run_in_slices_writes_and_prints_what_one_process_does(toy):
    common = ["--preset", "modern", "--data", "data/toy", *TOY_SHAPE, "--optimizer", "muon", "--max-steps", "6"]
    common += ["--log-every", "2", "--sample-prompt", "What"]
    printed = [succeed(toy, "train.py", *common, "--out", "checkpoints/fields1.pt")]
    result = run_in_processes(toy, "train.py", *common, "--fsdp", "--out", "checkpoints/fields2.pt")
    assert result.returncode == 0, result.stderr[-3000:]
    printed.append(result.stdout)
    one, two = (losses(toy / f"checkpoints/fields{n}.jsonl") for n in (1, 2))
    assert two == pytest.approx(one, rel=1e-4)
    before, after = (re.findall("'What' → .*", text) for text in printed)
    assert len(before) == len(after) == 2 and before[0] == after[0]
    assert "After “What”" in (toy / "checkpoints/fields2.md").read_text(encoding="utf-8")


def test_the_app_chats_with_all_of_them(here):  # noqa: F811
    pretrain(CHANGED, "checkpoints/pretrained.pt", overwrite=True)
    sft(max_steps=3)
    page: AppTest = open_page("sft.pt")
    say(page, "What does len do?")
    assert re.search("tokens", " ".join(caption.value for caption in page.caption))


def random_model(fields: dict[str, bool], **shape) -> GPT:
    """A random model whose output has many different tokens."""
    torch.manual_seed(0)
    shape = {"block_size": 64, "vocab_size": 320, "n_tokens": 300, "n_layer": 2, "n_head": 2, "n_embd": 48, **shape}
    model = GPT(GPTConfig(**shape, **fields)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model
