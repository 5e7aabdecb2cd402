"""The terminal: commands of the chat, lines that the user types, what reaches a terminal."""

import dataclasses
import io
import json
import sys

import pytest

from generation.config import SamplingConfig
from generation.text_model import Chat, TextModel
from interface import terminal
from interface.terminal import answer, complete_lines, load_conversation, obey, save_conversation, set_option
from system.errors import UserError
from text.chat import Message

MESSAGES: list[Message] = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello, you."},
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "I am a model."},
]


def test_a_saved_conversation_grows_and_loads_again(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.touch()
    for n in (2, 2, 4):
        save_conversation(path, MESSAGES[:n])
        assert load_conversation(path) == MESSAGES[:n]


@pytest.mark.parametrize(
    "content",
    [
        "a diary",
        "[1, 2]",
        json.dumps({"messages": MESSAGES}),
        json.dumps({"messages": [MESSAGES[0], MESSAGES[3]]}),
        json.dumps({"messages": MESSAGES[:2]}) + "\n" + json.dumps({"messages": MESSAGES[:2]}),
    ],
)
def test_saving_does_not_replace_another_file(tmp_path, content):
    path = tmp_path / "talk.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="not the beginning of this conversation"):
        save_conversation(path, MESSAGES[:2])
    assert path.read_text(encoding="utf-8") == content


@pytest.mark.parametrize(
    "content", ["", "a diary", "[1]", '{"messages": 1}', json.dumps({"messages": MESSAGES[:1]}), '{"messages": [1, 2]}']
)
def test_loading_refuses_a_file_without_a_conversation(tmp_path, content):
    (tmp_path / "talk.jsonl").write_text(content)
    with pytest.raises(UserError, match="holds no conversation"):
        load_conversation(tmp_path / "talk.jsonl")


def test_options_take_numbers_and_some_take_none():
    config = SamplingConfig(seed=1)
    assert set_option(config, "top-k", "7")[0].top_k == 7 and set_option(config, "top-k", "")[0] == config
    assert set_option(config, "seed", "none") == (SamplingConfig(), "seed is none")
    for name, value in (("temperature", "none"), ("temperature", "hot"), ("top-k", "1.5")):
        with pytest.raises(UserError, match=f"/{name} needs a number"):
            set_option(config, name, value)


@pytest.mark.parametrize("least", [0.0, 1e-9, 1.0])
def test_an_answer_that_the_model_is_not_sure_of_is_marked(toy, capsys, least):
    text_model = dataclasses.replace(TextModel.load(toy / "checkpoints/sft.pt"), min_confidence=least)
    answer(Chat(text_model, SamplingConfig(greedy=True, max_new_tokens=5)), "Hello")
    assert ("a guess" in capsys.readouterr().err) == (least == 1.0)


def test_the_commands_of_the_chat(toy, tmp_path):
    conversation = Chat(TextModel.load(toy / "checkpoints/sft.pt"), SamplingConfig(top_k=7, max_new_tokens=5))
    conversation.messages[:] = MESSAGES
    path = tmp_path / "talk.jsonl"
    for command, argument, shown in (
        ("temperature", "", "temperature is 0.8"),
        ("top-k", "none", "top-k is none"),
        ("save", str(path), f"saved 4 messages in {path}"),
        ("undo", "", "taken back: How are you?"),
        ("reset", "", "conversation cleared"),
        ("retry", "", "the conversation is empty"),
        ("load", str(path), "loaded 4 messages"),
        ("retry", "", ""),
    ):
        assert obey(conversation, command, argument) == shown
    assert conversation.config.top_k is None
    assert conversation.messages[:3] == MESSAGES[:3] and len(conversation.messages) == 4
    for command, message in (("save", "/save needs a file name"), ("dance", "unknown command /dance")):
        with pytest.raises(UserError, match=message):
            obey(conversation, command, "")


def test_the_completion_prompt_knows_its_commands(toy, capsys, monkeypatch):
    lines = "/help\n/temperature\n/temperature hot\n/top-k 3\n/usr/bin\n\n/quit\nnever\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), encoding="utf-8"))
    completed = []
    text_model = TextModel.load(toy / "checkpoints/toy.pt")
    complete_lines(text_model, SamplingConfig(), lambda model, line, config: completed.append((line, config)))
    assert completed == [("/usr/bin", SamplingConfig(top_k=3))]
    notes = capsys.readouterr().err
    for part in ("/NAME VALUE", "temperature is 0.8", "/temperature needs a number, not 'hot'", "top-k is 3"):
        assert part in notes


def test_a_terminal_gets_no_control_characters_and_a_pipe_gets_the_text_as_it_is(capsys, monkeypatch):
    terminal.say("a\x1b[31m\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    terminal.say("a\x1b[31m\n")
    assert capsys.readouterr().out == "a\x1b[31m\na\\x1b[31m\n"
