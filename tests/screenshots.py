"""Takes the screenshots in docs/ of the page with the demo's models. Run it in a folder where `make demo` ran."""

import os
import time
from pathlib import Path

from browser import Page, serve_app, wait
from conftest import REPOSITORY

PORT = 8599


def main() -> None:
    """Chats with the fine-tuned model, completes a text with the base model, looks inside, and saves each screen."""
    os.utime("checkpoints/demo/sft.pt")  # the page opens with the newest model
    server = serve_app(Path.cwd(), PORT)
    folder = REPOSITORY / "docs"
    folder.mkdir(exist_ok=True)
    try:
        page = Page(f"http://127.0.0.1:{PORT}", height=880)
        wait(lambda: page.all("[data-testid=stChatInput] textarea"))
        for question in ("What is the capital of France?", "What does len do?"):
            page.type(question)
            wait(lambda: not page.has("Stop") and page.has("Regenerate"))
            time.sleep(1)
        page.driver.save_screenshot(str(folder / "chat.png"))
        page.choose_model("demo/pretrained.pt")
        page.type("1", "[data-testid=stNumberInput] input")
        page.type("Return a copy of the", "[data-testid=stTextArea] textarea", enter=False)
        page.driver.set_window_size(1200, 1500)
        page.click("Complete")
        wait(lambda: len(page.chips()) > 20)
        page.press(page.chips()[5])
        wait(lambda: "chosen" in (page.chips()[5].get_attribute("class") or ""))
        page.driver.execute_script("document.activeElement.blur(); document.querySelector('section').scrollTo(0, 0)")
        time.sleep(2)
        page.driver.save_screenshot(str(folder / "completion.png"))
        page.click("Inside")
        for part, name in (("Attention", "inside_attention.png"), ("Layer by layer", "inside_layers.png")):
            page.click(part)
            page.idle()
            time.sleep(2)
            page.driver.save_screenshot(str(folder / name))
        page.click("Training")
        page.idle()
        time.sleep(2)
        page.driver.save_screenshot(str(folder / "training.png"))
        page.driver.quit()
    finally:
        server.terminate()


if __name__ == "__main__":
    main()
