"""Pytest plugin: leaves out the tests marked `browser` on a machine without a Chromium.

One line of the summary then says how many were left out. TLORA_REQUIRE_BROWSER=1 makes the absence
of a browser an error. CHROMIUM names the browser to use; if it is empty, there is none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
APPLICATIONS = (
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
HINT = "no Chromium found; install one (apt-get install chromium) and run make test again"
_LEFT_OUT = pytest.StashKey[int]()


def find() -> str | None:
    """Return the path of a Chromium on this machine that starts, or None."""
    for found in (*map(shutil.which, NAMES), *APPLICATIONS):
        if found and _starts(found):
            return found
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as driver:
        found = driver.chromium.executable_path
    return found if Path(found).is_file() else None


def _starts(path: str) -> bool:
    """Return whether ``path`` is a browser: Ubuntu's chromium-browser only says what to install."""
    try:
        return subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def pytest_configure(config: pytest.Config) -> None:
    """Look for the browser once: workers of xdist inherit the answer."""
    if "CHROMIUM" not in os.environ:
        os.environ["CHROMIUM"] = find() or ""
    required = os.environ.get("TLORA_REQUIRE_BROWSER", "0") not in ("", "0")
    if required and not os.environ["CHROMIUM"]:
        raise pytest.UsageError(f"TLORA_REQUIRE_BROWSER is set, but {HINT}.")


@pytest.hookimpl(trylast=True)  # what -m and -k leave out is not ours to report
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the browser tests where there is no browser."""
    if os.environ["CHROMIUM"]:
        return
    left_out = [item for item in items if item.get_closest_marker("browser")]
    items[:] = [item for item in items if not item.get_closest_marker("browser")]
    config.hook.pytest_deselected(items=left_out)
    config.stash[_LEFT_OUT] = len(left_out)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of xdist sends its count to the process that writes the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["browser tests left out"] = session.config.stash.get(
            _LEFT_OUT, 0
        )


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the count of a worker; all workers collect the same tests."""
    left_out = getattr(node, "workeroutput", {}).get("browser tests left out", 0)
    node.config.stash[_LEFT_OUT] = max(left_out, node.config.stash.get(_LEFT_OUT, 0))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say how many tests were left out."""
    if left_out := config.stash.get(_LEFT_OUT, 0):
        terminalreporter.write_line(f"{left_out} browser tests left out: {HINT}")
