"""The mode Inside in headless Chromium: what it draws is what the model computes. Skipped without Chromium."""

import math
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, DRIVER, Page, free_port, serve_app, wait
from conftest import succeed

from generation.lens import predictions_by_layer, trace_text
from generation.text_model import TextModel
from model import GPT, GPTConfig
from text.tokenizer import gpt2, legible, load_tokenizer, merges
from weights import checkpoint

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no browser: apt install chromium chromium-driver")
TEXT = "The cat <b>sat</b> on the mat."


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a random model whose BPE was trained on a few sentences."""
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
    return folder


@pytest.fixture(scope="module")
def text_model(folder) -> TextModel:
    return TextModel.load(folder / "checkpoints/base.pt", "cpu")


@pytest.fixture(scope="module")
def page(folder):
    port = free_port()
    server = serve_app(folder, port)
    page = Page(f"http://127.0.0.1:{port}", height=1400)
    page.click("Inside")
    yield page
    assert not page.all("[data-testid=stException]")
    page.driver.quit()
    server.terminate()
    server.wait(30)


def names(text_model: TextModel, ids: list[int]) -> list[str]:
    return [legible(text_model.tokenizer.decode_bytes([i])) for i in ids]


def test_a_text_is_cut_into_tokens_while_one_types(page, text_model):
    page.type_inside(TEXT)
    tokenizer = text_model.tokenizer
    both = [f"{legible(t.decode_bytes([i]))}{i}" for t in (tokenizer, gpt2()) for i in t.encode(TEXT)]
    wait(lambda: page.chip_texts() == both)  # one's own, and below it GPT-2's
    counts = f"{len(tokenizer.encode(TEXT))} tokens · 30 characters · 30 bytes"
    assert page.texts("[data-testid=stMain] [data-testid=stText]")[0].startswith(counts)
    longest = max((tokenizer.decode_bytes([i]) for i in tokenizer.encode(TEXT)), key=len)
    steps = ["   ".join(map(legible, parts)) for parts in merges(longest, tokenizer.mergeable_ranks)]
    wait(lambda: page.texts("[data-testid=stCode]")[0].splitlines() == steps)


def test_attention_shades_what_a_token_looks_at(page, text_model):
    page.type_inside(TEXT)
    page.click("Attention")
    trace = trace_text(text_model, TEXT)
    wait(lambda: page.chip_texts() == names(text_model, trace.tokens.tolist()))
    titles = [picture.get_attribute("title") for picture in page.in_components(".picture")]
    assert titles == [f"layer {i}, head {j}" for i in (1, 2) for j in (1, 2, 3)]
    page.press(page.in_components(".picture")[4])
    wait(lambda: "Layer 2, head 2" in page.texts("[data-testid=stText]"))
    page.press(page.chips()[7])
    wait(lambda: "chosen" in page.chips()[7].get_attribute("class"))
    shades = map(float, page.in_components(".chips button", ".map(e => e.style.getPropertyValue('--p'))"))
    assert list(shades) == pytest.approx(trace.attention[1, 1, 7].tolist(), abs=1e-5)
    assert page.all("[data-testid=stVegaLiteChart]")


def test_layer_by_layer_shows_the_likeliest_token_and_ten_candidates(page, text_model):
    page.type_inside(TEXT)
    page.click("Layer by layer")
    trace = trace_text(text_model, TEXT)
    layers = predictions_by_layer(text_model, trace)
    rows = reversed(layers.candidates[..., 0].tolist())  # the last layer on top
    expected = [name for row in rows for name in names(text_model, row)]
    cells = ".table button:enabled"
    wait(lambda: page.chip_texts(cells) == expected)
    page.press(page.in_components(cells)[2])
    place = f"After layer 2, at {names(text_model, trace.tokens.tolist())[2]}: "
    wait(lambda: any(text.startswith(place) for text in page.texts("[data-testid=stText]")))
    assert f"entropy {layers.entropies[-1, 2]:.2f} nats" in page.driver.page_source
    top = [f"{math.exp(p):.1%}" for p in layers.logprobs[-1, 2].tolist()]
    bars = [a + b for a, b in zip(names(text_model, layers.candidates[-1, 2].tolist()), top, strict=True)]
    wait(lambda: page.chip_texts(".bars button") == bars)


def test_embeddings_and_a_text_beyond_the_context(page, text_model):
    page.click("Embeddings")
    wait(lambda: len(page.all("[data-testid=stVegaLiteChart]")) == 2 and page.all("[data-testid=stImage]"))
    page.type_inside(TEXT * 5)
    page.click("Attention")
    wait(lambda: len(page.chips()) == 32 and "You see the last 32." in page.driver.page_source)
    page.type_inside("x\ue003")  # the backspace key
    wait(lambda: "Type a text." in page.driver.page_source)


def test_a_token_of_a_completion_leads_to_its_column(page):
    page.click("Completion")
    page.idle()
    page.type("The cat sat on the", "[data-testid=stTextArea] textarea", enter=False)
    page.click("Complete")
    wait(lambda: len(page.chips()) > 40)
    page.press(page.chips()[20])
    wait(lambda: "chosen" in page.chips()[20].get_attribute("class"))
    page.click("Look inside")
    [table] = wait(lambda: page.in_components(".table"))
    page.idle()
    assert page.in_components("textarea")[0].get_attribute("value").startswith("The cat sat on the")
    left, hidden = page.driver.execute_script(
        "const s = arguments[0]; return [s.scrollLeft, s.scrollWidth - s.clientWidth]", table
    )
    assert hidden > 100 and left == pytest.approx(hidden, abs=2)


def test_two_completions_stand_side_by_side_and_on_a_phone_below_each_other(page):
    page.click("Completion")
    wait(lambda: page.all("[data-testid=stCheckbox] label"))
    page.press(page.all("[data-testid=stCheckbox] label")[0])
    page.click("Complete both")
    wait(lambda: len(page.chip_texts(".chips button.marked")) == 2)
    page.idle()
    one, other = page.chip_texts(".chips button.marked")
    assert one != other and f" “{one}” (" in page.driver.page_source
    boxes = page.in_components(".chips")
    first, second = (box.rect for box in boxes)
    assert first["x"] + first["width"] <= second["x"]
    page.driver.set_window_size(500, 1400)  # Chromium's narrowest
    wait(lambda: boxes[0].rect["y"] + boxes[0].rect["height"] <= boxes[1].rect["y"])
    widths = page.driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert widths[0] <= widths[1] and boxes[1].rect["width"] > 300
