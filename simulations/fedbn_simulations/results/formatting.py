"""Number and table formats shared by the terminal, HTML reports and documents."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def format_number(value: float, digits: int | None = None) -> str:
    """Format a number for a table; an en dash if it is missing.

    Args:
        value: the number.
        digits: decimal places; by default 3, and 1 from 10 on.

    >>> format_number(0.8824), format_number(1.0), format_number(-0.0312), format_number(float("nan"))
    ('.882', '1.000', '−.031', '–')
    >>> format_number(22.6994), format_number(128.0354)
    ('22.7', '128.0')
    """
    if not math.isfinite(value):
        return "–"
    if digits is None:
        digits = 3 if abs(value) < 10 else 1
    text = f"{abs(value):.{digits}f}"
    sign = "−" if value < 0 and float(text) else ""
    return sign + (text[1:] if text.startswith("0.") else text)


def format_signed(value: float, digits: int | None = None) -> str:
    """Format a difference for a table, always with its sign.

    >>> format_signed(0.0271), format_signed(-0.0271), format_signed(0.0)
    ('+.027', '−.027', '.000')
    """
    text = format_number(value, digits)
    return f"+{text}" if value > 0 and float(text) else text


def format_interval(low: float, high: float, style: Callable[[float], str] = format_number) -> str:
    """Format an interval for a table; empty if it is missing.

    >>> format_interval(0.851, 0.913), format_interval(float("nan"), float("nan"))
    ('[.851, .913]', '')
    """
    return f"[{style(low)}, {style(high)}]" if math.isfinite(low) and math.isfinite(high) else ""


def format_estimate(value: float, low: float, high: float, style: Callable[[float], str] = format_number) -> str:
    """Format a value with its interval.

    >>> format_estimate(0.882, 0.851, 0.913)
    '.882 [.851, .913]'
    """
    return f"{style(value)} {format_interval(low, high, style)}".rstrip()


def format_elapsed(since: float) -> str:
    """Format the time since a `time.perf_counter` reading."""
    seconds = time.perf_counter() - since
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    r"""Format rows with the same keys as a Markdown table; empty without rows.

    >>> print(markdown_table([{"name": "fedbn", "what": "a|b"}]), end="")
    | name | what |
    | --- | --- |
    | fedbn | a\|b |
    """
    if not rows:
        return ""
    head = list(rows[0])
    lines: list[list[object]] = [[*head], ["---"] * len(head), *([row[name] for name in head] for row in rows)]
    return "".join("| " + " | ".join(str(v).replace("|", "\\|") for v in line) + " |\n" for line in lines)


def latex_table(frame: pd.DataFrame, caption: str) -> str:
    """Format a table of text for LaTeX (packages booktabs and multirow)."""
    layout = "l" * (frame.index.nlevels + frame.shape[1])
    return frame.to_latex(escape=True, column_format=layout, caption=caption)


def format_p_value(p: float) -> str:
    """Format a p-value with its relation.

    >>> format_p_value(0.0312), format_p_value(0.00002), format_p_value(float("nan"))
    ('p = .031', 'p < .001', 'p –')
    """
    if math.isnan(p):
        return "p –"
    return "p < .001" if p < 0.001 else f"p = {format_number(p)}"


def format_size(count: float) -> str:
    """Format a number of bytes in decimal units.

    >>> format_size(0), format_size(412), format_size(45_600), format_size(3_210_000)
    ('0 B', '412 B', '45.6 kB', '3.2 MB')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def metric_title(metric: str) -> str:
    """The name of a metric as text.

    >>> metric_title("macro_f1"), metric_title("auroc"), metric_title("accuracy")
    ('macro F1', 'AUROC', 'accuracy')
    """
    special = {"f1": "F1", "auroc": "AUROC", "ece": "ECE", "mae": "MAE", "rmse": "RMSE", "r2": "R2", "iou": "IoU"}
    return " ".join(special.get(word, word) for word in metric.split("_"))


def capitalize(text: str) -> str:
    """The text with its first letter in upper case.

    >>> capitalize("macro F1")
    'Macro F1'
    """
    return text[:1].upper() + text[1:]


def format_count(count: int, noun: str) -> str:
    """Format a count with its noun.

    >>> format_count(1, "user"), format_count(24, "user")
    ('1 user', '24 users')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"
