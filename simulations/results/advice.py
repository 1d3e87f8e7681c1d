"""Which treatment should I use? An answer drawn from comparisons' numbers alone.

For each comparison and each kind of test: the best strategy that a federation can choose, and those that are not
clearly behind it (their paired 95 % interval over users includes 0). The reversal between the users' own tests and
the pooled test is stated where it occurs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simulations.results.comparison import Comparison
from simulations.results.formatting import format_number
from simulations.results.matrix import METRICS, ROWS
from simulations.results.summary import is_bound

CELLS = (("own", "aggregated"), ("global", "aggregated"), ("unseen", "aggregated"), ("unseen", "recalibrated"))
"""What is asked of every comparison: whose data, which statistics."""


@dataclass(frozen=True)
class Verdict:
    """Who is best in one cell.

    Attributes:
        best: its label.
        mean: its mean over users.
        beside: strategies not clearly behind it, best first.
        clearly_behind: how many are.
    """

    best: str
    mean: float
    beside: tuple[str, ...]
    clearly_behind: int


def verdict(comparison: Comparison, row: str, column: str, metric: str = "accuracy") -> Verdict | None:
    """The best of a cell among strategies that are no bounds; None where nobody has it."""
    lines = comparison.matrix(metric).query("row == @row and column == @column").dropna(subset="mean")
    lines = lines[~lines["strategy"].map(is_bound)].sort_values("mean", ascending=not METRICS[metric], kind="stable")
    if lines.empty:
        return None
    best, *others = lines["strategy"]
    behind = {s for s in others if comparison.contrast(best, s, row, column, metric).users.excludes_zero}
    return Verdict(best, float(lines["mean"].iloc[0]), tuple(s for s in others if s not in behind), len(behind))


def advice(directories: Sequence[Path], metric: str = "accuracy", named: int = 4) -> str:
    """A Markdown table over comparisons, and the reversals found.

    Args:
        directories: result directories.
        metric: what counts.
        named: how many of those beside the best are named.
    """
    head = ["comparison", *(f"{ROWS[row][0]}, {column}" for row, column in CELLS)]
    lines, reversals = [head, ["---"] * len(head)], []
    for directory in directories:
        comparison = Comparison.load(directory)
        found = {cell: verdict(comparison, *cell, metric) for cell in CELLS}
        lines.append([directory.name, *(_text(v, named) for v in found.values())])
        own, pooled = found["own", "aggregated"], found["global", "aggregated"]
        if own and pooled and own.best not in (pooled.best, *pooled.beside):
            lines_of = comparison.matrix(metric).query("row == 'global' and column == 'aggregated'")
            there = lines_of.set_index("strategy").loc[own.best, "mean"]
            reversals.append(
                f"- {directory.name}: `{own.best}` is best on users' own tests ({format_number(own.mean)}) and clearly "
                f"behind "
                f"`{pooled.best}` on the pooled test ({format_number(there)} against {format_number(pooled.mean)})."
            )
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    tail = "\n".join(["Reversals:", "", *reversals]) if reversals else "No clear reversal between own and pooled test."
    return f"{table}\n\n{tail}\n"


def _text(found: Verdict | None, named: int) -> str:
    if found is None:
        return "–"
    beside = ", ".join(f"`{s}`" for s in found.beside[:named])
    more = len(found.beside) - named
    rest = f"; not clearly behind: {beside}{f' and {more} more' if more > 0 else ''}" if beside else "; clearly best"
    return f"`{found.best}` {format_number(found.mean)}{rest}"
