"""The page with the toy models, run by Streamlit's test driver: every control and every state."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from interface.sessions import Branch, Completion
from interface.streaming import escape
from streamlit.testing.v1 import AppTest

from generation.config import SamplingConfig
from generation.text_model import TextModel, Token
from interface import sessions
from interface.inside_view import EXAMPLE
from interface.training_view import recent_speed, status
from system.locks import locked, output_lock
from text import tokenizer as tokenizers
from text.token_files import read_tokens
from text.tokenizer import legible
from training.loader import Windows
from training.prompts import beginnings
from weights import checkpoint
from weights.loading import load_checkpoint

SAMPLES = Path(__file__).parent / "samples"


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
    return page.session_state.session.conversation.messages


def completion(page: AppTest) -> Branch:
    return page.session_state.session.completion.branch


def ids(page: AppTest) -> list[int]:
    return [token.id for token in completion(page).tokens]


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
    assert "tokens/s" in page.session_state.session.conversation.speed
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
    teach = (
        "python train_sft.py --preset demo --model checkpoints/toy.pt --out checkpoints/toy-chat.pt --data CHATS.jsonl"
    )
    assert [code.value for code in page.code] == [teach]


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
    assert complete(page, "What is", Top_p=1.0, Temperature=0.5, Repetition_penalty=2.0) == (
        expected(temperature=0.5, top_k=None, repetition_penalty=2.0)
    )
    seeded = complete(page, "What is", Temperature=1.0, Repetition_penalty=1.0)
    assert seeded == expected(temperature=1.0, top_k=None) != greedy
    plain, penalized = ({expected(temperature=t, top_k=None, repetition_penalty=p) for t in (0.5, 0.8)} for p in (1, 2))
    assert plain != penalized  # whatever the toy says
    assert "tokens/s" in completion(page).speed and "of 64" in completion(page).speed
    assert len(complete(page, "What is", Length=1)) < len(seeded)


def bars(page: AppTest) -> list[dict]:
    """The rows of bars on the page."""
    return json.loads(component(page, "token_bars")[-1].json)["rows"]


def component(page: AppTest, name: str) -> list:
    return [e.proto for e in page.get("bidi_component") if e.proto.component_name == name]


def test_every_token_has_candidates_and_can_be_replaced_by_one(folder):
    page = open_page("toy.pt")
    complete(page, "What is", Length=12, Temperature=0.0)
    n_prompt = completion(page).n_prompt
    tokens, before = completion(page).tokens, ids(page)
    assert tokens[0].logprob is None and len(tokens) == n_prompt + 12
    model = TextModel.load("checkpoints/toy.pt")
    with torch.no_grad():
        logprobs = model.model(torch.tensor([before]))[0, :, : model.tokenizer.n_tokens].log_softmax(-1)
    for i, token in enumerate(tokens[1:]):
        assert token.logprob == pytest.approx(logprobs[i, token.id].item(), abs=1e-4)
        assert 0 < token.entropy < math.log(400)
    step = n_prompt + 4
    slider(page, "Step").set_value(step).run()
    rows, expected = bars(page), logprobs[step - 2].exp()
    assert [row["id"] for row in rows] == expected.topk(10).indices.tolist()
    assert [row["before"] for row in rows] == pytest.approx(expected.topk(10).values.tolist(), abs=1e-4)
    assert [row["after"] for row in rows] == [1.0] + [0.0] * 9  # greedy
    assert [row["chosen"] for row in rows] == [True] + [False] * 9

    taken = rows[3]["id"]
    old = page.session_state.session.completion.branch
    branch(page, step - 1, taken)
    after = ids(page)
    assert after[: step - 1] == before[: step - 1] and after[step - 1] == taken and len(after) == step + 12
    kept = list(model.stream(after[:step], SamplingConfig(max_new_tokens=12, greedy=True)))
    text = model.tokenizer.decode(after[:step]) + "".join(kept)
    assert page.main.text[0].value == text
    branch(page, 1, taken)  # also inside the prompt
    assert ids(page)[:2] == [before[0], taken] and completion(page).n_prompt == 1
    page.button(key=f"branch {old.name}").click().run()  # and back
    assert ids(page) == before and completion(page) is old
    assert page.main.text[0].value == model.tokenizer.decode(before)
    for _ in range(10):
        branch(page, step - 1, taken)
    assert len(page.session_state.session.completion.branches) == 8


def inside(page: AppTest) -> tuple[str, list[str]]:
    """The text in the mode Inside, and the tokens of the table of layers."""
    [field], [table] = component(page, "live_text"), component(page, "layers")
    return json.loads(field.json)["text"], json.loads(table.json)["tokens"]


def test_a_token_of_a_completion_is_one_click_away_from_its_layers(folder):
    page = open_page("toy.pt")
    complete(page, "What is", Length=12, Temperature=0.0)
    tokenizer, step = TextModel.load("checkpoints/toy.pt").tokenizer, completion(page).n_prompt + 5
    slider(page, "Step").set_value(step).run()
    button(page, "Look inside").click().run()
    assert not page.exception and not page.warning
    assert page.button_group[0].value == "Inside" and page.button_group[1].value == "Layer by layer"
    before = ids(page)[:step]
    assert inside(page) == (tokenizer.decode(before), [legible(tokenizer.decode_bytes([i])) for i in before])
    choose(page, "Completion")
    assert page.session_state.step == step  # and the way back
    page.session_state["inside_part"] = "Attention"
    choose(page, "Training")
    choose(page, "Inside")
    assert page.button_group[1].value == "Attention"  # the last part stays


def test_inside_begins_with_a_text_like_those_that_the_model_was_trained_on(folder):
    shutil.copy(SAMPLES / "sft.pt", folder / "checkpoints/old.pt")  # stores no prompts
    for model in ("toy.pt", "sft.pt", "old.pt"):
        page = open_page(model)
        page.session_state["inside_part"] = "Layer by layer"
        choose(page, "Inside")
        prompts = load_checkpoint(f"checkpoints/{model}").get("prompts", [])
        assert inside(page)[0] == max(prompts, key=len, default=EXAMPLE)


def compared(page: AppTest) -> tuple[str, list[Completion], list[str | None]]:
    """The line that names the difference, the two completions, and the marked token of each."""
    drawn = [json.loads(proto.json) for proto in component(page, "token_chips")]
    marked = [d["tokens"][d["mark"]]["text"] if d["mark"] < len(d["tokens"]) else None for d in drawn]
    lines = [m.value.replace("\\", "") for m in page.main.markdown]
    [line] = [line for line in lines if re.match("The same|Both are the same|They differ", line)]
    return line, [side.completion for side in page.session_state.comparison], marked


def compare(page: AppTest, second: str = "", temperature: float = 0.0) -> None:
    if not page.toggle(key="compare").value:
        page.toggle(key="compare").set_value(True).run()
    picker = page.selectbox(key="second model")
    picker.select_index(picker.options.index(second) if second else 0).run()
    if not second:
        slider(page, "Second temperature").set_value(temperature)
    page.text_area(key="prompt").set_value("What is")
    button(page, "Complete both").click().run()
    assert not page.exception


def test_two_temperatures_are_compared_and_the_first_other_token_is_marked(folder):
    page = open_page("toy.pt")
    slider(page, "Length").set_value(12)
    slider(page, "Temperature").set_value(0.6).run()  # no seed is given, but both draw the same random numbers
    compare(page, temperature=0.6)
    assert compared(page)[0] == "Both are the same: 12 tokens." and compared(page)[2] == [None, None]
    page.number_input[0].set_value(5).run()
    compare(page, temperature=2.0)
    line, sides, marked = compared(page)
    model = TextModel.load("checkpoints/toy.pt")
    prompt = model.prompt_ids("What is")
    tokens = []
    for side, temperature in zip(sides, (0.6, 2.0), strict=True):
        config = SamplingConfig(max_new_tokens=12, temperature=temperature, top_p=1.0, seed=5)
        tokens.append([token for [token] in model.steps(prompt, config, top_logprobs=0)])
        assert [t.id for t in side.branch.tokens] == prompt + [t.id for t in tokens[-1]]
    n = next(i for i, (a, b) in enumerate(zip(*tokens, strict=True)) if a.id != b.id)
    names = [legible(model.tokenizer.decode_bytes([side[n].id])) for side in tokens]
    chances = [f"“{name}” ({math.exp(side[n].logprob):.0%})" for name, side in zip(names, tokens, strict=True)]
    assert marked == names
    assert line == f"The same for {n} token{'s' * (n != 1)}; then {chances[0]} and {chances[1]}."


def test_a_comparison_offers_the_models_prompts(folder):
    page = open_page("toy.pt")
    page.toggle(key="compare").set_value(True).run()
    slider(page, "Length").set_value(3)
    prompt = load_checkpoint("checkpoints/toy.pt")["prompts"][1]
    page.button(key="try 1").click().run()
    assert not page.exception and not any(b.key == "try 0" for b in page.button)
    assert all(text.value.startswith(prompt) for text in page.main.text) and len(page.main.text) == 2


def test_models_with_other_tokenizers_are_compared_by_characters(folder):
    shutil.copy(SAMPLES / "sft.pt", folder / "checkpoints/old.pt")
    (folder / "checkpoints/corrupt.pt").write_bytes(b"no")
    page = open_page("toy.pt")
    slider(page, "Length").set_value(12).run()
    compare(page, "corrupt.pt")
    assert page.error and "comparison" not in page.session_state
    compare(page, "old.pt")
    line, sides, marked = compared(page)
    models = [TextModel.load(f"checkpoints/{name}.pt") for name in ("toy", "old")]
    texts = [
        m.tokenizer.decode_bytes(t.id for t in s.branch.tokens[s.branch.n_prompt :])
        for m, s in zip(models, sides, strict=True)
    ]
    n = len(os.path.commonprefix(texts))
    assert models[0].tokenizer.name != models[1].tokenizer.name and n < len(texts[0])
    shared = f"The same for {len(texts[0][:n].decode())} character" if n else "They differ from the beginning: "
    assert line.startswith(shared) and None not in marked
    choose(page, "Training")
    choose(page, "Completion")
    assert compared(page)[0] == line  # and without a second load of the model
    options = page.selectbox(key="model").options
    page.selectbox(key="model").select_index(options.index("old.pt")).run()
    choose(page, "Completion")
    assert page.selectbox(key="second model").value == "" and not component(page, "token_chips")


def branch(page: AppTest, position: int, choice: int) -> None:
    """Does what a click on a bar does."""
    old = completion(page).tokens[position]
    token = Token(choice, -1.0, (), old.entropy, old.n_context)
    page.session_state.session.completion.continue_from(position, token, "another")
    page.session_state.branched = True
    page.run()
    assert not page.exception


def test_the_bars_follow_the_sampling_controls_without_writing_again(folder):
    page = open_page("toy.pt")
    complete(page, "What is", Length=12, Temperature=1.0, Top_k=0)
    before = ids(page)
    rows = bars(page)
    assert [row["after"] for row in rows] == pytest.approx([row["before"] for row in rows], abs=1e-6)
    slider(page, "Top k").set_value(3).run()
    narrow = bars(page)
    assert [row["before"] for row in narrow] == [row["before"] for row in rows]
    likeliest = [row["before"] for row in rows[:3]]
    expected = [p / sum(likeliest) for p in likeliest] + [0.0] * 7
    assert [row["after"] for row in narrow[:10]] == pytest.approx(expected, abs=1e-6)
    assert any("keep 3 of" in caption.value for caption in page.caption)
    slider(page, "Temperature").set_value(0.5).run()
    assert bars(page)[0]["after"] == pytest.approx(likeliest[0] ** 2 / sum(p**2 for p in likeliest), abs=1e-6)
    assert ids(page) == before
    slider(page, "Temperature").set_value(1.0)
    slider(page, "Repetition penalty").set_value(2.0).run()
    slider(page, "Top k").set_value(0).run()
    assert [row["before"] for row in bars(page)[:10]] == [row["before"] for row in rows[:10]]
    model = TextModel.load("checkpoints/toy.pt")
    prompt = before[: completion(page).n_prompt]
    logits, seen = model.next_logits(prompt).clone(), list(set(prompt))
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 2, logits[seen] * 2)
    expected = logits.softmax(dim=-1)[[row["id"] for row in bars(page)]].tolist()
    assert [row["after"] for row in bars(page)] == pytest.approx(expected, abs=1e-6)


def test_the_page_opens_on_a_sentence_and_on_prompts_from_the_models_data(folder, toy):
    for model, data in (("toy.pt", "val.bin"), ("sft.pt", "sft_val.bin")):
        page = open_page(model)
        state = load_checkpoint(f"checkpoints/{model}")
        text = page.markdown[0].value.replace("\\", "")
        assert page.title[0].value == "GPT-2" and text.startswith("A GPT-2 with ") and "trained on data/toy" in text
        assert f"{state['history'][-1]['val_loss']:.2f}" in text
        held_out = checkpoint.tokenizer_of(state).decode(read_tokens(toy / "data/toy" / data).tolist())
        prompts = state["prompts"]
        assert 1 < len(prompts) <= 6 and all(prompt in held_out and len(prompt) <= 80 for prompt in prompts)
        if model == "toy.pt":
            assert all(f"\n{prompt}" in "\n" + held_out.replace("<|endoftext|>", "\n") for prompt in prompts)
        else:
            assert all(f"<|user|> {prompt}<|endoftext|>" in held_out for prompt in prompts)
        offered = [page.button(key=f"try {i}") for i in range(len(prompts))]
        assert [one.label.replace("\\", "") for one in offered] == prompts
        slider(page, "Length").set_value(3)
        offered[1].click().run()
        assert not page.exception and not any(b.key == "try 0" for b in page.button)
        if model == "toy.pt":
            assert page.main.text[0].value.startswith(prompts[1]) and len(completion(page).tokens) > 3
        else:
            assert messages(page)[0] == {"role": "user", "content": prompts[1]} and len(messages(page)) == 2


def test_prompts_are_the_first_words_of_documents_or_of_paragraphs(tmp_path):
    tokenizer = tokenizers.gpt2()

    def prompts(texts: list[str]) -> list[str]:
        tokenizer.encode_documents(texts).tofile(tmp_path / "val.bin")
        return beginnings(Windows([tmp_path / "val.bin"], 8, 1, 0), tokenizer)

    documents = [f"Document {i} begins\nand goes on\n\nto its end" for i in range(12)]
    assert prompts(documents) == [f"Document {i} begins" for i in (1, 2, 4, 6, 8, 10)]
    paragraphs = ["to its end", "Document 1 begins", "Document 2 begins"]  # the first may begin in the middle of a word
    assert prompts(["\n\n".join(documents[:3])]) == paragraphs
    names = [f"package.function_{i}(self)\n\nReturn the number {i}." for i in range(12)]
    assert prompts(names)[0] == "Return the number 0."
    long = "naïve 日本 " + "word " * 100
    assert prompts([long]) == [long[:60].rpartition(" ")[0]] and prompts([""]) == []


def test_a_model_without_prompts_gets_generic_ones(folder):
    shutil.copy(SAMPLES / "sft.pt", folder / "checkpoints/old.pt")
    page = open_page("old.pt")
    assert page.button(key="try 1").label.startswith("What is the capital of France")
    choose(page, "Completion")
    assert page.button(key="try 0").label == "Once upon a time"


def reload(page: AppTest, **address: str) -> AppTest:
    """Opens another page with the address of a page, or with another address."""
    again = AppTest.from_file(str(REPOSITORY / "app.py"), default_timeout=60)
    for name, value in (address or page.query_params).items():
        again.query_params[name] = value[0] if isinstance(value, list) else value
    return again.run()


def test_a_reload_keeps_the_texts_for_those_who_have_the_address_only(folder, monkeypatch):
    page = open_page("sft.pt")
    slider(page, "Length").set_value(5).run()
    say(page, "Hello")
    choose(page, "Completion")
    text = complete(page, "What is")
    os.utime("checkpoints/toy.pt")  # a newer model, on which a new page opens
    again = reload(page)
    assert not again.exception and again.selectbox(key="model").value == Path("checkpoints/sft.pt")
    assert [message.name for message in again.chat_message] == ["user", "assistant"] and messages(again) is messages(
        page
    )
    choose(again, "Completion")
    assert again.main.text[0].value == text and again.text_area(key="prompt").value == "What is"

    for address in ({"model": "sft.pt"}, {"session": "", "model": "sft.pt"}, {"session": "guess", "model": "sft.pt"}):
        stranger = reload(page, **address)
        assert not stranger.chat_message and stranger.query_params["session"] not in ([""], ["guess"], "", "guess")
        assert stranger.query_params["session"] != page.query_params["session"]
    monkeypatch.setattr(sessions, "MAX_SESSIONS", 2)
    for _ in range(2):  # the memory for sessions is bounded: the oldest is forgotten
        open_page()
    assert len(sessions._sessions) == 2 and not reload(page, session=page.query_params["session"]).chat_message
    say(page := open_page("sft.pt"), "Hello")
    monkeypatch.setattr(sessions, "MAX_SIZE", 5)  # and so is the size of each
    page.run()
    assert len(page.chat_message) == 2 and not reload(page, session=page.query_params["session"]).chat_message


def test_the_tokens_of_an_answer_are_chips_too(folder):
    page = open_page("sft.pt")
    slider(page, "Length").set_value(8).run()
    say(page, "Hello")
    assert not component(page, "token_chips")
    page.toggle(key="tokens").set_value(True).run()
    say(page, "And now?")
    assert not page.exception
    drawn = [json.loads(proto.json)["tokens"] for proto in component(page, "token_chips")]
    answers = page.session_state.session.conversation.answers
    assert len(drawn) == len(answers) == 2
    model = TextModel.load("checkpoints/sft.pt")
    for chips, answer, message in zip(drawn, answers, messages(page)[1::2], strict=True):
        assert model.tokenizer.decode(token.id for token in answer.tokens).strip() == message["content"].strip()
        scored = model.score([*answer.prompt, *(token.id for token in answer.tokens)], 0)[len(answer.prompt) :]
        assert [chip["p"] for chip in chips] == pytest.approx([math.exp(t.logprob) for t in scored], abs=1e-4)
    i = max((0, 1), key=lambda i: len(answers[i].tokens))  # a random answer may end with its first token
    page.session_state["clicked token"] = (2 * i + 1, len(answers[i].tokens) - 1)
    page.run()
    assert not page.exception and answers[i].tokens[-1].id in [row["id"] for row in bars(page) if row["chosen"]]
    button(page, "Regenerate").click().run()
    assert not page.exception and len(answers) == 2 and len(component(page, "token_chips")) == 2
    page.selectbox(key="model").select_index(page.selectbox(key="model").options.index("toy.pt")).run()
    assert not page.exception  # its tokenizer may be another


def test_the_first_token_has_no_candidates_and_an_empty_prompt_begins_a_document(folder):
    page = open_page("toy.pt")
    text = complete(page, "", Length=5, Temperature=0.0)
    model = TextModel.load("checkpoints/toy.pt")
    assert text == "".join(model.complete("", SamplingConfig(max_new_tokens=5, greedy=True))).strip() != ""
    assert page.session_state.step == 2 and len(page.get("vega_lite_chart")) == 2
    slider(page, "Step").set_value(1).run()
    assert not component(page, "token_bars") and any("no probabilities" in c.value for c in page.caption)


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
    assert completion(page).n_prompt == 64


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
    os.utime(log, (time.time() - 2177, time.time() - 2177))
    page = open_page("toy.pt")
    choose(page, "Training")
    best = min(entry["val_loss"] for entry in entries if "val_loss" in entry)
    shown = {metric.label: metric.value for metric in page.metric}
    assert shown["Step"] == "20 of 20" and shown["Best validation loss"] == f"{best:.4f}"
    assert shown["Learning rate"] == f"{entries[-2]['learning_rate']:.1e}" and "Time left" not in shown
    assert page.caption[0].value == "finished 36 min ago" and len(page.get("vega_lite_chart")) == 1
    with open(log, "a") as file:
        for i in range(3):
            numbers = {"loss": 1.25, "tokens": 1000 * i, "seconds": 10.0 * i, "max_steps": 200, "learning_rate": 0.01}
            file.write(json.dumps({"step": 30 + 10 * i, **numbers}) + "\n")
    with locked(output_lock(log.with_suffix(".pt")), "", ""):
        page.run()
    shown = {metric.label: metric.value for metric in page.metric}
    assert shown["Step"] == "50 of 200" and shown["Training loss"] == "1.2500" and page.caption[0].value == "running"
    assert shown["Tokens"] == "2,000" and "Tokens/s" in shown and shown["Time left"].endswith(" s")
    page.run()
    assert re.fullmatch(r"stopped at step 50, \d\.\d s ago", page.caption[0].value)
    with open(log, "a") as file:
        file.write('[1]\n{"a": 1}\n{"step"')
    page.run()
    assert not page.exception and next(metric.value for metric in page.metric) == "50 of 200"
    log.unlink()
    page.run()
    assert not page.exception and "no log" in page.info[0].value


def test_the_speed_and_the_time_left_are_those_of_the_last_lines():
    slow = [{"step": i, "tokens": 10 * i, "seconds": 5.0 * i} for i in range(40)]
    fast = [{"step": 40 + i, "tokens": 10 * (40 + i), "seconds": 200 + i} for i in range(40)]
    assert recent_speed(slow) == {"step": 0.2, "tokens": 2.0} and recent_speed(slow + fast) == {"step": 1, "tokens": 10}
    assert recent_speed([]) == recent_speed(slow[:1]) == recent_speed([{"step": 1, "val_loss": 2.0}] * 3) == {}
    assert status(5, None, False, 90) == "ended at step 5, 1 min ago"


def test_runs_are_laid_over_each_other_and_show_samples_over_time(folder):
    page = open_page("sft.pt")
    choose(page, "Training")
    examples = [
        entry["examples"]
        for entry in map(json.loads, (folder / "checkpoints/sft.jsonl").read_text().splitlines())
        if "examples" in entry
    ]
    texts = [text.value for text in page.main.text]
    assert len(examples) > 1 and all(example["output"] in texts for example in examples[-1] if example["output"])
    page.select_slider(key="step of sft").set_value(0).run()
    texts = [text.value for text in page.main.text]
    assert all(example[kind] in texts for example in examples[0] for kind in ("input", "expected"))
    runs = page.multiselect[0]
    assert set(runs.options) == {"sft", "toy"} and runs.value == [Path("checkpoints/sft.jsonl")]
    runs.set_value([Path("checkpoints/sft.jsonl"), Path("checkpoints/toy.jsonl")]).run()
    assert not page.exception and not page.metric  # which would push the curves off the screen
    for name in ("sft", "toy"):
        assert any(
            re.match(rf"{name}: finished .* ago, step \d+ of \d+, best validation loss \d", text.value)
            for text in page.main.text
        )
    [chart] = (json.loads(chart.proto.spec) for chart in page.get("vega_lite_chart"))
    drawn = {(row["run"], row["split"]) for layer in chart["layer"] for row in layer["data"]["values"]}
    assert drawn == {(run, split) for run in ("sft", "toy") for split in ("training", "validation")}
    for layer in chart["layer"]:
        assert layer["encoding"]["color"]["field"] == "run" and layer["encoding"]["strokeDash"]["field"] == "split"
    runs = page.multiselect[0]
    runs.set_value([]).run()
    assert not page.exception


def test_a_label_shows_text_as_text():
    assert escape("*a* [b](c) 1. _x_ 日本 <b>") == r"\*a\* \[b\]\(c\) 1\. \_x\_ 日本 \<b\>"
