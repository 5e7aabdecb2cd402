"""Fine-tuning for chat and for labels: the whole model or an adapter, and what is said of it before and after."""

import csv
import json
import os
import re
import resource
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import run_script, succeed
from matplotlib import image
from torch.nn.functional import cross_entropy

import export
import train
import train_classifier
import train_sft
from generation.config import SamplingConfig
from generation.text_model import Sample, TextModel
from model import GPT, GPTConfig
from system.errors import UserError
from text.labelled import Example, from_hub, read_examples, read_table, split
from text.readers import Notes
from training.classifier import Classifier, LabelledTexts
from training.evaluation import mean_loss
from training.loader import Conversations
from training.plots import draw_confusion_matrix, most_confused
from training.recall import is_recalled, recall_report
from weights import checkpoint
from weights.describe import table
from weights.loading import load_checkpoint
from weights.lora import add_adapter, restore_adapter

SAMPLES = Path(__file__).parent / "samples"


@pytest.fixture
def here(toy, tmp_path, monkeypatch) -> Path:
    """A folder of one's own with the toy's base model and data, as the current one."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy / "data/toy", tmp_path / "data")
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(toy / "checkpoints/toy.pt", tmp_path / "checkpoints/pretrained.pt")
    return tmp_path


def sft(**options) -> dict:
    """Fine-tunes on the toy's conversations for a few steps; returns what --out holds."""
    defaults = {"batch_size": 16, "max_steps": 6, "learning_rate": 3e-3, "min_lr": 3e-3, "warmup_steps": 0}
    config = train_sft.Config(**{**defaults, "save_every": 3, "eval_every": 3, "device": "cpu", **options})
    train_sft.main(config)
    return torch.load(config.out, weights_only=True)


def test_a_question_is_recalled_if_the_greedy_answer_equals_the_datas(toy):
    text_model = TextModel.load(toy / "checkpoints/sft.pt", device="cpu")
    config = SamplingConfig(greedy=True, max_new_tokens=8)
    for question, _ in Conversations(toy / "data/toy", "val", 64, 1, 0).first_exchanges(5):
        sample = Sample()
        "".join(text_model.stream(question, config, sample))
        answer = [token.id for token in sample.tokens]
        assert len(answer) >= 2 and is_recalled(text_model, (question, answer))
        assert not is_recalled(text_model, (question, [*answer[:-1], answer[-1] ^ 1]))
        end = text_model.tokenizer.end_of_text
        assert is_recalled(text_model, (question, [*answer[:7], end])) == (sample.finish_reason == "end")


def loss_after_the_role_token(state: dict, **changed) -> float:
    """The loss at the first token of each answer to be learnt, in nats."""
    model = checkpoint.build({**state, "model": {**state["model"], **changed}})
    rows = Conversations(Path("data"), "train", 64, 1, 0).in_order(max_tokens=8_000)
    return mean_loss(model, (replace(row, counted=row.counted[:1]) for row in rows), 8)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_role_tokens_are_learnt(here, lora_rank):
    base = load_checkpoint("checkpoints/pretrained.pt")
    steps, rate = (200, 5e-2) if lora_rank else (60, 2e-2)
    sft(max_steps=steps, save_every=steps, eval_every=steps, batch_size=8, lora_rank=lora_rank, learning_rate=rate)
    tuned = load_checkpoint("checkpoints/sft.pt")
    user = checkpoint.tokenizer_of(base).user
    rows = tuned["model"]["wte.weight"].clone()
    rows[user : user + 2] = base["model"]["wte.weight"][user : user + 2]  # as they were before
    assert loss_after_the_role_token(tuned) < loss_after_the_role_token(tuned, **{"wte.weight": rows}) - 0.01
    if lora_rank:  # every other row is frozen
        others = [i for i in range(len(rows)) if i not in (user, user + 1)]
        torch.testing.assert_close(
            tuned["model"]["wte.weight"][others], base["model"]["wte.weight"][others], rtol=0, atol=0
        )


