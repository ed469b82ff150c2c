"""Number formats for pages and tables."""

from __future__ import annotations

from tlora.report.intervals import Interval

NONE = "\N{EN DASH}"
"""Text for a missing number."""

_ROUNDING = 1e-12
"""Largest score difference explained by summation order."""


def number(value: float | None, digits: int = 4) -> str:
    """Return a score with four decimals, four digits if it is large, two if the decimals would all
    be zero; a dash for None."""
    if value is None:
        return NONE
    if _ROUNDING < abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}" if abs(value) < 100 else f"{value:.4g}"


def signed(value: float) -> str:
    """Return a difference with its sign, using a real minus."""
    sign = "\N{MINUS SIGN}" if value < 0 else "+"
    return f"{sign}{number(abs(value))}"


def count(value: float | None) -> str:
    """Return a whole number with thin spaces between thousands."""
    return NONE if value is None else f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def seconds(value: float | None) -> str:
    """Return seconds with two or three digits."""
    if value is None:
        return NONE
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def times(width: tuple[float, bool] | None) -> str:
    """Return a range as the factor between its ends, with > where it may be wider."""
    return NONE if width is None else f"{'>' * width[1]}{width[0]:.1f}\N{MULTIPLICATION SIGN}"


def margin(score: Interval) -> str:
    """Return "± half" of an interval, or "one seed" without one."""
    return "one seed" if score.half is None else f"± {number(score.half)}"
