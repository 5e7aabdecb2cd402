"""The page and the files in `checkpoints/`: models that come and go, and the curves and samples of runs."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pyarrow
from app_page import choose, complete, open_page, pick

from system.files import locked
from weights import checkpoint
from weights.loading import load_checkpoint


def test_a_checkpoint_may_be_damaged_deleted_or_replaced_while_the_page_is_open(page_folder):
    (page_folder / "checkpoints/corrupt.pt").write_bytes(b"no")
    page = open_page("corrupt.pt")
    assert page.error and any("not a checkpoint" in text.value for text in page.text)
    (page_folder / "checkpoints/corrupt.pt").unlink()
    pick(page, "toy.pt")
    assert not page.error and complete(page, "What is", Length=3)
    shutil.copy(page_folder / "checkpoints/sft.pt", page_folder / "checkpoints/toy.pt")
    page.run()
    assert not page.exception and page.sidebar.text[0].value.startswith("kind: answers")  # the new file
    (page_folder / "checkpoints/toy.pt").unlink()
    page.run()
    assert not page.exception and page.warning and "toy.pt" in page.sidebar.text[0].value
    choose(page, "Completion")
    assert complete(page, "What is", Length=3).startswith("What is")


def test_for_a_classifier_the_page_names_classify_py(page_folder):
    classifier = checkpoint.with_class_head(load_checkpoint("checkpoints/toy.pt"), 2)
    checkpoint.save("checkpoints/spam.pt", {**classifier, "kind": "classifier", "labels": ["ham", "spam"]})
    assert "classify.py" in open_page("spam.pt").info[0].value


def metrics(page) -> dict[str, str]:
    return {metric.label: metric.value for metric in page.metric}


def test_the_training_view_shows_the_log_and_follows_it(page_folder):
    log = page_folder / "checkpoints/toy.jsonl"
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    os.utime(log, (time.time() - 2177, time.time() - 2177))
    page = open_page("toy.pt")
    choose(page, "Training")
    best = min(entry["val_loss"] for entry in entries if "val_loss" in entry)
    assert metrics(page)["Step"] == "20 of 20" and metrics(page)["Best validation loss"] == f"{best:.4f}"
    assert page.caption[0].value == "finished 36 min ago" and len(page.get("vega_lite_chart")) == 1
    with open(log, "a") as file:
        for i in range(3):
            numbers = {"loss": 1.25, "tokens": 1000 * i, "seconds": 10.0 * i, "max_steps": 200, "learning_rate": 0.01}
            file.write(json.dumps({"step": 30 + 10 * i, **numbers}) + "\n")
        file.write('{"step"')  # as a kill leaves it
    with locked(log.with_suffix(".pt")):
        page.run()
    expected = {"Step": "50 of 200", "Training loss": "1.2500", "Learning rate": "1.0e-02", "Tokens": "2,000"}
    assert metrics(page).items() >= expected.items() and page.caption[0].value == "running"
    assert "Tokens/s" in metrics(page) and metrics(page)["Time left"].endswith(" s")
    page.run()
    assert re.fullmatch(r"stopped at step 50, \d\.\d s ago", page.caption[0].value)
    log.unlink()
    page.run()
    assert not page.exception and "no log" in page.info[0].value


def test_runs_are_laid_over_each_other_and_show_samples_over_time(page_folder):
    page = open_page("sft.pt")
    choose(page, "Training")
    entries = map(json.loads, (page_folder / "checkpoints/sft.jsonl").read_text().splitlines())
    examples = [entry["examples"] for entry in entries if "examples" in entry]
    texts = [text.value for text in page.main.text]
    assert len(examples) > 1 and all(example["output"] in texts for example in examples[-1] if example["output"])
    page.select_slider(key="step of sft").set_value(0).run()
    texts = [text.value for text in page.main.text]
    assert all(example[kind] in texts for example in examples[0] for kind in ("input", "expected"))
    page.multiselect[0].set_value([Path("checkpoints/sft.jsonl"), Path("checkpoints/toy.jsonl")]).run()
    assert not page.exception and not page.metric  # which would push the curves off the screen
    texts = " ".join(text.value for text in page.main.text)
    assert all(re.search(rf"{name}: finished .* ago, step \d+ of \d+, best", texts) for name in ("sft", "toy"))
    [chart] = page.get("vega_lite_chart")
    curves = pyarrow.ipc.open_stream(chart.proto.data.data).read_all()["curve"].to_pylist()
    assert set(curves) == {f"{run}, {split}" for run in ("sft", "toy") for split in ("training", "validation")}
    page.multiselect[0].set_value([]).run()
    assert not page.exception
