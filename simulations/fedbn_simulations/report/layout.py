"""Tables that fit the width of a terminal: whole columns are left out before a word is broken."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

GAP = 2
"""Characters between two columns."""
MIN_TEXT_WIDTH = 48
"""Least width of a column of sentences; below it, other columns are left out."""


def fitted_table(
    rows: Sequence[Mapping[str, str]],
    width: int,
    *,
    optional: Sequence[str] = (),
    text: str = "",
    one_line: bool = False,
    title: str = "",
    caption: str = "",
    right: Sequence[str] = (),
) -> Group:
    """A table of rows with the same keys, at most ``width`` characters wide.

    Args:
        rows: cells by column; a cell may have several lines.
        width: width of the terminal, in characters.
        optional: columns that may be left out, the first one first. The caption names those that are.
        text: column of sentences, which takes what is left and is wrapped between words.
        one_line: cut sentences off instead of wrapping them, if leaving out columns is not enough.
        title: a line above the table.
        caption: a line below the table.
        right: columns that are aligned to the right.

    Returns:
        Title, table and caption. If the other columns alone are too wide, the table is as wide as they are.

    >>> from rich.console import Console
    >>> rows = [{"name": "fedbn", "source": "Li et al.", "what": "BN stays local"}]
    >>> table = fitted_table(rows, 31, text="what", optional=["source"])
    >>> Console(width=31).print(table)  # doctest: +NORMALIZE_WHITESPACE
    name   what
    ─────────────────────
    fedbn  BN stays local
    Left out in this width: source.

    >>> rows = [{"name": "fedbn", "bytes": "64 B"}, {"name": "silobn", "bytes": "1.7 kB"}]
    >>> Console(width=31).print(fitted_table(rows, 31, right=["bytes"]))
    name     bytes
    ──────────────
    fedbn     64 B
    silobn  1.7 kB
    """
    widths = {name: _width([name, *(row[name] for row in rows)]) for name in next(iter(rows), ())}
    least = {name: min(n, MIN_TEXT_WIDTH) if name == text and not one_line else n for name, n in widths.items()}
    left_out = []
    for name in optional:
        if sum(least.values()) + GAP * (len(least) - 1) <= width:
            break
        if least.pop(name, 0):
            left_out.append(name)
    table = empty_table()
    others = sum(n + GAP for name, n in least.items() if name != text)
    for name in least:
        is_text = name == text
        table.add_column(
            _justified(name, widths[name]) if name in right else name,
            no_wrap=not is_text or one_line,
            overflow="ellipsis" if is_text else "ignore",
            max_width=max(min(least[name], MIN_TEXT_WIDTH), width - others) if is_text else None,
            min_width=None if is_text else least[name],
        )
    for row in rows:
        table.add_row(*(Text(_justified(row[name], widths[name]) if name in right else row[name]) for name in least))
    if left_out:
        caption = f"{caption} Left out in this width: {', '.join(left_out)}.".strip()
    return titled(table, title, caption)


def empty_table() -> Table:
    """A table with a rule below its head, and no other lines."""
    return Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))


def titled(table: Table, title: str, caption: str = "") -> Group:
    """A table with title and caption, which may be wider than the table."""
    parts = [Text(title, style="bold")] if title else []
    return Group(*parts, table, *([Text(caption, style="dim")] if caption else []))


def fold_label(label: str, width: int) -> str:
    r"""Break a strategy's name into lines of at most ``width`` characters, between words and options where possible.

    >>> fold_label("groupnorm:groups=4:affine=false", 18)
    'groupnorm:groups=4\n:affine=false'
    >>> fold_label("GroupNorm, groups=4", 18)
    'GroupNorm,\ngroups=4'
    """
    lines = [""]
    for part in re.split("(?=[:+])|(?<= )(?![+])", label):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def _justified(cell: str, width: int) -> str:
    """The lines of a cell, aligned to the right; rich does not justify text that may overflow."""
    return "\n".join(line.rjust(width) for line in cell.split("\n"))


def _width(cells: Sequence[str]) -> int:
    return max((len(line) for cell in cells for line in cell.split("\n")), default=0)
