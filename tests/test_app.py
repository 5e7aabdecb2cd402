"""The page with the toy models, run by Streamlit's test driver: every control and every state."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from streamlit.testing.v1 import AppTest

from generation.config import SamplingConfig
from generation.text_model import TextModel
from text.tokenizer import legible
from weights import checkpoint
from weights.loading import load_checkpoint


@pytest.fixture
def folder(toy, tmp_path, monkeypatch) -> Path:
    """A working folder with the toy models and their logs."""
    (tmp_path / "checkpoints").mkdir()
    for path in (toy / "checkpoints").glob("[st]*"):
        if path.stem in ("toy", "sft", "toy.last") and path.is_file():
            shutil.copy2(path, tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def open_page(model: str = "") -> AppTest:
    """Opens the page, and picks a model if one is given."""
    page = AppTest.from_file(str(REPOSITORY / "app.py"), default_timeout=60).run()
    if model:
        page.selectbox(key="model").select_index(page.selectbox(key="model").options.index(model)).run()
    assert not page.exception
    return page


def button(page: AppTest, label: str):
    return next(button for button in page.button if button.label == label)


def slider(page: AppTest, label: str):
    return next(slider for slider in page.slider if slider.label == label)


def choose(page: AppTest, mode: str) -> None:
    page.button_group[0].set_value(mode).run()
    assert not page.exception


def say(page: AppTest, text: str) -> None:
    page.chat_input[0].set_value(text).run()
    assert not page.exception


def complete(page: AppTest, prompt: str, **controls) -> str:
    """Sets sliders and completes a prompt; returns the text on the page."""
    for label, value in controls.items():
        slider(page, label.replace("_", " ")).set_value(value)
    page.text_area(key="prompt").set_value(prompt)
    button(page, "Complete").click().run()
    assert not page.exception
    return page.main.text[0].value


def messages(page: AppTest) -> list[dict[str, str]]:
    return page.session_state.conversation.messages


def ids(page: AppTest) -> list[int]:
    return [token.id for token in page.session_state.completion.tokens]


def test_the_controls_need_no_torch():
    code = "import sys, interface.sidebar; assert 'streamlit' in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_without_a_model_the_page_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = open_page()
    assert "make demo" in page.info[0].value and "train.py" in page.info[0].value


def test_the_picker_offers_every_checkpoint_except_last_ones_and_shows_its_facts(folder):
    (folder / "checkpoints/snapshots").mkdir()
    shutil.copy2(folder / "checkpoints/toy.pt", folder / "checkpoints/snapshots/toy_step_10.pt")
    os.utime(folder / "checkpoints/toy.pt")  # the newest comes first
    page = open_page()
    options = page.selectbox(key="model").options
    assert options[0] == "toy.pt" and set(options) == {"toy.pt", "sft.pt", "snapshots/toy_step_10.pt"}
    state = load_checkpoint("checkpoints/toy.pt")
    facts = dict(line.split(": ") for line in page.sidebar.text[0].value.splitlines())
    assert facts["kind"] == "completes text" and facts["training tokens"] == f"{state['tokens']:,}"
    assert facts["validation loss"] == f"{state['history'][-1]['val_loss']:.4f}"
    assert facts["parameters"] == f"{checkpoint.build(state).n_parameters():,}"
    assert facts["written"] == state["created"][:10]


def test_a_name_that_is_not_utf8_does_not_break_the_page(folder):
    shutil.copy2(folder / "checkpoints/toy.pt", folder / "checkpoints" / os.fsdecode(b"caf\xe9.pt"))
    assert set(open_page().selectbox(key="model").options) == {"toy.pt", "sft.pt"}


def test_chat_keeps_the_conversation_and_shows_text_as_text(folder):
    page = open_page("sft.pt")
    slider(page, "Length").set_value(8).run()
    for text in ("Hello <script>alert(1)</script>", "And **now**?"):
        say(page, text)
    assert [message.name for message in page.chat_message] == ["user", "assistant"] * 2
    assert page.chat_message[0].text[0].value == "Hello <script>alert(1)</script>"
    assert "tokens/s" in page.session_state.conversation.speed
    assert page.get("download_button")[0].label == "Download"
    button(page, "Clear").click().run()
    assert len(page.chat_message) == 0


def test_an_answer_follows_the_sampling_controls_and_can_be_regenerated(folder):
    page = open_page("sft.pt")
    slider(page, "Temperature").set_value(2.0)
    slider(page, "Top k").set_value(0)
    page.number_input[0].set_value(7)
    say(page, "What is a list?")
    before = list(messages(page))
    config = SamplingConfig(max_new_tokens=200, temperature=2.0, top_k=None, top_p=1.0, seed=7)
    model = TextModel.load("checkpoints/sft.pt")
    assert before[1]["content"] == "".join(model.answer(before[:1], config)) != ""
    button(page, "Regenerate").click().run()
    assert messages(page) == before and len(page.chat_message) == 2  # under the same seed
    page.number_input[0].set_value(8)
    button(page, "Regenerate").click().run()
    assert messages(page)[0] == before[0] and messages(page)[1] != before[1]


def test_the_last_message_is_edited_and_sent_again(folder):
    page = open_page("sft.pt")
    slider(page, "Length").set_value(8).run()
    say(page, "First")
    say(page, "Second")
    button(page, "Edit").click().run()
    assert page.text_area[0].value == "Second"
    messages(page).clear()  # as a click on Clear does, before the form is drawn
    page.run()
    assert not page.exception and not page.text_area
    for text in ("First", "Second"):
        say(page, text)
    button(page, "Edit").click().run()
    button(page, "Cancel").click().run()
    assert [m["content"] for m in messages(page)[::2]] == ["First", "Second"]
    button(page, "Edit").click().run()
    page.text_area[0].set_value("Third")
    button(page, "Send").click().run()
    assert [m["content"] for m in messages(page)[::2]] == ["First", "Third"]
    assert len(page.chat_message) == 4 and not any(b.label == "Send" for b in page.button)


def test_a_base_model_completes_and_does_not_chat(folder):
    page = open_page("toy.pt")
    assert page.button_group[0].value == "Completion"
    choose(page, "Chat")
    assert "not trained to chat" in page.info[0].value and not page.chat_input


def test_a_completion_follows_every_sampling_control(folder):
    page = open_page("toy.pt")
    model = TextModel.load("checkpoints/toy.pt")

    def expected(**options):
        config = SamplingConfig(**{"max_new_tokens": 30, "top_p": 1.0, "seed": 3, **options})
        return "What is" + "".join(model.complete("What is", config))

    page.number_input[0].set_value(3)
    greedy = complete(page, "What is", Length=30, Temperature=0.0)
    assert greedy == expected(greedy=True)
    assert complete(page, "What is", Temperature=2.0, Top_k=1) == greedy
    assert complete(page, "What is", Top_k=0, Top_p=0.05) == expected(temperature=2.0, top_k=None, top_p=0.05)
    assert complete(page, "What is", Top_p=1.0, Temperature=0.0, Repetition_penalty=2.0) == (
        expected(greedy=True, repetition_penalty=2.0)
    )
    assert expected(greedy=True, repetition_penalty=2.0) != greedy
    seeded = complete(page, "What is", Temperature=1.0, Top_k=0, Repetition_penalty=1.0)
    assert seeded == expected(temperature=1.0, top_k=None) != greedy
    assert "tokens/s" in page.session_state.completion.speed and "of 64" in page.session_state.completion.speed
    assert len(complete(page, "What is", Length=1)) < len(seeded)


def test_every_token_has_candidates_and_can_be_replaced_by_one(folder):
    page = open_page("toy.pt")
    complete(page, "What is", Length=12, Temperature=0.0)
    n_prompt = page.session_state.completion.n_prompt
    tokens, before = page.session_state.completion.tokens, ids(page)
    assert tokens[0].logprob is None and len(tokens) == n_prompt + 12
    for token in tokens[1:]:
        probabilities = [math.exp(p) for _, p in token.candidates]
        assert len(probabilities) == 10 and probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) <= 1 and 0 < token.entropy < math.log(400)
    assert all(token.id == token.candidates[0][0] for token in tokens[n_prompt:])  # greedy
    model = TextModel.load("checkpoints/toy.pt")
    with torch.no_grad():
        logprobs = model.model(torch.tensor([before]))[0, :, : model.tokenizer.n_tokens].log_softmax(-1)
    for i, token in enumerate(tokens[1:]):
        assert token.logprob == pytest.approx(logprobs[i, token.id].item(), abs=1e-4)
    step = n_prompt + 4
    slider(page, "Step").set_value(step).run()
    charts = [json.loads(chart.proto.spec) for chart in page.get("vega_lite_chart")]
    assert len(charts) == 3 and charts[0]["layer"]
    other = next(box for box in page.selectbox if box.label.startswith("Another token"))
    assert len(other.options) == 9
    taken = tokens[step - 1].candidates[3][0]
    other.set_value(taken)
    button(page, "Continue from here").click().run()
    assert not page.exception
    after = ids(page)
    assert after[: step - 1] == before[: step - 1] and after[step - 1] == taken and len(after) == step + 12
    kept = list(model.stream(after[:step], SamplingConfig(max_new_tokens=12, greedy=True)))
    assert page.main.text[0].value == model.tokenizer.decode(after[:step]) + "".join(kept)
    slider(page, "Step").set_value(2).run()  # also inside the prompt
    button(page, "Continue from here").click().run()
    assert not page.exception and ids(page)[0] == before[0] and ids(page)[1] != before[1]
    assert page.session_state.completion.n_prompt == 1


def test_the_first_token_has_no_candidates_and_an_empty_prompt_begins_a_document(folder):
    page = open_page("toy.pt")
    text = complete(page, "", Length=5, Temperature=0.0)
    model = TextModel.load("checkpoints/toy.pt")
    assert text == "".join(model.complete("", SamplingConfig(max_new_tokens=5, greedy=True))).strip() != ""
    assert page.session_state.step == 2 and len(page.get("vega_lite_chart")) == 3
    slider(page, "Step").set_value(1).run()
    assert not page.get("vega_lite_chart") and any("no probabilities" in c.value for c in page.caption)


def test_prompt_and_completion_survive_another_mode_and_the_prompt_another_model(folder):
    page = open_page("toy.pt")
    text = complete(page, "What is", Length=5)
    choose(page, "Training")
    choose(page, "Completion")
    assert page.text_area(key="prompt").value == "What is" and page.main.text[0].value == text
    options = page.selectbox(key="model").options
    page.selectbox(key="model").select_index(options.index("sft.pt")).run()
    choose(page, "Completion")
    assert page.text_area(key="prompt").value == "What is" and not page.main.text


@pytest.mark.parametrize("text", ["a" * 1_000_000, "<b>&amp; 日本 🙂 \x07\t\n" * 70_000])
def test_a_text_of_a_million_characters_works(folder, text):
    page = open_page("sft.pt")
    slider(page, "Length").set_value(4).run()
    say(page, text)
    assert len(page.chat_message) == 2 and len(page.chat_message[0].text[0].value) < 30_000
    choose(page, "Completion")
    complete(page, text, Length=4)
    assert any("The model sees the last 64, its context" in caption.value for caption in page.caption)
    assert page.session_state.completion.n_prompt == 64


def test_every_byte_is_visible():
    shown = [
        legible(token) for token in (b" the", b"\n\n\t", b"\xe6\x97", b"\x07", "日 é".encode(), b"\\", b"\xc2\xa0")
    ]
    assert shown == ["␣the", "↵↵⇥", "\\xe6\\x97", "\\x07", "日␣é", "\\", "\\xa0"]
    assert len({legible(bytes([b])) for b in range(256)}) == 256


def test_a_corrupt_checkpoint_is_reported_and_the_others_work(folder):
    (folder / "checkpoints/corrupt.pt").write_bytes(b"no")
    page = open_page("corrupt.pt")
    assert page.error and any("not a checkpoint" in text.value for text in page.text)
    page.selectbox(key="model").select_index(page.selectbox(key="model").options.index("toy.pt")).run()
    assert not page.error and complete(page, "What is", Length=3)


def test_a_checkpoint_may_be_deleted_or_replaced_while_the_page_is_open(folder):
    page = open_page("toy.pt")
    complete(page, "What is", Length=3)
    shutil.copy(folder / "checkpoints/sft.pt", folder / "checkpoints/toy.pt")
    page.run()
    assert not page.exception and page.sidebar.text[0].value.startswith(
        "kind: answers"
    )  # the new file under the old name
    (folder / "checkpoints/toy.pt").unlink()
    page.run()
    assert not page.exception and page.warning and "toy.pt" in page.sidebar.text[0].value
    assert page.selectbox(key="model").options == ["sft.pt"]
    choose(page, "Completion")
    assert complete(page, "What is", Length=3).startswith("What is")
    (folder / "checkpoints/sft.pt").unlink()
    page.run()
    assert not page.exception and "make demo" in page.info[0].value


def test_for_a_classifier_the_page_names_classify_py(folder):
    state = checkpoint.with_class_head(load_checkpoint("checkpoints/toy.pt"), 2)
    checkpoint.save("checkpoints/spam.pt", {**state, "kind": "classifier", "labels": ["ham", "spam"]})
    page = open_page("spam.pt")
    assert "classify.py" in page.info[0].value


def test_the_training_view_shows_the_log_and_follows_it(folder):
    log = folder / "checkpoints/toy.jsonl"
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    os.utime(log, (time.time() - 900, time.time() - 900))
    page = open_page("toy.pt")
    choose(page, "Training")
    best = min(entry["val_loss"] for entry in entries if "val_loss" in entry)
    shown = {metric.label: metric.value for metric in page.metric}
    assert shown["Step"] == "20" and shown["Best validation loss"] == f"{best:.4f}"
    assert page.caption[-1].value.startswith("not running") and len(page.get("vega_lite_chart")) == 1
    with open(log, "a") as file:
        file.write(json.dumps({"step": 30, "loss": 1.25, "tokens": 9999, "seconds": 99.0}) + "\n")
    page.run()
    shown = {metric.label: metric.value for metric in page.metric}
    assert shown["Step"] == "30" and shown["Training loss"] == "1.2500" and page.caption[-1].value.startswith("running")
    with open(log, "a") as file:
        file.write('[1]\n{"a": 1}\n{"step"')
    page.run()
    assert not page.exception and next(metric.value for metric in page.metric) == "30"
    log.unlink()
    page.run()
    assert not page.exception and "no log" in page.info[0].value
