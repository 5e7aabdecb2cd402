"""A real browser on the app: a page that is opened, clicked and typed on, as a person would."""

import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from conftest import ENVIRONMENT, REPOSITORY

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")


def serve_app(folder: Path, port: int) -> subprocess.Popen:
    """Starts the app in a folder that holds `checkpoints/`; returns once it answers."""
    if not (folder / ".streamlit").exists():
        shutil.copytree(REPOSITORY / ".streamlit", folder / ".streamlit")
    command = [sys.executable, "-m", "streamlit", "run", REPOSITORY / "app.py", "--server.headless", "true"]
    with open(folder / "app.log", "w") as log:
        server = subprocess.Popen(
            [*map(str, command), "--server.port", str(port), "--server.address", "127.0.0.1"],
            cwd=folder,
            env=ENVIRONMENT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    wait(lambda: opener.open(f"http://127.0.0.1:{port}/_stcore/health", timeout=5).status == 200)
    return server


def wait(found: Callable, seconds: float = 60):
    """Returns what `found` returns as soon as that is something; errors on the way are passed over."""
    end, error = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            if result := found():
                return result
        except Exception as e:  # an element that is not there yet, or was drawn anew
            error = e
        time.sleep(0.05)
    raise TimeoutError(f"it did not come in {seconds} s ({error})")


class Page:
    """One window of a headless browser, and what the tests do on it."""

    def __init__(self, address: str, width: int = 1200, height: int = 900, dark: bool = False, downloads: str = ""):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-proxy-server"):
            options.add_argument(flag)
        options.add_argument(f"--window-size={width},{height}")
        options.add_experimental_option("prefs", {"download.default_directory": downloads})
        self.driver = webdriver.Chrome(options, Service(DRIVER))
        theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": theme})
        self.driver.get(address)

    def all(self, selector: str) -> list:
        """The elements that a CSS selector names."""
        return self.driver.find_elements("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        """The texts of elements."""
        return [element.text for element in self.all(selector)]

    def messages(self) -> list[str]:
        """The texts of the conversation."""
        return self.texts("[data-testid=stChatMessage]")

    def click(self, label: str) -> None:
        """Clicks the button with a label, when it is there."""

        def found():
            [button] = [button for button in self.all("button") if button.text.strip().splitlines()[-1:] == [label]]
            self.press(button)
            return True

        wait(found)

    def press(self, element) -> None:
        """Clicks an element, once it is in sight."""
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def has(self, label: str) -> bool:
        """Whether there is such a button."""
        return any(button.text.strip().splitlines()[-1:] == [label] for button in self.all("button"))

    def type(self, text: str, selector: str = "[data-testid=stChatInput] textarea", enter: bool = True) -> None:
        """Types into a field, replacing what is there; the Enter key sends it."""
        from selenium.webdriver.common.keys import Keys

        def typed():
            [field] = self.all(selector)
            field.send_keys(Keys.CONTROL, "a")
            field.send_keys(text + (Keys.ENTER if enter else ""))
            return True

        wait(typed)

    def choose_model(self, name: str) -> None:
        """Picks a model."""
        wait(
            lambda: (
                self.all("[data-testid=stSelectbox] [role=combobox], [data-testid=stSelectbox] input")[0].click() or 1
            )
        )
        wait(lambda: next(o for o in self.all("[role=option]") if o.text == name).click() or 1)
        self.idle()

    def idle(self) -> None:
        """Waits until the page is drawn and nothing runs."""
        time.sleep(0.3)  # what was just clicked has to arrive
        wait(lambda: self.all("[data-testid=stApp][data-test-script-state=notRunning]"))
        time.sleep(0.2)

    def chips(self) -> list:
        """The chips of the tokens."""
        return self.driver.execute_script(
            "return [...document.querySelectorAll('*')].filter(e => e.shadowRoot)"
            ".flatMap(e => [...e.shadowRoot.querySelectorAll('.chips button')])"
        )