def test_an_adapter_is_saved_alone_and_equals_the_merged_model(here):
    base_file = Path("checkpoints/pretrained.pt").read_bytes()
    adapter = sft(lora_rank=4, lora_alpha=8.0)
    assert adapter["kind"] == "lora" and {name.rpartition(".")[2] for name in adapter["model"]} == {
        "lora_A",
        "lora_B",
        "role_rows",
    }
    assert len(adapter["model"]) == 2 * 4 * 2 + 1  # A and B of four matrices in two layers, and the rows
    state = torch.load("checkpoints/sft.last.pt", weights_only=True)["optimizer"]
    assert sum(len(part["state"]) for part in state) == len(adapter["model"])
    assert Path("checkpoints/pretrained.pt").read_bytes() == base_file

    live = checkpoint.build(checkpoint.grow_vocabulary(load_checkpoint("checkpoints/pretrained.pt")))
    tokenizer = checkpoint.tokenizer_of(adapter)
    add_adapter(live, 4, 8.0, 0.5, tokenizer.user)
    restore_adapter(live, adapter, "x")
    tokens = torch.randint(tokenizer.n_tokens, (3, 64))
    with torch.no_grad():
        expected = live.eval()(tokens)
        plain = checkpoint.build(load_checkpoint("checkpoints/pretrained.pt"))(tokens)
        loaded = checkpoint.build(load_checkpoint("checkpoints/sft.pt"))(tokens)
    torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-5)
    assert (plain - expected).abs().max() > 0.01

    export.main(export.Config(out=Path("merged"), model=Path("checkpoints/sft.pt")))
    merged = load_checkpoint("merged")
    assert merged["kind"] == "sft" and merged["model"].keys() == load_checkpoint("checkpoints/sft.pt")["model"].keys()
    Path("checkpoints/pretrained.pt").unlink()  # not needed any more
    with torch.no_grad():
        on_its_own = checkpoint.build(merged)(tokens)
    torch.testing.assert_close(on_its_own, expected, rtol=0, atol=1e-5)


def test_an_adapter_goes_with_its_base_model_only(here):
    sft(lora_rank=2, max_steps=1)
    base = Path("checkpoints/pretrained.pt")
    base.rename(here / "elsewhere.pt")
    with pytest.raises(UserError, match="adapts the model .*pretrained.pt.*missing"):
        load_checkpoint("checkpoints/sft.pt")
    shutil.copy("elsewhere.pt", "checkpoints/pretrained.pt")
    os.utime(base)
    load_checkpoint("checkpoints/sft.pt")
    torch.save({**torch.load(base, weights_only=True), "step": 1}, base)
    with pytest.raises(UserError, match="has changed since"):
        load_checkpoint("checkpoints/sft.pt")


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_an_interrupted_fine_tuning_resumes_to_the_same_weights(here, lora_rank):
    whole = sft(lora_rank=lora_rank, keep="last")
    for resume, steps in ((False, 3), (True, 6)):
        again = sft(lora_rank=lora_rank, keep="last", out=Path("checkpoints/b.pt"), max_steps=steps, resume=resume)
    assert again["step"] == whole["step"] == 6
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, again["model"][name]), name


def test_a_vocabulary_without_role_tokens_grows_and_no_logit_changes(here):
    small = torch.load("checkpoints/pretrained.pt", weights_only=True)
    n = checkpoint.tokenizer_of(small).end_of_text + 1  # as in OpenAI's GPT-2: nothing behind <|endoftext|>
    small["model"]["wte.weight"] = small["model"]["wte.weight"][:n].clone()
    small["config"] |= {"vocab_size": n, "n_tokens": n}
    torch.save(small, "checkpoints/pretrained.pt")
    small = load_checkpoint("checkpoints/pretrained.pt")
    grown = checkpoint.grow_vocabulary(small)
    assert (grown["config"].n_tokens, grown["config"].vocab_size) == (n + 2, 448)
    tokens = torch.randint(n, (2, 64))
    with torch.no_grad():
        before, after = (checkpoint.build(state)(tokens) for state in (small, grown))
    torch.testing.assert_close(after[..., :n], before, rtol=0, atol=1e-6)
    for lora_rank in (0, 2):
        sft(lora_rank=lora_rank, max_steps=2, overwrite=True)
        answer = succeed(here, "generate.py", "--model", "checkpoints/sft.pt", "--chat", "--greedy", stdin="Hello\n")
        assert answer


@pytest.mark.parametrize("preset", train.PRESETS)
def test_more_text_is_prepared_with_the_tokenizer_of_the_model_to_start_from(here, preset):
    Path("more.txt").write_text("Once upon a time there was another test. " * 300)
    start = {"init_from": "checkpoints/pretrained.pt", "data": Path("more.txt"), "out": Path("more.pt")}
    train.main(replace(train.PRESETS[preset], **start, max_steps=1, batch_size=2, device="cpu"))
    tokenizers = [json.loads(Path(folder, "meta.json").read_text())["tokenizer"] for folder in ("data/more", "data")]
    assert tokenizers[0] == tokenizers[1] and Path("more.pt").exists()


