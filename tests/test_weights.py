"""Weights in other formats: folders that `transformers` writes, models of the Hub, and nanoGPT's checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from conftest import run_script, succeed
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Library
from transformers import GPT2Config, GPT2LMHeadModel

from model import GPT, GPTConfig
from system.errors import UserError
from text import tokenizer as tokenizers
from weights import checkpoint, huggingface, to_huggingface
from weights.loading import load_checkpoint

GPT2: dict[str, Any] = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}


def hf_gpt2(**options: Any) -> GPT2LMHeadModel:
    """A tiny random GPT-2 of `transformers`."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**{**GPT2, **options})).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model with GPT-2's vocabulary, as `transformers` saves it."""
    path = tmp_path_factory.mktemp("hub") / "tiny"
    hf_gpt2().save_pretrained(path)
    return path


def assert_same_logits(reference: GPT2LMHeadModel, state: dict) -> None:
    tokens = torch.randint(50257, (2, 40))
    with torch.no_grad():
        expected = reference(tokens).logits
        torch.testing.assert_close(checkpoint.build(state)(tokens), expected, rtol=1e-4, atol=1e-5)
        grown = checkpoint.build(checkpoint.grow_vocabulary(state))(tokens)
    torch.testing.assert_close(grown[..., :50257], expected, rtol=1e-4, atol=1e-5)
    assert grown.size(-1) == 50304


@pytest.mark.parametrize("variant", ["whole", "in shards", "untied", "as OpenAI's"])
def test_a_folder_of_transformers_gives_the_same_logits(tmp_path, variant):
    reference = hf_gpt2(tie_word_embeddings=variant != "untied")
    reference.save_pretrained(tmp_path, **({"max_shard_size": "1MB"} if variant == "in shards" else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (variant == "in shards")
    if variant == "as OpenAI's":  # names without a prefix, and attention masks
        weights = load_file(tmp_path / "model.safetensors")
        weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
        weights |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)}
        save_file(weights, tmp_path / "model.safetensors")
    state = load_checkpoint(tmp_path)
    config = state["config"]
    assert (state["kind"], config.n_tokens, config.tie_weights) == ("base", 50257, variant != "untied")
    assert checkpoint.tokenizer_of(state).name == "gpt2"
    assert_same_logits(reference, state)


def test_a_folder_with_the_two_older_files_has_their_tokenizer(tmp_path):
    spec = (Path(__file__).parent / "samples/data/tokenizer.json").read_text(encoding="utf-8")
    bpe, shape = tokenizers.from_spec(spec), {"block_size": 8, "n_layer": 1, "n_head": 1, "n_embd": 8}
    model = GPT(GPTConfig(**shape, vocab_size=bpe.padded_vocab_size, n_tokens=bpe.n_tokens))
    to_huggingface.write_folder(checkpoint.pack(model, kind="base", tokenizer=spec), tmp_path / "x")
    (tmp_path / "x/tokenizer.json").unlink()
    Library.from_str(spec).model.save(str(tmp_path / "x"))  # vocab.json and merges.txt
    found = checkpoint.tokenizer_of(load_checkpoint(tmp_path / "x"))
    assert found.mergeable_ranks == bpe.mergeable_ranks and found.encode("a pack, ß") == bpe.encode("a pack, ß")
    (tmp_path / "x/merges.txt").unlink()
    with pytest.raises(UserError, match="cannot read .*vocab.json and merges.txt"):
        load_checkpoint(tmp_path / "x")


