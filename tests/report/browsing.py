"""What tests of pages look at."""

from __future__ import annotations

import re
from typing import Any

WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


def overhanging(tab: Any) -> list[str]:
    """Return what reaches over the right edge and is not in a box that scrolls by itself."""
    return tab.evaluate(
        """() => [...document.querySelectorAll("main *")].filter(element =>
        element.getBoundingClientRect().right > innerWidth + 1 && !element.closest(".scroll")
        ).map(element => element.outerHTML.slice(0, 80))"""
    )


def contrast(tab: Any, words: str) -> float:
    """Return the contrast of the first ``words`` (a selector) with the page (WCAG 2)."""
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    name = "fill" if words.startswith("svg") else "color"
    ink = tab.locator(words).first.evaluate(f"element => getComputedStyle(element).{name}")
    low, high = sorted((luminance(ink), luminance(ground)))
    return (high + 0.05) / (low + 0.05)


def luminance(color):
    """Return the relative luminance of "rgb(r, g, b)" (WCAG 2)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
