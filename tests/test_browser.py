"""The page in headless Chromium, from its first paint to a downloaded conversation. Skipped without Chromium."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, DRIVER, Page, free_port, serve_app, wait

from model import GPT, GPTConfig
from weights import checkpoint

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no browser: apt install chromium chromium-driver")
PROMPT = "[data-testid=stTextArea] textarea"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with an untrained chat model. Its answers are long, so that tests can act while it writes."""
    path = tmp_path_factory.mktemp("app")
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=256))
    model.wte.weight.data[50256:] = 0  # outside of top-k, so that no answer ends by itself
    state = checkpoint.pack(model, kind="sft", tokenizer="gpt2", template="chat", step=3)
    checkpoint.save(path / "checkpoints/talker.pt", state)
    return path


@pytest.fixture(scope="module")
def server(folder):
    port = free_port()
    process = serve_app(folder, port)
    yield process, f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(30)


@pytest.fixture
def address(server):
    return server[1]


@pytest.fixture
def page(address, folder):
    page = Page(address, downloads=str(folder))
    wait(lambda: page.all("[data-testid=stChatInput] textarea"))
    yield page
    assert not page.all("[data-testid=stException]")
    page.driver.quit()


def lengthen(page: Page) -> None:
    """Moves the slider Length to its end."""
    from selenium.webdriver.common.keys import Keys

    slider = page.move_slider(4, Keys.END)
    wait(lambda: slider.get_attribute("value") == "1000")
    page.idle()


def test_chat_streams_stops_edits_regenerates_and_downloads(page, folder):
    lengthen(page)
    page.type("Hello <b>there</b>")
    seen = {len(wait(lambda: page.messages()[1])) for _ in range(20) if time.sleep(0.1) is None}
    assert len(seen) > 3  # it grew meanwhile
    page.move_slider(0, "\ue012")  # another temperature does not stop the answer
    time.sleep(0.5)
    assert page.has("Stop") and len(page.messages()[1]) > max(seen)
    page.click("Stop")
    wait(lambda: page.has("Regenerate"))
    question, stopped = page.messages()
    assert question.endswith("Hello <b>there</b>") and max(seen) <= len(stopped)
    time.sleep(1)
    assert page.messages() == [question, stopped] and not page.has("Stop")
    page.click("Edit")
    page.click("Cancel")
    page.click("Edit")
    wait(lambda: page.all(PROMPT))
    page.type("Something else", PROMPT, enter=False)
    page.click("Send")
    wait(lambda: page.has("Stop"))
    page.click("Stop")
    wait(lambda: page.has("Regenerate"))
    wait(lambda: page.messages()[0].endswith("Something else"))
    before = page.messages()
    assert len(before) == 2
    page.driver.refresh()
    wait(lambda: page.has("Regenerate") and page.messages() == before)
    page.all("[data-testid=stCheckbox] label")[0].click()
    wait(lambda: len(page.chips()) > 3)
    page.press(page.chips()[2])
    wait(lambda: len(page.bars()) >= 10)
    page.click("Download")
    path = folder / "conversation.jsonl"
    wait(path.exists)
    [line] = path.read_text(encoding="utf-8").splitlines()
    messages = json.loads(line)["messages"]
    assert messages[0] == {"role": "user", "content": "Something else"} and messages[1]["content"]
    page.click("Clear")
    wait(lambda: page.messages() == [])


def test_tokens_can_be_chosen_and_replaced(page, folder):
    page.click("Completion")
    page.idle()
    hostile = "<img src=x onerror='window.hacked = 1'><script>window.hacked = 1</script> 日本"
    page.type(hostile, PROMPT, enter=False)
    page.click("Complete")
    wait(lambda: len(page.chip_texts()) > 150)
    names = page.chip_texts()
    assert names[0] == "<" and "\\xe6" in "".join(names)  # half a character
    assert page.texts("[data-testid=stMain] [data-testid=stText]")[0].startswith(hostile)
    page.press(page.chips()[60])
    wait(lambda: page.chips()[60].get_attribute("class").strip() == "chosen")
    wait(lambda: len(page.all("[data-testid=stVegaLiteChart]")) == 2 and len(page.bars()) >= 10)
    widths = [bar.size["width"] for bar in page.in_components(".bar.after")]
    page.move_slider(0, "\ue010")  # to the highest temperature
    wait(lambda: [bar.size["width"] for bar in page.in_components(".bar.after")] != widths)  # the bars follow
    assert page.chip_texts() == names
    page.press(next(bar for bar in page.bars() if "chosen" not in bar.get_attribute("class")))
    wait(lambda: len(page.chip_texts()) > 150 and page.chip_texts()[60] != names[60])
    assert page.chip_texts()[:60] == names[:60]
    page.idle()
    page.driver.refresh()
    page.click("1")  # the branch left behind
    wait(lambda: page.chip_texts() == names)
    assert page.driver.execute_script("return window.hacked") is None


def test_two_sessions_stream_at_once_and_do_not_mix(page, address):
    other = Page(address)
    try:
        wait(lambda: other.all("[data-testid=stChatInput] textarea"))
        lengthen(page)
        page.type("I am the first")
        wait(lambda: len(page.messages()) == 2)
        other.type("I am the second")
        wait(lambda: len(other.messages()) == 2 and len(other.messages()[1]) > 30)
        assert page.has("Stop")  # both answers are streaming
        for p, name in ((page, "first"), (other, "second")):
            assert p.messages()[0].endswith(f"I am the {name}") and len(p.messages()) == 2
    finally:
        other.driver.quit()


def test_a_checkpoint_may_be_overwritten_during_an_answer(page, folder):
    def refused() -> bool:
        for button in page.all("button"):
            if button.text.strip().endswith("Stop"):  # a click on a button that is drawn again is lost
                button.click()
        return "is not a checkpoint of this project" in page.driver.page_source

    path = folder / "checkpoints/talker.pt"
    whole = path.read_bytes()
    lengthen(page)
    page.type("Hello")
    before = len(wait(lambda: page.messages()[1]))
    try:
        path.write_bytes(b"no")
        wait(lambda: len(page.messages()[1]) > before + 200)
        wait(refused)
    finally:
        path.write_bytes(whole)


def test_the_curves_follow_a_running_training(page, folder):
    log, entry = folder / "checkpoints/talker.jsonl", {"step": 10, "loss": 4.5, "tokens": 640, "seconds": 1.0}
    page.click("Training")
    wait(lambda: "no log" in page.driver.page_source)
    log.write_text(json.dumps(entry) + "\n")
    wait(lambda: "10 of 10" in page.texts("[data-testid=stMetricValue]"))
    with open(log, "a") as file:
        file.write(json.dumps(entry | {"step": 20, "loss": 4.25}) + "\n")
    wait(lambda: page.texts("[data-testid=stMetricValue]")[:2] == ["20 of 20", "4.2500"])
    log.unlink()


def test_the_server_watches_no_files(page, server):
    descriptors = [os.readlink(path) for path in Path(f"/proc/{server[0].pid}/fd").iterdir()]
    assert len(descriptors) > 5 and not any("inotify" in name for name in descriptors)


def test_the_first_paint_is_fast(page, address):
    start = time.perf_counter()
    page.driver.get(address)
    wait(lambda: page.all("[data-testid=stSelectbox]") and page.all("[data-testid=stSlider]"))
    assert time.perf_counter() - start < 6  # 1.5 s on two quiet cores