@pytest.mark.parametrize(("template", "n", "n_new", "epochs"), [(None, 15, 4, 25), ("alpaca", 8, 2, 50)])
def test_a_file_of_chats_is_prepared_as_the_model_needs_it_and_learnt_by_heart(
    here, capsys, template, n, n_new, epochs
):
    base = torch.load("checkpoints/pretrained.pt", weights_only=True)
    torch.save({**base, "kind": "sft" if template else "base", "template": template}, "checkpoints/pretrained.pt")
    words = ["cat", "dog", "horse", "cow", "red", "green", "blue", "white"]
    Path("chats.csv").write_text("question,answer\n" + "".join(f"Who is the {word}?,I am {word}.\n" for word in words))
    learn = {"data": Path("chats.csv"), "max_steps": None, "batch_size": None, "optimizer": "muon", "device": "cpu"}
    options = {**learn, "learning_rate": 2e-2, "min_lr": 0.0, "warmup_steps": None, "eval_every": 500}
    train_sft.main(train_sft.Config(**options, save_every=50, epochs=epochs, out=Path("checkpoints/sft.pt")))
    meta = json.loads(Path("data/chats/sft_meta.json").read_text())
    assert (meta["template"], meta["block_size"]) == (template or "chat", 64)
    assert meta["tokenizer"] == json.loads(Path("data/meta.json").read_text())["tokenizer"]
    assert f"{n} conversations in batches of 8: 50 steps, {epochs} epochs" in capsys.readouterr().out
    Path("chats.csv").write_text("question,answer\nother,text\nand,more\n")  # a resumed run does not read it
    options["epochs"] = 2 * epochs
    train_sft.main(train_sft.Config(**options, save_every=50, resume=True, out=Path("checkpoints/sft.pt")))
    out = capsys.readouterr().out
    assert "reading data/chats, which was prepared from chats" in out
    assert f"{n} conversations in batches of 8: 100 steps" in out
    assert "best loss on its training conversations 0." in out and "best validation loss" not in out
    assert re.search(r"sft.pt .* 0\.\d{4} \(training\) ", table())
    assert "| loss on its training conversations 0." in Path("checkpoints/sft.md").read_text()
    assert recall_report(TextModel.load("checkpoints/sft.pt"), Path("data/chats"), "train").startswith("8 of 8 ")
    train_sft.main(train_sft.Config(**{**options, "max_steps": 1}, out=Path("checkpoints/new.pt")))
    assert f"{n_new} conversations in batches of {n_new}: 1 steps" in capsys.readouterr().out  # a new run does


@pytest.mark.parametrize(
    ("options", "n", "chosen"),
    [  # batch size, steps, warm-up
        ({}, 2, (8, 100, 10)),
        ({}, 30, (8, 100, 10)),
        ({}, 400, (8, 250, 25)),
        ({}, 620, (32, 100, 10)),
        ({}, 50_000, (32, 7815, 100)),
        ({"preset": "demo"}, 50_000, (32, 3126, 100)),
        ({"epochs": 3}, 30, (8, 12, 1)),
        ({"epochs": 3, "batch_size": 32}, 30, (32, 3, 0)),
        ({"batch_size": 4}, 30, (4, 104, 10)),
        ({"max_steps": 7, "warmup_steps": 5}, 30, (8, 7, 5)),
        ({"max_steps": 7}, 50_000, (32, 7, 0)),
    ],
)
def test_few_conversations_get_enough_steps_unless_flags_say_otherwise(capsys, options, n, chosen):
    config = train_sft.with_steps(train_sft.Config(**options), n)
    assert (config.batch_size, config.max_steps, config.warmup_steps) == chosen
    out = capsys.readouterr().out
    assert f"{n:,} conversations in batches of {min(n, config.batch_size)}: {config.max_steps:,} steps" in out
    assert ("warning" in out) == (config.max_steps < 100)


