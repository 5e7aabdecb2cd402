"""Fine-tuning for chat and for labels: what counts in the loss, what trains, and what is said of the result."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import contents, fine_tune, log, run_script, succeed

import export
import train_classifier
import train_sft
from generation.config import SamplingConfig
from generation.text_model import TextModel
from system.errors import UserError
from text.labelled import Example, read_examples, split
from training.classifier import Classifier, LabelledTexts
from training.evaluation import mean_loss
from training.loader import Conversations
from training.scores import answers_exactly, exact_match_report, min_confidence
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
    add_adapter(live, {"rank": 4, "alpha": 8.0}, 0.5, tokenizer.user)
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
    assert exact_match_report(model, Path("data/chats"), "val").startswith("8 of 8 ")
    questions = Conversations(Path("data/chats"), "val", 64, 1, 0)
    question, answer = questions.first_exchanges(1)[0]
    assert answers_exactly(model, question, answer) and not answers_exactly(model, question, [*answer, answer[0]])
    assert (0 < model.min_confidence < 1) == (template == "chat")  # eight questions alone are too few to tell
    assert min_confidence(model, questions)[0] == 0


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


WORDS = {"animal": "cat dog horse cow", "colour": "red green blue white", "number": "one two three four"}


def labelled(n: int) -> list[tuple[str, str]]:
    """`n` different texts of three labels, one of them rare."""
    labels = [label for label in WORDS for _ in range(2 if label == "number" else 5)]
    rows = [(labels[i % len(labels)], i) for i in range(n)]
    return [(f"{WORDS[label].split()[i % 4]} of the {i}", label) for label, i in rows]


def write_csv(path: str | Path, rows: list, header: tuple = ("text", "label")) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture(scope="module")
def classifier(toy, tmp_path_factory) -> Path:
    """A folder with a classifier of three labels, made by the command."""
    folder = tmp_path_factory.mktemp("classifier")
    (folder / "checkpoints").mkdir()
    shutil.copy(toy / "checkpoints/toy.pt", folder / "checkpoints/pretrained.pt")
    write_csv(folder / "t.csv", [*labelled(240), ("", "animal"), ("x", ""), ("cat of the 0", "animal")])
    flags = "--learning-rate 3e-3 --warmup-steps 5 --eval-every 50 --dropout 0 --class-weights --device cpu"
    out = succeed(folder, "train_classifier.py", "--input", "t.csv", "--max-steps", "100", *flags.split())
    (folder / "out.txt").write_text(out)
    return folder


def test_a_classifier_learns_and_is_tested(classifier):
    out = (classifier / "out.txt").read_text()
    for line in (
        "train: 168 texts", "test: 48 texts, 20 animal, 20 colour, 8 number", "1 rows that repeat another",
        "1 rows without text were dropped, the first in t.csv, line 242",
        "1 rows without a label were dropped, the first in t.csv, line 243", "the same examples before, and at step",
    ):  # fmt: skip
        assert line in out
    state = load_checkpoint(classifier / "checkpoints/spam.pt", kinds=("classifier",))
    test, examples = state["test"], [entry["examples"] for entry in state["history"]]
    assert f"balanced accuracy {test['balanced_accuracy']:.4f}" in out and test["balanced_accuracy"] > 0.8
    assert sum(map(sum, test["confusion"])) == 48 and test["classes"]["number"]["support"] == 8
    assert state["labels"] == ["animal", "colour", "number"]
    assert {example["expected"] for example in examples[0][:3]} == set(WORDS)  # the rare one too
    assert all([e["input"] for e in later] == [e["input"] for e in examples[0]] for later in examples)
    for name in ("spam_loss", "spam_confusion"):
        assert (classifier / f"plots/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_classify_reads_arguments_a_file_and_standard_input(classifier):
    texts = ["cat of the 500", "blue of the 501", "7"]
    model = Classifier.load(classifier / "checkpoints/spam.pt", "cpu")
    expected = [model.labels[int(p.argmax())] for p in model.probabilities(texts)]
    by_argument = succeed(classifier, "classify.py", *texts)
    assert [line.split("\t")[0] for line in by_argument.splitlines()] == expected
    assert all(re.fullmatch(r"\w+\t[01]\.\d{4}", line) for line in by_argument.splitlines())
    (classifier / "texts.txt").write_text("\n".join(texts) + "\n\n")
    assert succeed(classifier, "classify.py", "--input", "texts.txt") == by_argument
    as_json = succeed(classifier, "classify.py", "--json", stdin="\n".join(texts))
    lines = [json.loads(line) for line in as_json.splitlines()]
    assert [line["label"] for line in lines] == expected and [line["text"] for line in lines] == texts
    assert all(line["probability"] == max(line["probabilities"].values()) for line in lines)
    empty = run_script(classifier, "classify.py", stdin="\n\n")
    assert (empty.returncode, empty.stdout) == (0, "") and "2 empty lines" in empty.stderr


def test_neither_padding_nor_text_beyond_the_context_changes_a_prediction(classifier):
    model = Classifier.load(classifier / "checkpoints/spam.pt", "cpu")
    long = "red horse of the three " * 40
    texts = ["cat", "blue of the 7", long, long + "and much more"]
    together = list(model.probabilities(texts))
    for text, p in zip(texts, together, strict=True):
        torch.testing.assert_close(p, next(model.probabilities([text])), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(together[2], together[3], rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="empty"):
        list(model.probabilities(["a", " "]))


@pytest.mark.parametrize("class_weights", [False, True])
def test_the_loss_is_the_cross_entropy_at_the_last_position(toy, class_weights):
    tokenizer = checkpoint.tokenizer_of(load_checkpoint(toy / "checkpoints/toy.pt"))
    examples = [Example("one two", "b"), Example("three", "a"), Example("four", "a")]
    data = LabelledTexts(examples, ["a", "b"], tokenizer, 64, class_weights=class_weights)  # b is half as frequent
    model = checkpoint.build(checkpoint.with_class_head(load_checkpoint(toy / "checkpoints/toy.pt"), 2))
    logits = [model(torch.tensor([[*tokenizer.encode(e.text), tokenizer.end_of_text]]))[0, -1] for e in examples]
    weights = torch.tensor([1.0, 2.0]) if class_weights else None
    expected = F.cross_entropy(torch.stack(logits), torch.tensor([1, 0, 0]), weights).item()
    assert mean_loss(model, data.in_order(), 2) == pytest.approx(expected, abs=1e-6)


LAYERS = [
    ("head", "lm_head"),
    (1, "lm_head ln_f h.1"),
    (2, "lm_head ln_f h.0 h.1"),
    ("all", "lm_head ln_f h.0 h.1 wte wpe"),
]


@pytest.mark.parametrize(("layers", "trained"), LAYERS)
def test_only_the_chosen_layers_train(here, layers, trained):
    write_csv("t.csv", labelled(60))
    config = train_classifier.Config(
        input=Path("t.csv"), train_layers=layers, max_steps=2, weight_decay=0.0, device="cpu"
    )
    train_classifier.main(config)
    torch.manual_seed(1337)  # as the run, whose head begins with the same weights
    before = checkpoint.with_class_head(load_checkpoint("checkpoints/pretrained.pt"), 3)["model"]
    after = contents("checkpoints/spam.pt")["model"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {".".join(name.split(".")[: 2 if name.startswith("h.") else 1]) for name in changed} == {*trained.split()}


def test_a_split_keeps_the_share_of_every_label():
    examples = [Example(*row) for row in labelled(600)]
    parts = split(examples, 0.1, 0.2, seed=0)
    assert {name: len(part) for name, part in parts.items()} == {"train": 420, "val": 60, "test": 120}
    assert sorted(sum(parts.values(), []), key=str) == sorted(examples, key=str)  # none twice, none lost
    for part in parts.values():
        assert sum(example.label == "number" for example in part) / len(part) == pytest.approx(2 / 12, abs=0.01)
    assert parts == split(examples, 0.1, 0.2, seed=0) != split(examples, 0.1, 0.2, seed=1)


@pytest.mark.parametrize("kind", ["csv", "numbered.csv", "jsonl"])
def test_labelled_tables_are_read(tmp_path, kind):
    rows = [('one, "two"', "a"), ("naïve 日本", "b"), ("three", "7"), ("both", "a"), ("both", "b")]
    path, columns = tmp_path / f"t.{kind}", ("1", "2") if kind == "numbered.csv" else ("text", "label")
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
    else:
        write_csv(path, rows, rows[0] if kind == "numbered.csv" else columns)
    examples, notes = read_examples(path, "", *columns)
    assert examples == [Example(*row) for row in rows[:3]] and notes  # "both" is ambiguous


def test_the_hubs_numbered_classes_get_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    features = datasets.Features(sms=datasets.Value("string"), label=datasets.ClassLabel(names=["ham", "spam"]))
    rows = {"sms": [f"text {i}\n" for i in range(20)], "label": [i % 2 for i in range(20)]}
    Path("ucirvine/sms_spam").mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features).to_parquet("ucirvine/sms_spam/train.parquet")
    found, _ = read_examples(None, "sms-spam", "text", "label")
    assert found == [Example(f"text {i}", ("ham", "spam")[i % 2]) for i in range(20)]
