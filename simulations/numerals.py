"""Numbers as text, the same in the terminal, on the page and in documents."""

from __future__ import annotations

import math
from collections.abc import Callable


def number(value: float, digits: int = 3) -> str:
    """A number for a table; an en dash for one that does not exist.

    >>> number(0.8824), number(1.0), number(-0.0312), number(float("nan"))
    ('.882', '1.000', '−.031', '–')
    """
    if not math.isfinite(value):
        return "–"
    text = f"{abs(value):.{digits}f}"
    sign = "−" if value < 0 and float(text) else ""
    return sign + (text[1:] if text.startswith("0.") else text)


def signed(value: float, digits: int = 3) -> str:
    """A difference for a table, always with its sign.

    >>> signed(0.0271), signed(-0.0271), signed(0.0)
    ('+.027', '−.027', '.000')
    """
    text = number(value, digits)
    return f"+{text}" if value > 0 and float(f"{value:.{digits}f}") else text


def bracket(low: float, high: float, style: Callable[[float], str] = number) -> str:
    """An interval for a table; empty for one that does not exist.

    >>> bracket(0.851, 0.913), bracket(float("nan"), float("nan"))
    ('[.851, .913]', '')
    """
    return f"[{style(low)}, {style(high)}]" if math.isfinite(low) and math.isfinite(high) else ""


def cell(value: float, low: float, high: float, style: Callable[[float], str] = number) -> str:
    """A value with its interval.

    >>> cell(0.882, 0.851, 0.913)
    '.882 [.851, .913]'
    """
    return f"{style(value)} {bracket(low, high, style)}".rstrip()