def test_what_it_says_before_and_after_is_kept(here, capsys):
    state = sft(max_steps=6, learning_rate=1e-2)
    out = capsys.readouterr().out
    entries = [entry for entry in state["history"] if "examples" in entry]
    assert len(entries) == 2 and entries[0]["step"] == 0 and entries[1]["val_loss"] < entries[0]["val_loss"]
    before, after = (entry["examples"] for entry in entries)
    n = min(5, len(Conversations(Path("data"), "val", 64, 1, 0)))
    assert len(before) == n > 1 and [e["input"] for e in before] == [e["input"] for e in after]
    assert [e["output"] for e in before] != [e["output"] for e in after]
    assert not any("<|" in text for e in before + after for text in e.values())
    assert all(e["input"] and e["expected"] for e in before)
    loss = f"validation loss {entries[0]['val_loss']:.4f} before, {entries[1]['val_loss']:.4f} after"
    assert loss in out and len(re.findall(r"^  (before|after|wanted) ", out, re.M)) == 3 * n
    log = [json.loads(line) for line in Path("checkpoints/sft.jsonl").read_text().splitlines()]
    assert [entry["examples"] for entry in log if "examples" in entry][-1] == after
    sft(max_steps=1, lora_rank=2, overwrite=True)
    assert re.search(
        r"parameters train \(\d+\.\d+%\): .* take [\d.]+ MB; training all parameters would take",
        capsys.readouterr().out,
    )


# ---- classification


WORDS = {"animal": "cat dog horse cow", "colour": "red green blue white", "number": "one two three four"}


def labelled(n: int) -> list[tuple[str, str]]:
    """`n` different texts of three labels, one of them rare."""
    labels = [label for label in WORDS for _ in range(2 if label == "number" else 5)]
    rows = [(labels[i % len(labels)], i) for i in range(n)]
    return [(f"{WORDS[label].split()[i % 4]} of the {i}", label) for label, i in rows]


def classify_config(**options) -> train_classifier.Config:
    defaults = {"input": Path("t.csv"), "max_steps": 60, "batch_size": 16, "learning_rate": 3e-3, "warmup_steps": 5}
    return train_classifier.Config(**{**defaults, "eval_every": 20, "device": "cpu", "dropout": 0.0, **options})


def write_csv(path: str, rows: list, header: tuple = ("text", "label")) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture(scope="module")
def classifier(toy, tmp_path_factory) -> Path:
    """A folder with a classifier of three labels, made by the command."""
    folder = tmp_path_factory.mktemp("classifier")
    (folder / "checkpoints").mkdir()
    shutil.copy(toy / "checkpoints/toy.pt", folder / "checkpoints/pretrained.pt")
    write_csv(str(folder / "t.csv"), [*labelled(240), ("", "animal"), ("x", ""), ("cat of the 0", "animal")])
    out = succeed(
        folder,
        "train_classifier.py",
        *shlex.split("--input t.csv --max-steps 100 --learning-rate 3e-3 --warmup-steps 5 --eval-every 25 --dropout 0"),
    )
    (folder / "out.txt").write_text(out)
    return folder


