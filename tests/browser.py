"""A headless browser that opens the page, clicks and types."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from conftest import ENVIRONMENT, REPOSITORY

if TYPE_CHECKING:
    from selenium.webdriver.remote.webelement import WebElement

T = TypeVar("T")

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")


def serve_app(folder: Path, port: int) -> subprocess.Popen:
    """Starts the page's server in a folder with `checkpoints/`; returns when the server answers."""
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


def wait(found: Callable[[], T], seconds: float = 60) -> T:
    """Calls `found` until its result is true, and returns the result. Ignores exceptions until the time is over."""
    end, error = time.monotonic() + seconds, "no result"
    while time.monotonic() < end:
        try:
            if result := found():
                return result
        except Exception as e:  # an element that is not there yet, or was redrawn
            error = repr(e)
        time.sleep(0.05)
    raise TimeoutError(f"nothing within {seconds} s: {error}")


def free_port() -> int:
    """Returns a port on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Page:
    """One window of a headless browser. `all` and `texts` take CSS selectors; `click` waits for a button's label."""

    def __init__(self, address: str, height: int = 900, downloads: str = ""):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM or ""
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-proxy-server"):
            options.add_argument(flag)
        options.add_argument(f"--window-size=1200,{height}")
        options.add_experimental_option("prefs", {"download.default_directory": downloads})
        self.driver = webdriver.Chrome(options, Service(DRIVER))
        self.driver.get(address)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        return [element.text for element in self.all(selector)]

    def messages(self) -> list[str]:
        return self.texts("[data-testid=stChatMessage]")

    def click(self, label: str) -> None:
        def found() -> bool:
            [button] = [button for button in self.all("button") if button.text.strip().splitlines()[-1:] == [label]]
            self.press(button)
            return True

        wait(found)

    def press(self, element: WebElement) -> None:
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def has(self, label: str) -> bool:
        return any(button.text.strip().splitlines()[-1:] == [label] for button in self.all("button"))

    def type(self, text: str, selector: str = "[data-testid=stChatInput] textarea", enter: bool = True) -> None:
        """Replaces the text of a field. With `enter`, presses Enter at the end."""
        from selenium.webdriver.common.keys import Keys

        def typed() -> bool:
            [field] = self.all(selector)
            field.send_keys(Keys.CONTROL, "a")
            field.send_keys(text + (Keys.ENTER if enter else ""))
            return True

        wait(typed)

    def type_inside(self, text: str) -> None:
        [field] = wait(lambda: self.in_components("textarea"))
        field.clear()
        field.send_keys(text)

    def move_slider(self, i: int, *keys: str) -> WebElement:
        """Gives keys to a slider, whose input is too small for Chromium to type into; returns the input."""
        from selenium.webdriver.common.action_chains import ActionChains

        slider = self.all("[data-testid=stSlider] input[type=range]")[i]
        self.driver.execute_script("arguments[0].focus()", slider)
        ActionChains(self.driver).send_keys(*keys).perform()
        return slider

    def choose_model(self, name: str) -> None:
        def opened() -> bool:
            self.all("[data-testid=stSelectbox] [role=combobox], [data-testid=stSelectbox] input")[0].click()
            return True

        def chosen() -> bool:
            next(option for option in self.all("[role=option]") if option.text == name).click()
            return True

        wait(opened)
        wait(chosen)
        self.idle()

    def idle(self) -> None:
        time.sleep(0.3)  # until the last click has reached the server
        wait(lambda: self.all("[data-testid=stApp][data-test-script-state=notRunning]"))
        time.sleep(0.2)

    def chips(self) -> list[WebElement]:
        return self.in_components(".chips button")

    def chip_texts(self, selector: str = ".chips button") -> list[str]:
        return self.in_components(selector, ".map(e => e.textContent)")

    def bars(self) -> list[WebElement]:
        return self.in_components(".bars button")

    def in_components(self, selector: str, then: str = "") -> list:
        """Returns the elements inside our own components that match a CSS selector, or what `then`, JavaScript, makes
        of their list."""
        return self.driver.execute_script(
            "return [...document.querySelectorAll('*')].filter(e => e.shadowRoot)"
            f".flatMap(e => [...e.shadowRoot.querySelectorAll(arguments[0])]){then}",
            selector,
        )
