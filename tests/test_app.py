"""The page, run by Streamlit's own test driver on the toy models."""

import pytest
from conftest import REPOSITORY
from streamlit.testing.v1 import AppTest


@pytest.fixture
def app(toy, monkeypatch):
    monkeypatch.chdir(toy)
    return AppTest.from_file(str(REPOSITORY / "app.py"), default_timeout=60)


def pick(app, name):
    app.run()
    assert not app.exception
    options = app.sidebar.selectbox[0].options
    assert not any(option.endswith(".last.pt") for option in options)
    app.sidebar.selectbox[0].select_index(options.index(f"checkpoints/{name}.pt")).run()
    assert not app.exception


def test_without_a_model_the_page_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app = AppTest.from_file(str(REPOSITORY / "app.py"), default_timeout=60).run()
    assert not app.exception and "make demo" in app.info[0].value


def test_chat_keeps_the_conversation_and_forgets_it_when_asked(app):
    pick(app, "sft")
    app.sidebar.slider[3].set_value(8).run()
    for text in ("Hello <script>alert(1)</script>", "And **now**?"):
        app.chat_input[0].set_value(text).run()
        assert not app.exception
    roles = [message.name for message in app.chat_message]
    assert roles == ["user", "assistant"] * 2
    assert app.chat_message[0].text[0].value == "Hello <script>alert(1)</script>"  # shown as typed
    app.button[0].click().run()
    assert len(app.chat_message) == 0


def test_a_base_model_completes_and_shows_token_probabilities(app):
    pick(app, "toy")
    assert "not trained to chat" in app.info[0].value
    app.sidebar.slider[3].set_value(8).run()
    app.text_area[0].set_value("What is").run()
    app.button[-1].click().run()
    assert not app.exception
    assert any(text.value.startswith("What is") for text in app.text)
    table = app.dataframe[0].value
    assert "".join(table["token"]).startswith("What is") and table["probability"].between(0, 1).all()


def test_a_corrupt_checkpoint_is_reported(app, toy):
    (toy / "checkpoints/corrupt.pt").write_bytes(b"no")
    try:
        pick(app, "corrupt")
        assert "not a checkpoint" in app.error[0].value
    finally:
        (toy / "checkpoints/corrupt.pt").unlink()