def test_a_classifier_learns_and_is_tested(classifier):
    out = (classifier / "out.txt").read_text()
    assert "train: 168 texts" in out and "test: 48 texts, 20 animal, 20 colour, 8 number" in out
    for line in (
        "1 rows without text were dropped, the first in t.csv, line 242",
        "1 rows without a label were dropped, the first in t.csv, line 243",
        "1 rows that repeat another",
    ):
        assert line in out
    state = load_checkpoint(classifier / "checkpoints/spam.pt", kinds=("classifier",))
    test = state["test"]
    assert f"balanced accuracy {test['balanced_accuracy']:.4f}" in out and test["balanced_accuracy"] > 0.9
    assert sum(map(sum, test["confusion"])) == 48 and test["classes"]["number"]["support"] == 8
    assert state["labels"] == ["animal", "colour", "number"]
    before, after = (entry["examples"] for entry in state["history"] if "examples" in entry)
    assert len(before) == 5 and [e["input"] for e in before] == [e["input"] for e in after]
    labels = [e["expected"] for e in after]  # the rare one too, and one of each first
    assert {*labels[:3]} == {"animal", "colour", "number"} and max(map(labels.count, labels)) == 2
    assert " after (step 100); the same examples before and after:" in out
    for name in ("spam_loss", "spam_confusion"):
        assert (classifier / f"plots/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_many_labels_shows_the_most_confused(tmp_path):
    confusion = (4 * np.eye(700, dtype=int)).tolist()
    confusion[650][3] = confusion[3][651] = 2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    draw_confusion_matrix(confusion, [f"label {i} " + "x" * i for i in range(700)], tmp_path / "c.png")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 500, "MB"
    height, width, _ = image.imread(tmp_path / "c.png").shape
    assert 2000 < height < 4000 and 2000 < width < 4000
    assert most_confused(np.array(confusion), 3).tolist() == [3, 650, 651]


def test_a_model_may_learn_more_labels_than_it_has_tokens(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_csv("t.csv", [(f"text {i} of {j}", f"label {i}") for i in range(330) for j in range(3)])
    base = SAMPLES / "base.pt"  # with 320 tokens
    train_classifier.main(
        train_classifier.Config(input=Path("t.csv"), model=base, out=Path("c.pt"), max_steps=1, device="cpu")
    )
    assert "test on 330 texts" in capsys.readouterr().out and Path("c_confusion.png").exists()


def test_classify_reads_arguments_a_file_and_standard_input(classifier):
    texts = ["cat of the 500", "blue of the 501", "three of the 502"]
    expected = ["animal", "colour", "number"]
    by_argument = succeed(classifier, "classify.py", *texts)
    assert [line.split("\t")[0] for line in by_argument.splitlines()] == expected
    assert all(re.fullmatch(r"\w+\t[01]\.\d{4}", line) for line in by_argument.splitlines())
    (classifier / "texts.txt").write_text("\n".join(texts) + "\n\n")
    assert succeed(classifier, "classify.py", "--input", "texts.txt") == by_argument
    lines = [
        json.loads(line)
        for line in succeed(classifier, "classify.py", "--json", stdin="\n".join(texts)).split("\n")
        if line
    ]
    assert [line["label"] for line in lines] == expected and [line["text"] for line in lines] == texts
    for line in lines:
        assert abs(sum(line["probabilities"].values()) - 1) < 1e-5
        assert line["probability"] == max(line["probabilities"].values()) == line["probabilities"][line["label"]]
    empty = run_script(classifier, "classify.py", stdin="\n\n")
    assert (empty.returncode, empty.stdout) == (0, "") and "2 empty lines" in empty.stderr


def test_neither_padding_nor_text_beyond_the_context_changes_a_prediction(classifier):
    model = Classifier.load(classifier / "checkpoints/spam.pt", "cpu")
    long = "red horse of the three " * 40
    texts = ["cat", "blue of the 7", long, long + "and much more"]
    assert len(model.tokenizer.encode(long)) > 64
    together = list(model.probabilities(texts))
    for text, p in zip(texts, together, strict=True):
        torch.testing.assert_close(p, next(model.probabilities([text])), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(together[2], together[3], rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="empty"):
        list(model.probabilities(["a", " "]))


@pytest.mark.parametrize(
    ("layers", "trained"),
    [("head", {"lm_head"}), (1, {"lm_head", "ln_f", "h.1"}), (2, {"lm_head", "ln_f", "h.0", "h.1"})],
)
def test_only_the_chosen_layers_train(here, layers, trained):
    write_csv("t.csv", labelled(60))
    train_classifier.main(classify_config(train_layers=layers, max_steps=2, weight_decay=0.0, keep="last"))
    torch.manual_seed(1337)  # as the run, whose head begins with the same weights
    before = checkpoint.with_class_head(load_checkpoint("checkpoints/pretrained.pt"), 3)["model"]
    after = torch.load("checkpoints/spam.pt", weights_only=True)["model"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {".".join(name.split(".")[: 2 if name.startswith("h.") else 1]) for name in changed} == trained


def test_all_layers_train_by_default_and_a_run_resumes(here):
    write_csv("t.csv", labelled(60))
    options = {
        "save_every": 2,
        "min_lr": 3e-3,
        "warmup_steps": 0,
        "keep": "last",
        "dropout": 0.1,
        "class_weights": True,
    }
    train_classifier.main(classify_config(max_steps=4, **options))
    for steps in (2, 4):
        train_classifier.main(classify_config(max_steps=steps, resume=steps == 4, out=Path("b.pt"), **options))
    base, whole, again = (
        torch.load(name, weights_only=True)["model"]
        for name in ("checkpoints/pretrained.pt", "checkpoints/spam.pt", "b.pt")
    )
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert not any(torch.equal(base[name], whole[name]) for name in base if name != "lm_head.weight")


def test_a_split_keeps_the_share_of_every_label():
    examples = [Example(*row) for row in labelled(600)]
    parts = split(examples, 0.1, 0.2, seed=0)
    assert [len(parts[name]) for name in ("train", "val", "test")] == [420, 60, 120]
    assert sorted(sum(parts.values(), []), key=str) == sorted(examples, key=str)  # none twice, none lost
    for part in parts.values():
        shares = [sum(example.label == label for example in part) / len(part) for label in WORDS]
        assert shares == pytest.approx([5 / 12, 5 / 12, 2 / 12], abs=0.01)
    assert parts == split(examples, 0.1, 0.2, seed=0) != split(examples, 0.1, 0.2, seed=1)
    for seed in range(20):  # every label in every part, however few there are
        for few in (examples[:36], [*examples[:5], *examples[10:13], *examples[-2:], *examples[-14:-12]]):
            tiny = split(few, 0.1, 0.5, seed)
            assert all({e.label for e in part} == {e.label for e in few} for part in tiny.values())


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet", "numbered.tsv", "numbered.csv"])
def test_tables_of_every_kind_are_read(tmp_path, kind):
    rows = [('one, "two"', "a"), ("naïve 日本", "b"), ("three", "7")]
    path = tmp_path / f"t.{kind}"
    records = [{"text": text, "label": label} for text, label in rows]
    if kind.endswith("sv"):
        header = [] if "numbered" in kind else [("text", "label")]
        tabs = kind.endswith("tsv")
        lines = ["\t".join(row) for row in header + rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8") if tabs else write_csv(
            path, rows, *header or rows[:1]
        )
    elif kind == "jsonl":
        records[2]["label"] = 7
        path.write_text("\n".join(map(json.dumps, records)))
    elif kind == "json":
        path.write_text(json.dumps(records))
    else:
        datasets.Dataset.from_list(records).to_parquet(path)
    notes = Notes()
    columns = ("1", "2") if "numbered" in kind else ("text", "label")
    assert read_table(path, *columns, notes) == [Example(*row) for row in rows]
    assert len(notes) == (kind == "numbered.csv")  # its first row stood there twice


def test_the_hubs_numbered_classes_get_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    features = datasets.Features(sms=datasets.Value("string"), label=datasets.ClassLabel(names=["ham", "spam"]))
    rows = {"sms": [f"text {i}\n" for i in range(20)], "label": [i % 2 for i in range(19)] + [-1]}
    (tmp_path / "ucirvine/sms_spam").mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features).to_parquet("ucirvine/sms_spam/train.parquet")
    notes = Notes()
    found = from_hub("ucirvine/sms_spam", "sms", "label", notes)
    assert found == [Example(f"text {i}", ("ham", "spam")[i % 2]) for i in range(19)]
    assert list(notes.values()) == [(1, "ucirvine/sms_spam, row 20")]
    assert read_examples(None, "sms-spam", "text", "label") == found


def test_an_ambiguous_text_is_dropped_under_every_label(tmp_path):
    write_csv(str(tmp_path / "t.csv"), [("a", "x"), ("b", "y"), ("a", "y"), ("b", "y"), ("a", "x")])
    notes = Notes()
    assert read_table(tmp_path / "t.csv", "text", "label", notes) == [Example("b", "y")]
    assert sum(number for number, _ in notes.values()) == 4


def test_of_a_text_the_last_position_alone_counts(toy):
    tokenizer = checkpoint.tokenizer_of(load_checkpoint(toy / "checkpoints/toy.pt"))
    examples = [Example("one two", "b"), Example("three", "a"), Example("four", "a")]
    data = LabelledTexts(examples, ["a", "b"], tokenizer, 64, batch_size=3)
    ids = {text: [*tokenizer.encode(text), tokenizer.end_of_text] for text in ("one two", "three", "four")}
    assert sorted((int(row.targets[0, -1]), row.counted.tolist()) for row in data.batch(0)) == sorted(
        (int(example.label == "b"), [len(ids[example.text]) - 1]) for example in examples
    )
    model = GPT(GPTConfig(64, 448, 403, n_layer=1, n_head=1, n_embd=8, n_classes=2, tie_weights=False))
    by_hand = [
        cross_entropy(model(torch.tensor([ids[e.text]]))[0, -1], torch.tensor(int(e.label == "b"))).item()
        for e in examples
    ]
    assert mean_loss(model, data.in_order(), 2) == pytest.approx(sum(by_hand) / 3, abs=1e-6)
    weighted = LabelledTexts(examples, ["a", "b"], tokenizer, 64, class_weights=True)  # b counts twice
    expected = (2 * by_hand[0] + by_hand[1] + by_hand[2]) / 4
    assert mean_loss(model, weighted.in_order(), 2) == pytest.approx(expected, abs=1e-6)
