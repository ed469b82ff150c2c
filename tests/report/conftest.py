"""Pages in a browser: headless Chromium, no network. `browsers.py` finds it."""

from __future__ import annotations

import os

import pytest
from browsing import WIDE


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # Root, as in a container, has no use for the sandbox; nothing but our file is opened.
        launched = driver.chromium.launch(
            executable_path=os.environ["CHROMIUM"], args=["--no-sandbox"]
        )
        yield launched
        launched.close()


@pytest.fixture
def opened(browser, file):
    """Open the page that the module calls `file`.

    After the test nothing may have been complained of or asked for.
    """
    contexts, complaints, requests = [], [], []

    def open_page(viewport=WIDE, scheme="light", **options):
        context = browser.new_context(viewport=viewport, color_scheme=scheme, **options)
        context.set_default_timeout(300_000)  # milliseconds; a loaded machine is slow to draw
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(file.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert {url for url in requests if not url.startswith("data:")} == {file.as_uri()}
