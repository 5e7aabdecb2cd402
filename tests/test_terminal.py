"""The commands of the chat at the terminal, without a model."""

import json
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from generation.config import SamplingConfig
from interface.terminal import load_conversation, save_conversation, set_option
from system.errors import UserError
from text.templates import Message

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


def test_options_take_numbers_and_some_take_none():
    config = SamplingConfig(seed=1)
    assert set_option(config, "top-k", "7").top_k == 7
    assert set_option(config, "seed", "none").seed is None and set_option(config, "top-k", "").top_k is None
    for name, value in (("temperature", "none"), ("max-new-tokens", ""), ("top-k", "1.5")):
        with pytest.raises(UserError, match=f"/{name} needs a number"):
            set_option(config, name, value)
    with pytest.raises(UserError, match="--top-p must be"):
        set_option(config, "top-p", "2")


def test_the_terminal_needs_no_streamlit():
    code = "import sys, interface.terminal; assert not {'streamlit', 'altair'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
