"""Takes the pictures of docs/ from the page with the demo's models. Run it in a folder where `make demo` ran.

make demo && .venv/bin/python tests/screenshots.py
"""

import os
import shutil
import time
from pathlib import Path

from browser import Page, free_port, serve_app, wait
from conftest import REPOSITORY

from generation.lens import trace_text
from generation.text_model import TextModel

DOCS = REPOSITORY / "docs"
TEXT = "Return a copy of the string with leading and trailing whitespace removed."


def save(page: Page, name: str) -> None:
    """Saves what the window shows, as soon as it is drawn."""
    page.idle()
    time.sleep(2)
    page.driver.execute_script("document.activeElement.blur()")
    page.driver.save_screenshot(str(DOCS / name))


def chat(page: Page) -> None:
    """Asks the fine-tuned model two questions."""
    wait(lambda: page.all("[data-testid=stChatInput] textarea"))
    for question in ("What is the capital of France?", "What does len do?"):
        page.type(question)
        wait(lambda: not page.has("Stop") and page.has("Regenerate"))
        page.idle()
    save(page, "chat.png")


def complete(page: Page) -> None:
    """Completes a text with the base model, and chooses a token."""
    page.choose_model("demo/pretrained.pt")
    page.type("1", "[data-testid=stNumberInput] input")
    page.type("This module provides", "[data-testid=stTextArea] textarea", enter=False)
    page.driver.set_window_size(1200, 1500)
    page.click("Complete")
    wait(lambda: len(page.chips()) > 20)
    page.press(page.chips()[5])
    wait(lambda: "chosen" in (page.chips()[5].get_attribute("class") or ""))
    page.driver.execute_script("document.querySelector('section').scrollTo(0, 0)")
    save(page, "completion.png")


def look_inside(page: Page) -> None:
    """Looks at a sentence's tokens, at the head that looks most at the token before, and at each layer."""
    page.click("Inside")
    page.type_inside(TEXT)
    page.click("Attention")
    attention = trace_text(
        TextModel.load("checkpoints/demo/pretrained.pt", "cpu"), TEXT
    ).attention  # (n_layer, nh, T, T)
    wait(lambda: page.in_components(".picture"))
    page.press(page.in_components(".picture")[int(attention.diagonal(-1, 2, 3).mean(dim=-1).argmax())])
    save(page, "inside_attention.png")
    page.driver.set_window_size(1200, 2400)  # an element is cut off at the window's edge
    page.idle()
    page.all("[data-testid=stVegaLiteChart]")[0].screenshot(str(DOCS / "pictures/attention.png"))
    page.click("Layer by layer")
    page.driver.set_window_size(1200, 1500)
    save(page, "inside_layers.png")
    page.driver.execute_script("arguments[0].scrollLeft = 0", page.in_components(".table")[0])
    page.in_components(".table")[0].screenshot(str(DOCS / "pictures/layers.png"))
    page.click("Tokens")
    page.idle()
    page.in_components(".chips")[0].screenshot(str(DOCS / "pictures/tokens.png"))


def main() -> None:
    """Takes one picture of each mode, and the parts that docs/how-it-works.md shows."""
    os.utime("checkpoints/demo/sft.pt")  # the page opens with the newest model
    port = free_port()
    server = serve_app(Path.cwd(), port)
    try:
        page = Page(f"http://127.0.0.1:{port}", height=880)
        chat(page)
        complete(page)
        look_inside(page)
        page.click("Training")
        save(page, "training.png")
        page.driver.quit()
    finally:
        server.terminate()
    shutil.copy("plots/demo/pretrained_loss.png", DOCS / "pictures/loss.png")


if __name__ == "__main__":
    main()
