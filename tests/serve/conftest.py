"""A browser, and a server whose tiny model says what it is told to."""

import pytest
from support.browser import WIDE, Page, browser, complaints, prefer, resize
from support.page_server import PageServer


@pytest.fixture(scope="session")
def driver():
    with browser() as driver:
        yield driver


@pytest.fixture(scope="module")  # not longer: it replaces the choice of tokens for all servers
def page_server(tmp_path_factory):
    with PageServer(tmp_path_factory.mktemp("page") / "model") as server:
        yield server


@pytest.fixture
def page(driver, page_server):
    """The page on a wide, light screen. The browser must not complain, except of what a test expects."""
    resize(driver, WIDE)
    prefer(driver, "light")
    page = Page(driver, page_server)
    page.open()
    yield page
    found = complaints(driver)
    assert [each for each in found if not any(part in each for part in page.expected)] == []
