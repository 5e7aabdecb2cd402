"""Fine-tuning for chat: loss on the answers alone, the whole model or an adapter, examples before and after."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import contents, fine_tune, log

import export
import train_sft
from generation.config import SamplingConfig
from generation.text_model import TextModel
from training.evaluation import answers_exactly, exact_match_report, mean_loss
from training.loader import Conversations
from weights import checkpoint
from weights.loading import load_checkpoint
from weights.lora import add_adapter, restore_adapter

BASE, SFT = Path("checkpoints/pretrained.pt"), Path("checkpoints/sft.pt")


def test_the_loss_is_that_of_the_assistants_tokens(here):
    model = checkpoint.build(load_checkpoint(BASE))
    ids, mask, offsets = (
        torch.from_numpy(np.fromfile(f"data/sft_train{part}.bin", dtype).astype(np.int64))
        for part, dtype in (("", "<u2"), ("_mask", "u1"), ("_index", "<u8"))
    )
    data = Conversations(Path("data"), "train", 64, batch_size=50, seed=1337)
    total, n = torch.zeros(()), 0
    for i in data.epoch(0)[0]:
        row, counted = (values[offsets[i] : offsets[i + 1]] for values in (ids, mask))
        with torch.no_grad():
            losses = F.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="none")
        total, n = total + losses[counted[1:] == 1].sum(), n + int(counted.sum())
    assert mean_loss(model, data.batch(0), 7) == pytest.approx(total.item() / n, rel=1e-5)
    fine_tune(batch_size=50, max_steps=1, grad_accum_steps=3)
    [logged] = [entry["loss"] for entry in log(Path("checkpoints/sft.jsonl")) if "loss" in entry]
    assert logged == pytest.approx(total.item() / n, rel=1e-5)


def test_an_adapter_is_saved_alone_and_equals_the_merged_model(here):
    before = BASE.read_bytes()
    adapter = fine_tune(lora_rank=4, lora_alpha=8.0)
    parts = {name.rpartition(".")[2] for name in adapter["model"]}
    assert adapter["kind"] == "lora" and parts == {"lora_A", "lora_B", "role_rows"}
    assert len(adapter["model"]) == 2 * 4 * 2 + 1  # A and B of four matrices in two layers, and the rows
    optimizers = contents("checkpoints/sft.last.pt")["optimizer"]
    assert sum(len(optimizer["state"]) for optimizer in optimizers) == len(adapter["model"])

    live = checkpoint.build(checkpoint.grow_vocabulary(load_checkpoint(BASE)))
    tokenizer = checkpoint.tokenizer_of(adapter)
    add_adapter(live, 4, 8.0, 0.5, tokenizer.user)
    restore_adapter(live, adapter, "x")
    tokens = torch.randint(tokenizer.n_tokens, (3, 64))
    merged = load_checkpoint(SFT)
    with torch.no_grad():
        expected, loaded = live.eval()(tokens), checkpoint.build(merged)(tokens)
        assert (checkpoint.build(load_checkpoint(BASE))(tokens) - expected).abs().max() > 0.01
    torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-5)
    rows, base_rows = merged["model"]["wte.weight"], load_checkpoint(BASE)["model"]["wte.weight"]
    changed = (rows != base_rows).any(dim=1).nonzero().flatten().tolist()
    assert changed == [tokenizer.user, tokenizer.user + 1]  # the role tokens are learnt, no others
    export.main(export.Config(out=Path("merged"), model=SFT))
    assert BASE.read_bytes() == before
    BASE.unlink()  # not needed any more
    with torch.no_grad():
        torch.testing.assert_close(checkpoint.build(load_checkpoint("merged"))(tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_a_file_of_chats_is_prepared_as_the_model_needs_it_and_learnt_by_heart(here, template):
    torch.save({**contents(BASE), "kind": "sft", "template": template}, BASE)
    words = ["cat", "dog", "horse", "cow", "red", "green", "blue", "white"]
    rows = "".join(f"Who is the {word}?,I am {word}.\n" for word in words)
    Path("chats.csv").write_text(f"question,answer\n{rows}")
    options = {"data": Path("chats.csv"), "max_steps": 150, "batch_size": 8, "optimizer": "muon", "warmup_steps": 15}
    fine_tune(**options, learning_rate=2e-2, min_lr=0.0, eval_every=500, save_every=500, keep="last")
    state = load_checkpoint(SFT)
    assert state["template"] == template and checkpoint.tokenizer_of(state).name.startswith("bpe-")
    model, config = TextModel.load(SFT, "cpu"), SamplingConfig(greedy=True, max_new_tokens=20)
    ids = model.answer_ids([{"role": "user", "content": "Who is the red?"}], config)
    assert model.write(ids, config, strip=True) == "I am red."
    assert exact_match_report(model, Path("data/chats"), "train").startswith("8 of 8 ")
    question, answer = Conversations(Path("data/chats"), "train", 64, 1, 0).first_exchanges(1)[0]
    assert answers_exactly(model, question, answer) and not answers_exactly(model, question, [*answer, answer[0]])


@pytest.mark.parametrize(
    ("options", "n", "chosen"),
    [  # batch size, steps, warm-up
        ({}, 2, (8, 100, 10)),
        ({}, 400, (8, 250, 25)),
        ({}, 620, (32, 100, 10)),
        ({"preset": "demo"}, 50_000, (32, 3126, 100)),
        ({"epochs": 3}, 30, (8, 12, 1)),
        ({"max_steps": 7, "warmup_steps": 5}, 30, (8, 7, 5)),
    ],
)
def test_few_conversations_get_enough_steps_unless_flags_say_otherwise(options, n, chosen):
    config, choice = train_sft.with_steps(train_sft.Config(**options), n)
    assert (config.batch_size, config.max_steps, config.warmup_steps) == chosen
    assert f"{n:,} conversations in batches of {min(n, config.batch_size)}: {config.max_steps:,} steps" in choice
    assert ("warning" in choice) == (config.max_steps < 100)


def test_what_it_answers_before_and_after_is_kept_and_printed(here, capsys):
    state = fine_tune(learning_rate=1e-2, sample_prompt="")
    out = capsys.readouterr().out
    before, _, after = (entry["examples"] for entry in state["history"])
    exchanges = Conversations(Path("data"), "val", 64, 1, 0).first_exchanges(5)
    assert [e["input"] for e in before] == [e["input"] for e in after] and len(before) == len(exchanges) > 1
    assert [e["output"] for e in before] != [e["output"] for e in after]
    assert all(e["input"] and e["expected"] and "<|" not in "".join(e.values()) for e in before + after)
    assert len(re.findall(r"^  (before|after|wanted) ", out, re.M)) == 3 * len(before)
    assert [e["examples"] for e in log(Path("checkpoints/sft.jsonl")) if "examples" in e][-1] == after
    assert "\nnow try: python generate.py --model checkpoints/sft.pt --chat\n" in out
    state = fine_tune(sample_prompt="What is len?", lora_rank=2, max_steps=1, eval_every=1, overwrite=True)
    assert [example["input"] for entry in state["history"] for example in entry["examples"]] == 2 * ["What is len?"]
    assert re.search(r"[\d,]+ of [\d,]+ parameters train \(\d+\.\d+%\)", capsys.readouterr().out)
