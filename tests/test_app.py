"""The page with the toy models, run by Streamlit's test driver: every control and every state."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from app_page import bars, choose, complete, drawn, new_page, open_page, pick, press, said, say, slider, state
from conftest import REPOSITORY, contents
from streamlit.testing.v1 import AppTest

from generation.config import SamplingConfig
from generation.text_model import TextModel
from interface import page as pages
from interface.completion_view import branch_off
from interface.inside_view import EXAMPLE
from text.token_files import read_tokens
from text.tokenizer import legible
from weights import checkpoint
from weights.loading import load_checkpoint

SAMPLES = REPOSITORY / "tests/samples"


def test_the_controls_need_no_torch():
    code = "import sys, interface.page; assert 'streamlit' in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_without_a_model_the_page_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "make demo" in open_page().info[0].value


def test_the_picker_offers_every_checkpoint_except_last_ones_and_shows_its_facts(page_folder):
    (page_folder / "checkpoints/snapshots").mkdir()
    shutil.copy2(page_folder / "checkpoints/toy.pt", page_folder / "checkpoints/snapshots/toy_step_10.pt")
    os.utime(page_folder / "checkpoints/toy.pt")  # the newest comes first
    page = open_page()
    options = page.selectbox(key="model").options
    assert options[0] == "toy.pt" and set(options) == {"toy.pt", "sft.pt", "snapshots/toy_step_10.pt"}
    loaded = load_checkpoint("checkpoints/toy.pt")
    facts = dict(line.split(": ") for line in page.sidebar.text[0].value.splitlines())
    assert facts["kind"] == "completes text" and facts["training tokens"] == f"{loaded['tokens']:,}"
    assert facts["validation loss"] == f"{loaded['history'][-1]['val_loss']:.4f}"


@pytest.mark.parametrize(("model", "data"), [("toy.pt", "val.bin"), ("sft.pt", "sft_val.bin")])
def test_the_page_opens_on_a_sentence_and_on_prompts_from_the_models_data(page_folder, toy, model, data):
    page, loaded = open_page(model), load_checkpoint(f"checkpoints/{model}")
    text = page.markdown[0].value.replace("\\", "")
    assert text.startswith("A GPT-2 with ") and f"{loaded['history'][-1]['val_loss']:.2f}" in text
    held_out = checkpoint.tokenizer_of(loaded).decode(read_tokens(toy / "data/toy" / data).tolist())
    prompts = loaded["prompts"]
    assert 1 < len(prompts) <= 6 and all(prompt in held_out and len(prompt) <= 80 for prompt in prompts)
    assert [page.button(key=f"try {i}").label.replace("\\", "") for i in range(len(prompts))] == prompts
    slider(page, "Length").set_value(3)
    page.button(key="try 1").click().run()
    assert not page.exception and not any(b.key == "try 0" for b in page.button)
    shown = page.main.text[0].value if model == "toy.pt" else said(page)[0]
    assert shown.startswith(prompts[1])


def test_chat_follows_the_sampling_controls_and_keeps_the_conversation(page_folder):
    page = open_page("sft.pt")
    slider(page, "Temperature").set_value(2.0)
    slider(page, "Top k").set_value(0)
    slider(page, "Length").set_value(8)
    page.number_input[0].set_value(7)
    question = "What is <script>alert(1)</script>?"
    say(page, question)
    before = said(page)
    model = TextModel.load("checkpoints/sft.pt")
    config = SamplingConfig(max_new_tokens=8, temperature=2.0, top_k=None, top_p=1.0, seed=7)
    ids = model.answer_ids([{"role": "user", "content": question}], config)
    assert before == [question, model.write(ids, config, strip=True)]
    assert page.chat_message[0].text[0].value == question and "tokens/s" in state(page).answers[0].speed
    press(page, "Regenerate")
    assert said(page) == before and len(page.chat_message) == 2  # under the same seed
    page.number_input[0].set_value(8)
    press(page, "Regenerate")
    assert said(page)[0] == question and said(page) != before
    say(page, "And **now**?")
    assert [message.name for message in page.chat_message] == ["user", "assistant"] * 2
    assert page.get("download_button")[0].label == "Download"
    press(page, "Clear")
    assert len(page.chat_message) == 0


def test_the_tokens_of_an_answer_are_chips_too(page_folder):
    page = open_page("sft.pt")
    slider(page, "Length").set_value(8).run()
    say(page, "Hello")
    assert not drawn(page, "chips")
    page.toggle(key="tokens").set_value(True).run()
    say(page, "And now?")
    answers, model = state(page).answers, TextModel.load("checkpoints/sft.pt")
    assert len(answers) == 2
    for answer, message in zip(answers, said(page)[1::2], strict=True):
        assert model.tokenizer.decode(answer.ids[answer.n_prompt :]).strip() == message.strip()
    shown = [[item["p"] for item in chips] for chips in drawn(page, "chips")]
    scored = [model.score(answer.ids, 0)[answer.n_prompt :] for answer in answers]
    expected = [[math.exp(token.logprob) for token in tokens] for tokens in scored if tokens]
    assert [p for chips in shown for p in chips] == pytest.approx([p for ps in expected for p in ps], abs=1e-4)
    i = max((0, 1), key=lambda i: len(answers[i].tokens) - answers[i].n_prompt)  # an answer may be empty
    state(page).clicked_token = (2 * i + 1, len(answers[i].tokens) - 1)
    page.run()
    assert not page.exception and answers[i].ids[-1] in [row[0] for row in bars(page)]
    pick(page, "toy.pt")  # its tokenizer may be another


def test_an_answer_that_the_model_is_not_sure_of_is_marked(page_folder):
    for least in (0.0, 1.0):
        torch.save({**contents("checkpoints/sft.pt"), "min_confidence": least}, "checkpoints/sft.pt")
        page = open_page("sft.pt")
        say(page, "Hello")
        assert [caption.value.startswith("A guess") for caption in page.caption].count(True) == least


def test_a_base_model_completes_and_does_not_chat(page_folder):
    page = open_page("toy.pt")
    assert page.button_group[0].value == "Completion"
    choose(page, "Chat")
    assert "not trained to chat" in page.info[0].value and not page.chat_input
    [code] = page.code
    assert re.match("python train_sft.py .*--model checkpoints/toy.pt .*--data CHATS.jsonl", code.value)


def test_a_completion_follows_every_sampling_control(page_folder):
    page = open_page("toy.pt")
    model = TextModel.load("checkpoints/toy.pt")
    ids = model.prompt_ids("What is")

    def expected(**options):
        config = SamplingConfig(**{"max_new_tokens": 30, "top_p": 1.0, "seed": 3, **options})
        return "What is" + model.write(ids, config)

    page.number_input[0].set_value(3)
    greedy = complete(page, "What is", Length=30, Temperature=0.0)
    assert greedy == expected(greedy=True)
    assert complete(page, "What is", Temperature=2.0, Top_k=1) == greedy
    assert complete(page, "What is", Top_k=0, Top_p=0.05) == expected(temperature=2.0, top_k=None, top_p=0.05)
    assert complete(page, "What is", Top_p=1.0, Temperature=0.5, Repetition_penalty=2.0) == (
        expected(temperature=0.5, top_k=None, repetition_penalty=2.0)
    )
    assert "tokens/s" in state(page).branch.speed and "of 64" in state(page).branch.speed
    assert len(complete(page, "What is", Length=1)) < len(greedy)


def test_every_token_has_candidates_and_can_be_replaced_by_one(page_folder):
    page = open_page("toy.pt")
    complete(page, "What is", Length=12, Temperature=0.0)
    old = state(page).branch
    before, n_prompt = old.ids, old.n_prompt
    assert old.tokens[0].logprob is None and len(old.tokens) == n_prompt + 12
    model = TextModel.load("checkpoints/toy.pt")
    with torch.no_grad():
        logprobs = model.model(torch.tensor([before]))[0, :, : model.tokenizer.n_tokens].log_softmax(-1)
    shown = [token.logprob for token in old.tokens[1:]]
    assert shown == pytest.approx([logprobs[i, token].item() for i, token in enumerate(before[1:])], abs=1e-4)
    step = n_prompt + 4
    slider(page, "Step").set_value(step).run()
    expected = logprobs[step - 2].exp().topk(10)
    assert [row[0] for row in bars(page)] == expected.indices.tolist()
    assert [row[1] for row in bars(page)] == pytest.approx(expected.values.tolist(), abs=1e-4)
    assert [row[2] for row in bars(page)] == [1.0] + [0.0] * 9  # greedy

    taken = bars(page)[3][0]
    branch_off(model, state(page), old, step - 1, taken)  # as a click on a bar does
    page.run()
    after = state(page).branch.ids
    assert after[: step - 1] == before[: step - 1] and after[step - 1] == taken and len(after) == step + 12
    text = model.tokenizer.decode(after[:step]) + model.write(
        after[:step], SamplingConfig(max_new_tokens=12, greedy=True)
    )
    assert page.main.text[0].value == text
    branch_off(model, state(page), state(page).branch, 1, taken)  # also inside the prompt
    page.run()
    assert state(page).branch.ids[:2] == [before[0], taken] and state(page).branch.n_prompt == 1
    page.button(key=f"branch {old.name}").click().run()  # and back
    assert state(page).branch is old and old.ids == before
    assert page.main.text[0].value == model.tokenizer.decode(before)


def test_the_bars_follow_the_sampling_controls_without_writing_again(page_folder):
    page = open_page("toy.pt")
    complete(page, "What is", Length=12, Temperature=1.0, Top_k=0)
    text, model = state(page).branch, TextModel.load("checkpoints/toy.pt")
    before, prompt = text.ids, text.ids[: text.n_prompt]
    logits = model.next_logits(prompt).clone()
    likeliest = logits.softmax(dim=-1).topk(10).values
    for kind in (1, 2):
        assert [row[kind] for row in bars(page)[:10]] == pytest.approx((likeliest / likeliest[0]).tolist(), abs=1e-5)
    slider(page, "Top k").set_value(3).run()
    expected = [*(likeliest[:3] / likeliest[0]).tolist(), *[0.0] * 7]
    assert [row[2] for row in bars(page)[:10]] == pytest.approx(expected, abs=1e-5)
    assert any("keep 3 of" in caption.value for caption in page.caption)
    slider(page, "Top k").set_value(0)
    slider(page, "Repetition penalty").set_value(2.0).run()
    seen = list(set(prompt))
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 2, logits[seen] * 2)
    shown = {row[0]: row[2] for row in bars(page)}
    expected = logits.softmax(dim=-1)[list(shown)]
    largest = max(expected.max().item(), likeliest[0].item())
    assert list(shown.values()) == pytest.approx((expected / largest).tolist(), abs=1e-5)
    assert state(page).branch.ids == before


def test_the_first_token_has_no_candidates_and_an_empty_prompt_begins_a_document(page_folder):
    page = open_page("toy.pt")
    text = complete(page, "", Length=5, Temperature=0.0)
    model = TextModel.load("checkpoints/toy.pt")
    config = SamplingConfig(max_new_tokens=5, greedy=True)
    assert text == model.write(model.prompt_ids(""), config).strip() != ""
    assert page.session_state.step == 2 and len(page.get("vega_lite_chart")) == 2
    slider(page, "Step").set_value(1).run()
    assert not drawn(page, "bars") and any("no probabilities" in caption.value for caption in page.caption)


def test_a_token_of_a_completion_is_one_click_away_from_its_layers(page_folder):
    page = open_page("toy.pt")
    complete(page, "What is", Length=12, Temperature=0.0)
    tokenizer, step = state(page).branch.tokenizer, state(page).branch.n_prompt + 5
    slider(page, "Step").set_value(step).run()
    press(page, "Look inside")
    assert page.button_group[0].value == "Inside" and page.button_group[1].value == "Layer by layer"
    ids = state(page).branch.ids[:step]
    assert state(page).inside_text == tokenizer.decode(ids)
    [table] = drawn(page, "table")
    assert [item["parts"][0][1] for item in table[1 : step + 1]] == [legible(tokenizer.decode_bytes([i])) for i in ids]
    choose(page, "Completion")
    assert page.session_state.step == step  # and the way back
    choose(page, "Inside")
    assert page.button_group[1].value == "Layer by layer"  # the last part stays
    state(page).inside_cell = (9, 0)  # of a model with more layers
    page.run()
    assert not page.exception


def test_inside_begins_with_a_text_like_those_that_the_model_was_trained_on(page_folder):
    shutil.copy(SAMPLES / "sft.pt", page_folder / "checkpoints/old.pt")  # stores no prompts
    for model in ("toy.pt", "old.pt"):
        page = open_page(model)
        assert page.button(key="try 0").label  # generic prompts, if the model has none
        choose(page, "Inside")
        [field] = [e.proto for e in page.get("bidi_component") if e.proto.component_name == "live_text"]
        prompts = load_checkpoint(f"checkpoints/{model}").get("prompts", [])
        assert json.loads(field.json)["text"] == max(prompts, key=len, default=EXAMPLE)


def compare(page: AppTest, second: str = "", temperature: float = 0.0) -> tuple[str, list[str]]:
    """Completes a prompt twice. Returns the line that names the difference, and the names of the marked tokens."""
    if not page.toggle(key="compare").value:
        page.toggle(key="compare").set_value(True).run()
    pick(page, second or "the same model at another temperature", "second model")
    if not second:
        slider(page, "Second temperature").set_value(temperature)
    page.text_area(key="prompt").set_value("What is")
    press(page, "Complete both")
    lines = [m.value.replace("\\", "") for m in page.main.markdown]
    line = next((line for line in lines if re.match("The same|Both are the same|They differ", line)), "")
    marked = [item for chips in drawn(page, "chips") for item in chips if "marked" in item["class"]]
    return line, ["".join(part[1] for part in item["parts"]) for item in marked]


def test_two_temperatures_are_compared_and_the_first_other_token_is_marked(page_folder):
    page = open_page("toy.pt")
    slider(page, "Length").set_value(12)
    slider(page, "Temperature").set_value(0.6).run()  # no seed is given, but both draw the same random numbers
    line, marked = compare(page, temperature=0.6)
    assert line.startswith("Both are the same: ") and not marked
    page.number_input[0].set_value(5).run()
    line, marked = compare(page, temperature=2.0)
    model, texts = TextModel.load("checkpoints/toy.pt"), []
    ids = model.prompt_ids("What is")
    for text, temperature in zip(state(page).compared, (0.6, 2.0), strict=True):
        config = SamplingConfig(max_new_tokens=12, temperature=temperature, top_p=1.0, seed=5)
        [sample] = model.samples(ids, config, 1)
        assert text.ids == ids + [token.id for token in sample.tokens]
        texts.append(sample.text)
    n = len(os.path.commonprefix(texts))
    assert line.startswith(f"The same for {n} character" if n else "They differ from the beginning: ")
    assert len(marked) == 2 and all(f"“{name}” (" in line for name in marked)


def test_two_models_are_compared_even_if_their_tokenizers_differ(page_folder):
    shutil.copy(SAMPLES / "sft.pt", page_folder / "checkpoints/old.pt")
    (page_folder / "checkpoints/corrupt.pt").write_bytes(b"no")
    page = open_page("toy.pt")
    slider(page, "Length").set_value(12).run()
    compare(page, "corrupt.pt")
    assert page.error and not state(page).compared
    line, marked = compare(page, "old.pt")
    first, second = state(page).compared
    assert first.tokenizer.name != second.tokenizer.name and len(marked) == 2 and marked[0] in line
    choose(page, "Training")
    choose(page, "Completion")
    assert page.main.text[0].value == first.decode()
    pick(page, "old.pt")
    choose(page, "Completion")
    assert page.selectbox(key="second model").value == "" and not drawn(page, "chips")


def reload(page: AppTest, **address: str) -> AppTest:
    """Opens another page with the address of a page, or with another address."""
    again = new_page()
    for name, value in (address or page.query_params).items():
        again.query_params[name] = value[0] if isinstance(value, list) else value
    return again.run()


def test_a_reload_keeps_the_texts_for_those_who_have_the_address_only(page_folder, monkeypatch):
    page = open_page("sft.pt")
    slider(page, "Length").set_value(5).run()
    say(page, "Hello")
    choose(page, "Completion")
    text = complete(page, "What is")
    os.utime("checkpoints/toy.pt")  # a newer model, on which a new page opens
    again = reload(page)
    assert not again.exception and again.selectbox(key="model").value == Path("checkpoints/sft.pt")
    assert again.main.text[0].value == text and again.text_area(key="prompt").value == "What is"
    choose(again, "Chat")
    assert len(again.chat_message) == 2 and said(again) == said(page)
    for address in ({"model": "sft.pt"}, {"session": "guess", "model": "sft.pt"}):
        stranger = reload(page, **address)
        assert not stranger.chat_message and stranger.query_params["session"] != page.query_params["session"]
    monkeypatch.setattr(pages, "MAX_PAGES", 2)
    for _ in range(2):  # the oldest is forgotten
        open_page()
    assert not reload(page, session=page.query_params["session"]).chat_message


def test_prompt_and_completion_survive_another_mode_and_the_prompt_another_model(page_folder):
    page = open_page("toy.pt")
    text = complete(page, "What is", Length=5)
    choose(page, "Training")
    choose(page, "Completion")
    assert page.text_area(key="prompt").value == "What is" and page.main.text[0].value == text
    pick(page, "sft.pt")
    assert page.button_group[0].value == "Chat"
    choose(page, "Completion")
    assert page.text_area(key="prompt").value == "What is" and not page.main.text
    complete(page, "Once upon a time. " * 100, Length=4)
    assert any("The model sees the last 64, its context" in caption.value for caption in page.caption)
