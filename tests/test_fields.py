"""Every field of GPTConfig that changes the network works with everything that the project does with a model."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from conftest import TOY_SHAPE, log, random_model, run_in_processes, succeed

from generation.lens import trace_text
from generation.text_model import TextModel
from model import GPTConfig
from text.token_files import read_tokens
from training.scores import evaluate_text
from weights.loading import load_checkpoint

CHANGED = {field.name: not field.default for field in dataclasses.fields(GPTConfig) if isinstance(field.default, bool)}
VARIANTS = {**{name: {name: value} for name, value in CHANGED.items()}, "all": CHANGED}
each_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)


@each_variant
def test_each_position_sees_itself_and_earlier_ones_only(fields):
    model, tokens = random_model(**fields), torch.randint(300, (2, 32))
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 300
    with torch.no_grad():
        difference = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
    assert difference[:20].max() == 0 and difference[20:].min() > 0


@each_variant
def test_gradient_checkpointing_changes_no_gradient(fields):
    tokens, targets = torch.randint(300, (2, 2, 32))
    model, gradients = random_model(**fields).train(), []
    for model.gradient_checkpointing in (False, True):
        gradients.append(torch.autograd.grad(model(tokens, targets), list(model.parameters())))
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])
    torch.testing.assert_close(*gradients)


@each_variant
@pytest.mark.parametrize("n_tokens", [40, 300])
def test_bfloat16_weights_agree_with_float32_without_a_cache(toy, fields, n_tokens):
    tokenizer = TextModel.load(toy / "checkpoints/toy.pt", "cpu").tokenizer
    model = random_model(**fields, block_size=512, vocab_size=448, n_tokens=403)
    for block in model.h:  # so that rounding is not amplified
        block.attn.c_proj.weight.data *= 0.2
        block.mlp.c_proj.weight.data *= 0.2
    text = "".join(f"{i} naïve " for i in range(300))
    ids = tokenizer.encode(text)[-n_tokens:]

    def found(model):
        text_model = TextModel(model, tokenizer, dtype=model.ln_f.weight.dtype)
        trace = trace_text(text_model, text, max_tokens=n_tokens)
        assert trace.tokens.tolist() == ids
        with torch.no_grad():
            hidden = model.hidden(torch.tensor([ids]))[0]
        logprobs = [token.logprob for token in text_model.score(ids, top_logprobs=1)[1:]]
        return [hidden.float(), torch.tensor(logprobs), text_model.next_logits(ids), trace.residual, trace.attention]

    for exact, rounded in zip(found(model), found(model.bfloat16()), strict=True):
        assert rounded.dtype == torch.float32
        assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    "fields",
    [pytest.param(VARIANTS[name], id=name, marks=[] if name == "all" else pytest.mark.slow) for name in VARIANTS],
)
def test_a_model_is_trained_resumed_tuned_and_used(toy, tmp_path, fields):
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(toy / "data/toy", tmp_path / "data")
    rows = [f"{word} of {i},{label}" for i in range(20) for label, word in enumerate(("one", "two", "three"))]
    (tmp_path / "t.csv").write_text("\n".join(["text,label", *rows]))

    def run(script: str, *arguments: object) -> dict:
        succeed(tmp_path, f"{script} --device cpu", *arguments)
        return torch.load(tmp_path / arguments[-1], weights_only=True)

    flags = [f"--{'' if value else 'no-'}{name.replace('_', '-')}" for name, value in fields.items()]
    steps = "--max-steps 4 --warmup-steps 1 --log-every 1 --eval-every 4 --learning-rate 1e-2 --keep last"
    pretrain = ["train.py --data data", *TOY_SHAPE, "--optimizer", "muon", *steps.split(), *flags]
    whole = run(*pretrain, "--out", "checkpoints/whole.pt")
    assert {name: whole["config"][name] for name in fields} == fields
    run(*pretrain, "--target-loss", "100", "--out", "checkpoints/pretrained.pt")  # stops early
    assert log(tmp_path / "checkpoints/pretrained.jsonl")[-1]["step"] < 4
    resumed = run(*pretrain, "--resume", "--out", "checkpoints/pretrained.pt")
    assert resumed["step"] == 4
    for name, tensor in whole["model"].items():  # bit for bit: the same processor computes the same sums
        assert torch.equal(tensor, resumed["model"][name]), name

    path = tmp_path / "checkpoints/pretrained.pt"
    ids = read_tokens(tmp_path / "data/val.bin")[:60].astype("int64")
    loss = evaluate_text(TextModel.load(path, "cpu", "float32"), ids)["loss"]
    scored = TextModel.load(path, "cpu", "float32", quantize="int8").score(ids.tolist(), 1)[1:]
    assert -sum(token.logprob for token in scored) / len(scored) == pytest.approx(loss, rel=0.03)  # only 32 wide

    for rank in (0, 2):
        sft = "--batch-size 16 --max-steps 3 --learning-rate 3e-3 --warmup-steps 0 --eval-every 3 --data data"
        tuned = run("train_sft.py", *sft.split(), "--lora-rank", rank, "--out", f"checkpoints/sft{rank}.pt")
        assert tuned["history"][-1]["val_loss"] < tuned["history"][0]["val_loss"]
    run("train_classifier.py --input t.csv --max-steps 2 --eval-every 2", "--out", "checkpoints/classes.pt")
    assert load_checkpoint(tmp_path / "checkpoints/classes.pt", kinds=("classifier",))["config"].n_classes == 3


@pytest.fixture(scope="module")
def figures_of_processes(toy) -> dict[str, list[list[float]]]:
    """For each variant the figures of two steps with Muon: of one process, of two with DDP, of two with FSDP."""
    result = run_in_processes(toy, "tests/workers.py", "fields", json.dumps(VARIANTS))
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(re.search("^found: (.*)$", result.stdout, re.MULTILINE)[1])


@pytest.mark.parametrize("name", VARIANTS)
def test_ddp_and_fsdp_train_like_one_process(figures_of_processes, name):
    one, ddp, fsdp = figures_of_processes[name]
    assert ddp == pytest.approx(one, rel=1e-3) and fsdp == pytest.approx(one, rel=1e-3)
    assert len(one) > 14 and one[0] > one[2]  # it learns