def test_models_of_the_hub_load_from_its_cache(folder, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--openai-community--gpt2/snapshots" / ("a" * 40)
    shutil.copytree(folder, snapshot)
    (tmp_path / "models--openai-community--gpt2/refs").mkdir()
    (tmp_path / "models--openai-community--gpt2/refs/main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert huggingface.find_folder("gpt2") == snapshot
    assert_same_logits(hf_gpt2(), load_checkpoint("gpt2"))
    tokens = torch.randint(50257, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(GPT.from_pretrained("gpt2")(tokens), hf_gpt2()(tokens).logits, rtol=1e-4, atol=1e-5)
    for name in ("gpt2-medium", "org/name"):
        with pytest.raises(UserError, match=f"cannot get {name} from the Hugging Face Hub, nor is it in the cache"):
            load_checkpoint(name)
    with pytest.raises(UserError, match="no checkpoint checkpoints/none.pt"):
        load_checkpoint("checkpoints/none.pt")


@pytest.mark.parametrize(("bias", "prefix"), [(True, ""), (False, "_orig_mod.")])
def test_nanogpts_checkpoint_gives_the_same_logits(tmp_path, bias, prefix):
    reference, weights = hf_gpt2(), {}
    for name, tensor in reference.state_dict().items():  # nanoGPT's matrices are (out, in)
        if name.endswith("bias") and not bias:
            tensor.zero_()
        else:
            weights[prefix + name] = tensor.t() if name.endswith(huggingface.CONV1D) else tensor
    args = {"block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 16, "bias": bias, "vocab_size": 50257}
    path = tmp_path / "ckpt.pt"
    torch.save({"model": weights, "model_args": args | {"dropout": 0.0}, "iter_num": 7, "config": {}}, path)
    state = load_checkpoint(path)
    assert state["config"].bias == bias and state["step"] == 7
    assert_same_logits(reference, state)
    torch.save({"model": weights, "model_args": args | {"vocab_size": 65}}, path)
    with pytest.raises(UserError, match="has a vocabulary of 65 tokens"):
        load_checkpoint(path)


UNREADABLE = [  # changes of config.json, or a file that is cut
    ({"model_type": "llama"}, "model_type is 'llama'"),
    ({"activation_function": "relu"}, "activation_function is 'relu'"),
    ({"n_layer": 3}, "its weights do not fit its config"),
    ({"n_head": "x"}, "cannot read a GPT-2 from"),
    ("model.safetensors", "cannot read a GPT-2 from"),
    ("config.json", "cannot read a GPT-2 from"),
]


@pytest.mark.parametrize(("damage", "problem"), UNREADABLE)
def test_an_unreadable_folder_costs_one_line_that_says_why(folder, tmp_path, damage, problem):
    shutil.copytree(folder, tmp_path / "x")
    path = tmp_path / "x" / (damage if isinstance(damage, str) else "config.json")
    whole = path.read_bytes()
    path.write_bytes(whole[:100] if isinstance(damage, str) else json.dumps(json.loads(whole) | damage).encode())
    with pytest.raises(UserError, match=problem) as error:
        load_checkpoint(tmp_path / "x")
    assert "\n" not in str(error.value)


def test_every_script_accepts_a_hugging_face_folder(folder, tmp_path):
    (tmp_path / "tiny").symlink_to(folder)
    assert succeed(tmp_path, "generate.py", "--model", "tiny", "--prompt", "Hello", "--max-new-tokens", "3")
    rows = [{"instruction": f"Say {i}.", "output": str(i)} for i in range(20)]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    succeed(tmp_path, "prepare_sft_data.py", "--input", "t.json", "--block-size", "64")
    quick = ["--max-steps", "2", "--batch-size", "4", "--device", "cpu"]
    succeed(tmp_path, "train_sft.py", "--model", "tiny", "--out", "lora.pt", "--lora-rank", "2", *quick)
    succeed(tmp_path, "generate.py", "--model", "lora.pt", "--chat", "--max-new-tokens", "3", stdin="Hello\n")
    (tmp_path / "text.txt").write_text("Some text to train on. " * 100)
    succeed(tmp_path, "train.py", "--data", "text.txt", "--init-from", "tiny", "--out", "more.pt", *quick)
    offline = run_script(tmp_path, "generate.py", "--model", "gpt2-large", "--prompt", "x")
    assert offline.returncode == 1 and "cannot get gpt2-large" in offline.stderr.splitlines()[-1]
