"""The page at `/` in a real browser: Chromium, headless, on a running cluster."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from tests.cluster import Cluster, text_of

pytestmark = pytest.mark.browser
# Alone in its corner: no network beside the page's, no user's profile.
OPTIONS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1400,950",
]
PATIENCE_S = 60.0
QUESTION = "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total?"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    options = webdriver.ChromeOptions()
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    assert found, "no Chromium: install chromium and chromium-driver"
    options.binary_location = found[0]
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def page(cluster: Cluster, browser: WebDriver) -> Iterator[Page]:
    yield Page(browser, cluster.url)
    logged: list[dict[str, Any]] = cast(Any, browser).get_log("browser")
    assert [entry for entry in logged if entry["source"] != "network"] == [], "scripts and styles are in order"


class Page:
    """What a user sees and does."""

    def __init__(self, browser: WebDriver, url: str) -> None:
        self.browser = browser
        browser.get(f"{url}/")
        self.until(lambda: "ok" in self.text("about"))

    def find(self, name: str) -> WebElement:
        return self.browser.find_element(By.ID, name)

    def text(self, name: str) -> str:
        return self.find(name).text

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def until(self, holds: Callable[[], Any], patience_s: float = PATIENCE_S) -> None:
        WebDriverWait(self.browser, patience_s).until(lambda _: holds())

    def ask(self, text: str, **chosen: str) -> None:
        """With the keyboard. Args: chosen: what else is set, by name."""
        for name, value in chosen.items():
            field = self.find(name)
            if field.tag_name == "select":
                Select(field).select_by_visible_text(value)
            else:
                field.clear()
                field.send_keys(value)
        said = len(self.all("#messages .message"))
        self.browser.execute_script("arguments[0].value = arguments[1]", self.find("text"), text)
        self.find("text").send_keys(Keys.ENTER)
        self.until(lambda: len(self.all("#messages .message")) == said + 2)

    def answer(self) -> str:
        """The newest, once it is whole."""
        self.until(lambda: self.find("send").is_enabled())
        return self.all("#messages .message span")[-1].text

    def state_of(self, drafter: str) -> str:
        rows = self.browser.execute_script(  # at once: the page makes them anew every other second
            "return [...document.querySelectorAll('#drafters tr')].map((row) => row.innerText)"
        )
        return next((row.replace("\t", " ") for row in rows if row.startswith(drafter)), "")


def test_an_answer_comes_with_its_trees_and_is_the_targets(page: Page, cluster: Cluster) -> None:
    page.ask(QUESTION, strategy="merged", tokens="48")
    page.until(lambda: len(page.all("#trees li")) > 2)
    early = len(page.all("#trees li"))
    answer = page.answer()
    assert len(page.all("#trees li")) > early, "the list grows while the answer does"
    user = [{"role": "user", "content": QUESTION}]
    plain = text_of(cluster, messages=user, max_tokens=48, extra_body={"taps": {"strategy": "off"}})
    assert answer.split() == plain.split()
    nodes = page.all("#trees svg g")
    assert 0 < len([node for node in nodes if node.get_attribute("class") != "left-out"]) < len(nodes)
    assert float(page.text("per-pass")) > 1.5
    assert {row.text.split()[0] for row in page.all("#shares .share")} >= {"math", "chat", "code"}


def test_strategies_are_switched_and_compared(page: Page) -> None:
    page.find("compare").click()
    page.ask(QUESTION, strategy="off", tokens="24")
    plain = page.answer()
    assert page.text("per-pass") == "1.00"
    assert float(page.text("plain")) > 0.0
    page.find("clear").click()
    page.ask(QUESTION, strategy="adaptive", tokens="24")
    assert page.answer() == plain


def test_a_killed_specialist_goes_and_comes_back(page: Page, cluster: Cluster) -> None:
    page.until(lambda: " up" in page.state_of("math"))
    os.kill(cluster.processes()["math.Drafter"], signal.SIGKILL)
    page.until(lambda: " up" not in page.state_of("math"))
    page.ask(QUESTION, strategy="merged", tokens="16")
    assert page.answer(), "an answer goes on without it"
    page.until(lambda: " up" in page.state_of("math"), 240.0)


def test_what_is_refused_is_said_and_the_chat_goes_on(page: Page) -> None:
    page.ask("word " * 2500)
    assert "context length" in page.answer()
    page.until(lambda: "context length" in page.text("refused"))
    page.ask("Hi", tokens="8")
    assert page.answer()


def test_it_fits_a_phone(page: Page, browser: WebDriver, tmp_path: Path) -> None:
    browser.set_window_size(500, 900)
    page.until(lambda: page.all("#drafters tr"))
    width = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1], "nothing reaches beyond the screen"
    browser.set_window_size(1400, 950)
