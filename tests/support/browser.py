"""A real browser without a window: Debian's Chromium, driven by its own chromedriver, without a download."""

import json
import os
import shutil
import time
from contextlib import contextmanager

import pytest

By = pytest.importorskip("selenium.webdriver.common.by").By
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

WIDE, NARROW = (1280, 860), (360, 740)


@contextmanager
def browser():
    """A driver of Selenium; the test is skipped where Selenium, Chromium or chromedriver is missing."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs Chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium refuses to run as root with it
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def resize(driver, size):
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def prefer(driver, scheme):
    """Let the system prefer "light" or "dark"."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def complaints(driver):
    """What the browser wrote to its console since the last call: errors, and violations of the policy."""
    return [entry["message"] for entry in driver.get_log("browser")]


# ------------------------------------------------------------------------------------ the page

NAMED = """
const name = e => e.getAttribute("aria-label") ?? e.labels?.[0]?.firstChild.textContent ?? e.textContent;
const controls = [...document.querySelectorAll("button, input, textarea")];
return controls.filter(e => e.checkVisibility() && name(e).trim() === arguments[0]);
"""


class Page:
    """The page as a person uses it."""

    def __init__(self, driver, server):
        self.driver, self.server = driver, server
        self.expected = ()  # parts of complaints of the browser that a test provokes

    def open(self):
        """Visit the page as if for the first time."""
        self.driver.get(self.server.url + "page.js")  # of the same origin, and nothing runs there
        self.driver.execute_script("localStorage.clear(); sessionStorage.clear()")
        self.reload()

    def reload(self):
        self.driver.get(self.server.url)
        self.until(lambda: self.script("return document.querySelector('main:not([hidden])')"))

    def script(self, text, *arguments):
        return self.driver.execute_script(text, *arguments)

    def until(self, found, seconds=60):
        """Wait until ``found()`` is true, and return it."""
        end = time.monotonic() + seconds
        while not (value := found()):
            assert time.monotonic() < end, self.text("body")[:2000]
            time.sleep(0.02)
        return value

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def named(self, name):
        """The visible control with this name."""
        (found,) = self.script(NAMED, name)
        return found

    def text(self, selector):
        """The text of the first such element, visible or not; "" if there is none."""
        return next(iter(self.texts(selector)), "")

    def texts(self, selector):
        return self.script(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector
        )

    def active(self):
        return self.driver.switch_to.active_element

    def write(self, text):
        """Send a message. It is not typed, because the keys of a tab or a new line have other effects."""
        self.script("document.querySelector('#text').value = arguments[0]", text)
        self.one("#text").send_keys(Keys.ENTER)

    def is_idle(self):
        return self.script("return !document.querySelector('#send').hidden")

    def ask(self, text, *answers):
        """Send a message and wait for the scripted answer."""
        self.server.say(*answers)
        before = len(self.texts(".assistant"))
        self.write(text)
        self.until(lambda: len(self.texts(".assistant")) > before and self.is_idle())

    def token(self, text, answer=-1):
        """The span of an answer with this text."""
        spans = "[...document.querySelectorAll('.assistant')].at(arguments[0]).querySelectorAll('[data-t]')"
        (found,) = self.script(
            f"return [...{spans}].filter(e => e.textContent === arguments[1])", answer, text
        )
        return found

    def look(self, text, answer=-1):
        """Click a token, and wait until the model was looked into."""
        self.token(text, answer).click()
        self.until(lambda: self.texts("#look .lens"))

    def stored(self):
        """The conversations in the browser's storage."""
        script = "return Object.entries(localStorage).filter(([k]) => k.startsWith('tinyllm.chat.'))"
        return [json.loads(each) for _, each in self.script(script)]

    def store(self, chat):
        script = "localStorage.setItem('tinyllm.chat.' + arguments[0].id, JSON.stringify(arguments[0]))"
        self.script(script, chat)

    def change(self, name, value):
        """Give the control with this name in its form, or this id, a value, as a person does."""
        script = """
        const control = document.getElementsByName(arguments[0])[0] ?? document.getElementById(arguments[0]);
        control.value = arguments[1];
        for (const kind of ["input", "change"]) control.dispatchEvent(new Event(kind, { bubbles: true }));
        """
        self.script(script, name, value)
