"""The mode Inside in headless Chromium: what it draws is what the model computes. Skipped without Chromium."""

import math
import socket
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, DRIVER, Page, serve_app, wait
from conftest import succeed

from generation.text_model import TextModel
from model import GPT, GPTConfig
from text.tokenizer import gpt2, legible, load_tokenizer, merges
from weights import checkpoint

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no browser: apt install chromium chromium-driver")
TEXT = "The cat <b>sat</b> on the mat."


@pytest.fixture(scope="module")
def text_model(tmp_path_factory) -> TextModel:
    """A random model in a folder of its own, with a BPE that was trained on a few sentences."""
    folder = tmp_path_factory.mktemp("inside")
    (folder / "text.txt").write_text("The cat sat on the mat. The dog sat on the cat. " * 200)
    succeed(folder, "prepare_data.py", "--input", "text.txt", "--vocab-size", "280", "--out", "data")
    tokenizer = load_tokenizer(folder / "data/tokenizer.json")
    torch.manual_seed(0)
    shape = GPTConfig(
        vocab_size=320, n_tokens=tokenizer.n_tokens, block_size=32, n_layer=2, n_head=3, n_embd=48, tie_weights=False
    )
    model = GPT(shape)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    model.lm_head.weight.data[tokenizer.end_of_text :] = 0  # outside of top-k: no text ends early
    checkpoint.save(folder / "checkpoints/base.pt", checkpoint.pack(model, kind="base", tokenizer=tokenizer.spec))
    return TextModel.load(folder / "checkpoints/base.pt", "cpu")


