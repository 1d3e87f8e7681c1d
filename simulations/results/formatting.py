"""Numbers as text, the same in the terminal, on the page and in documents."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    import pandas as pd


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


def elapsed(since: float) -> str:
    """Time since a `time.perf_counter` reading, in words."""
    seconds = time.perf_counter() - since
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"


def markdown_table(frame: pd.DataFrame) -> str:
    """A table of text as Markdown, its index in front."""
    flat = frame.reset_index()
    lines = [list(flat.columns), ["---"] * len(flat.columns), *flat.to_numpy().tolist()]
    return "".join("| " + " | ".join(str(v).replace("|", "\\|") for v in line) + " |\n" for line in lines)


def latex_table(frame: pd.DataFrame, caption: str) -> str:
    """A table of text as LaTeX (packages booktabs and multirow)."""
    layout = "l" * (frame.index.nlevels + frame.shape[1])
    return frame.to_latex(escape=True, column_format=layout, caption=caption)


def p_value(p: float) -> str:
    """A p-value with its relation.

    >>> p_value(0.0312), p_value(0.00002), p_value(float("nan"))
    ('p = .031', 'p < .001', 'p –')
    """
    if math.isnan(p):
        return "p –"
    return "p < .001" if p < 0.001 else f"p = {number(p)}"


def size(count: float) -> str:
    """Bytes in decimal units.

    >>> size(0), size(412), size(45_600), size(3_210_000)
    ('0 B', '412 B', '45.6 kB', '3.2 MB')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def count(many: int, noun: str) -> str:
    """A number of things.

    >>> count(1, "user"), count(24, "user")
    ('1 user', '24 users')
    """
    return f"{many} {noun}{'' if many == 1 else 's'}"
