"""Streamlit's test driver for the page: what a visitor clicks and sees."""

import json

from conftest import REPOSITORY
from streamlit.testing.v1 import AppTest

from interface.page import PageState


def new_page() -> AppTest:
    return AppTest.from_file(str(REPOSITORY / "app.py"), default_timeout=60)


def open_page(model: str = "") -> AppTest:
    """Opens the page, and picks a model if one is given."""
    page = new_page().run()
    if model:
        pick(page, model)
    assert not page.exception
    return page


def pick(page: AppTest, model: str, key: str = "model") -> None:
    box = page.selectbox(key=key)
    box.select_index(box.options.index(model)).run()
    assert not page.exception


def press(page: AppTest, label: str) -> None:
    next(button for button in page.button if button.label == label).click().run()
    assert not page.exception


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
    press(page, "Complete")
    return page.main.text[0].value


def state(page: AppTest) -> PageState:
    return page.session_state.page


def said(page: AppTest) -> list[str]:
    return [message["content"] for message in state(page).messages]


def drawn(page: AppTest, kind: str) -> list[list[dict]]:
    """The buttons of each component of a kind: "chips", "bars" or "table"."""
    protos = [e.proto for e in page.get("bidi_component") if e.proto.component_name == "token_buttons"]
    data = [json.loads(proto.json) for proto in protos]
    return [[item for item in one["items"] if item] for one in data if one["kind"] == kind]


def bars(page: AppTest) -> list[tuple[int, float, float]]:
    """The candidates on the page: id, and both probabilities relative to the largest."""
    rows = []
    for item in drawn(page, "bars")[-1]:
        before, after = (float(part[2].removesuffix("%")) / 100 for part in item["parts"] if part[0].startswith("bar"))
        rows.append((item["key"], before, after))
    return rows