@pytest.fixture(scope="module")
def page(text_model):
    folder = Path(text_model.description.partition(":")[0]).parents[1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = serve_app(folder, port)
    page = Page(f"http://127.0.0.1:{port}", height=1400)
    page.click("Inside")
    wait(lambda: page.in_components(".piece"))
    yield page
    assert not page.all("[data-testid=stException]")
    page.driver.quit()
    server.terminate()
    server.wait(30)


def type_text(page: Page, text: str) -> None:
    [field] = page.in_components("textarea")
    field.clear()
    field.send_keys(text)  # no Enter, and the field keeps the focus


def names(text_model: TextModel, text: str) -> list[str]:
    return [legible(text_model.tokenizer.decode_bytes([i])) for i in text_model.tokenizer.encode(text)]


def test_a_text_is_cut_into_tokens_while_one_types(page, text_model):
    page.click("Tokens")
    type_text(page, TEXT)
    tokenizer = text_model.tokenizer
    both = [
        f"{legible(t.decode_bytes([i]))}\n{i}" for t in (tokenizer, gpt2()) for i in t.encode(TEXT)
    ]  # one's own, and below it GPT-2's
    wait(lambda: [piece.text for piece in page.in_components(".piece")] == both)
    assert page.texts("[data-testid=stMetricValue]")[:3] == [str(len(tokenizer.encode(TEXT))), "30", "30"]
    longest = max((tokenizer.decode_bytes([i]) for i in tokenizer.encode(TEXT)), key=len)
    steps = ["   ".join(map(legible, parts)) for parts in merges(longest, tokenizer.mergeable_ranks)]
    wait(lambda: page.texts("[data-testid=stCode]")[0].splitlines() == steps)  # drawn last


def test_attention_shades_what_a_token_looks_at(page, text_model):
    type_text(page, TEXT)
    page.click("Attention")
    wait(lambda: page.chip_texts(".text button") == names(text_model, TEXT))
    trace = text_model.trace(TEXT)
    edges = [
        [label.get_attribute("textContent") for label in page.in_components(e)] for e in (".keys span", ".queries span")
    ]
    assert edges == [names(text_model, TEXT)] * 2
    pictures = page.in_components(".grid button")
    assert [p.get_attribute("title") for p in pictures] == [f"layer {i}, head {j}" for i in (1, 2) for j in (1, 2, 3)]
    page.press(pictures[4])
    page.press(page.in_components(".text button")[7])
    shades = [
        float(page.driver.execute_script("return arguments[0].style.getPropertyValue('--w')", chip))
        for chip in page.in_components(".text button")
    ]
    assert shades == pytest.approx(trace.attention[1, 1, 7].tolist(), abs=1 / 255)
    assert [label.get_attribute("class") for label in page.in_components(".queries span")].index("query") == 7


def test_layer_by_layer_shows_the_likeliest_token_and_ten_candidates(page, text_model):
    type_text(page, TEXT)
    page.click("Layer by layer")
    trace = text_model.trace(TEXT)
    layers = text_model.predictions_by_layer(trace)
    likeliest = [
        [legible(text_model.tokenizer.decode_bytes([i])) for i in row] for row in layers.candidates[..., 0].tolist()
    ]
    expected = sum(reversed(likeliest), [])  # the last layer on top
    wait(lambda: [cell.get_attribute("textContent") for cell in page.in_components("td button")] == expected)
    page.press(page.in_components("td button")[2])
    [first, *_] = page.in_components(".details p")
    assert first.text.startswith(f"After layer 2, at {names(text_model, TEXT)[2]}")
    assert f"entropy {layers.entropies[-1, 2]:.2f} nats" in first.text
    bars = [bar.text.split("\n") for bar in page.in_components(".bar")]
    assert len(bars) == 10 and bars[0][0] == likeliest[-1][2]
    assert float(bars[0][1].split()[0]) == pytest.approx(100 * math.exp(layers.logprobs[-1, 2, 0]), abs=0.6)


def test_embeddings_and_a_text_beyond_the_context(page, text_model):
    page.click("Embeddings")
    wait(lambda: len(page.all("[data-testid=stVegaLiteChart]")) == 2 and page.all("[data-testid=stImage]"))
    type_text(page, TEXT * 5)
    page.click("Attention")
    wait(lambda: len(page.in_components(".text button")) == 32)
    assert "You see the last 32." in page.driver.page_source
    type_text(page, "x\ue003")  # the backspace key
    wait(lambda: "Type a text." in page.driver.page_source)


def chip_with(page: Page, name: str) -> list[str]:
    """The texts of the chips of a class."""
    return [chip.text for chip in page.in_components(f".chips button.{name}")]


def test_a_token_of_a_completion_leads_to_its_column(page, tmp_path):
    page.click("Completion")
    page.idle()
    page.type("The cat sat on the", "[data-testid=stTextArea] textarea", enter=False)
    page.click("Complete")
    wait(lambda: len(page.chips()) > 40)
    page.press(page.chips()[20])
    wait(lambda: "chosen" in page.chips()[20].get_attribute("class"))
    page.click("Look inside")
    wait(lambda: page.in_components("td button"))
    [field], [scroll] = page.in_components("textarea"), page.in_components(".scroll")
    text = field.get_attribute("value")
    assert text.startswith("The cat sat on the") and len(text) > 18
    page.idle()
    left, hidden = page.driver.execute_script(
        "const s = arguments[0]; return [s.scrollLeft, s.scrollWidth - s.clientWidth]", scroll
    )
    assert hidden > 100 and left == pytest.approx(hidden, abs=2)
    page.driver.save_screenshot(str(tmp_path / "inside.png"))


def test_two_completions_stand_side_by_side_and_on_a_phone_below_each_other(page, tmp_path):
    page.click("Completion")
    wait(lambda: page.all("[data-testid=stCheckbox] label"))
    page.press(page.all("[data-testid=stCheckbox] label")[0])
    page.click("Complete both")
    wait(lambda: len(chip_with(page, "marked")) == 2)
    page.idle()
    one, other = chip_with(page, "marked")
    assert one != other and f" “{one}” (" in page.driver.page_source
    boxes = page.in_components(".chips")
    first, second = (box.rect for box in boxes)
    assert first["x"] + first["width"] <= second["x"]
    page.driver.save_screenshot(str(tmp_path / "wide.png"))
    page.driver.set_window_size(500, 1400)  # Chromium's narrowest
    wait(lambda: boxes[0].rect["y"] + boxes[0].rect["height"] <= boxes[1].rect["y"])
    widths = page.driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert widths[0] <= widths[1] and boxes[1].rect["width"] > 300
    page.driver.save_screenshot(str(tmp_path / "narrow.png"))
    page.driver.set_window_size(1200, 1400)
