"""The commands of the chat at the terminal, without a model."""

import io
import json
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from generation.config import SamplingConfig
from generation.text_model import Chat, TextModel
from interface.terminal import complete_lines, load_conversation, obey, save_conversation, set_option
from system.errors import UserError
from text.chat import Message

MESSAGES: list[Message] = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello, you."},
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "I am a model."},
]


def no(question: str) -> bool:
    return False


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


def test_options_take_numbers_and_some_take_none():
    config = SamplingConfig(seed=1)
    assert set_option(config, "top-k", "7").top_k == 7
    assert set_option(config, "seed", "none").seed is None and set_option(config, "top-k", "none").top_k is None
    for name, value in (("temperature", "none"), ("top-k", ""), ("max-new-tokens", ""), ("top-k", "1.5")):
        with pytest.raises(UserError, match=f"/{name} needs a number"):
            set_option(config, name, value)
    with pytest.raises(UserError, match="--top-p must be"):
        set_option(config, "top-p", "2")


def test_a_setting_without_a_value_is_shown_and_stays(toy):
    conversation = Chat(TextModel.load(toy / "checkpoints/sft.pt"), SamplingConfig(top_k=7))
    for command, argument, shown in (
        ("temperature", "", "temperature is 0.8"),
        ("top-k", "", "top-k is 7"),
        ("top-k", "none", "top-k is none"),
        ("top-k", "", "top-k is none"),
        ("seed", "3", "seed is 3"),
    ):
        assert obey(conversation, command, argument, no) == shown
    assert conversation.config == SamplingConfig(top_k=None, seed=3)


def test_saving_asks_before_it_replaces_a_file(toy, tmp_path):
    conversation = Chat(TextModel.load(toy / "checkpoints/sft.pt"), SamplingConfig())
    path, asked = tmp_path / "talk.jsonl", []
    conversation.messages[:] = MESSAGES
    path.write_text("a diary", encoding="utf-8")
    with pytest.raises(UserError, match="is not the beginning of this conversation: choose another name"):
        obey(conversation, "save", str(path), no)
    assert path.read_text(encoding="utf-8") == "a diary"

    def yes(question: str) -> bool:
        asked.append(question)
        return True

    for _ in range(2):  # the second time the file holds this conversation
        assert obey(conversation, "save", str(path), yes) == f"saved 2 exchanges in {path}"
    assert asked == [f"{path} exists and is not the beginning of this conversation. Replace it?"]
    assert load_conversation(path) == MESSAGES


def test_the_completion_prompt_knows_its_commands(toy, capsys, monkeypatch):
    lines = "/help\n/temperature\n/temperature hot\n/top-k 3\n/usr/bin\n\n/quit\nnever\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), encoding="utf-8"))
    completed = []
    text_model = TextModel.load(toy / "checkpoints/toy.pt")
    complete_lines(text_model, SamplingConfig(), lambda line, config: completed.append((line, config)))
    assert completed == [("/usr/bin", SamplingConfig(top_k=3))]
    notes = capsys.readouterr().err
    for part in ("/NAME VALUE", "temperature is 0.8", "/temperature needs a number, not 'hot'", "top-k is 3"):
        assert part in notes


def test_the_terminal_needs_no_streamlit():
    code = "import sys, interface.terminal; assert not {'streamlit', 'altair'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
