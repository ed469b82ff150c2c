"""Browser tests run where there is a browser; elsewhere they are counted, or refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import browsers

SUITE = """
import pytest

def test_plain(): pass

@pytest.mark.browser
@pytest.mark.parametrize("n", range(3))
def test_page(n): pass
"""
LINE = (
    "3 browser tests left out: no Chromium found;"
    " install one (apt-get install chromium) and run make test again"
)


@pytest.fixture
def suite(tmp_path):
    """Run pytest in a folder with one plain test and three that need a browser."""
    (tmp_path / "test_it.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = browser: needs one\n")

    def run(*flags, **variables):
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TLORA_"))}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "browsers", *flags],
            cwd=tmp_path,
            env=inherited | {"PYTHONPATH": str(Path(browsers.__file__).parent)} | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def test_without_a_browser_one_line_says_how_many_are_left_out(suite):
    code, out = suite("-n", "1", CHROMIUM="")
    assert code == 0
    assert out.splitlines().count(LINE) == 1
    assert "1 passed" in out


def test_with_a_browser_they_run(suite):
    code, out = suite(CHROMIUM="/any", TLORA_REQUIRE_BROWSER="1")
    assert code == 0
    assert "4 passed" in out
    assert "left out" not in out


def test_a_browser_that_is_required_and_absent_is_an_error(suite):
    code, out = suite(CHROMIUM="", TLORA_REQUIRE_BROWSER="1")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "no Chromium found" in out
    assert "passed" not in out


@pytest.fixture
def only(tmp_path, monkeypatch):
    """Make a machine that has the given commands and no other; each ends with the given code."""
    monkeypatch.setattr(browsers, "APPLICATIONS", ())
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path / "playwright"))
    monkeypatch.setenv("PATH", str(tmp_path))

    def install(**commands):
        for name, code in commands.items():
            (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
            (tmp_path / name).chmod(0o755)
        return tmp_path

    return install


def test_a_browser_is_found_by_name_unless_it_does_not_start(only):
    folder = only(**{"chromium-browser": 10, "google-chrome": 0})
    assert browsers.find() == str(folder / "google-chrome")


def test_playwrights_own_browser_is_found(only):
    from playwright.sync_api import sync_playwright

    only()
    assert browsers.find() is None
    with sync_playwright() as driver:
        own = Path(driver.chromium.executable_path)
    own.parent.mkdir(parents=True)
    own.touch()
    assert browsers.find() == str(own)
