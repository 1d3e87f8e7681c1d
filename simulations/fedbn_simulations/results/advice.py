"""Recommend strategies from the results of comparisons.

For each comparison and each kind of test: the best strategy that learned and is not a bound, and those that are not
clearly behind it (their paired 95 % interval over users includes 0). Reversals between the users' own tests and the
pooled test are listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedbn_simulations.results.comparison import Comparison
from fedbn_simulations.results.formatting import format_number, markdown_table
from fedbn_simulations.results.matrix import ROWS
from fedbn_simulations.results.summary import is_bound

CELLS = (("own", "aggregated"), ("global", "aggregated"), ("unseen", "aggregated"), ("unseen", "recalibrated"))
"""Cells of the matrix to report for every comparison: row and column."""


@dataclass(frozen=True)
class Verdict:
    """The best strategy of one cell.

    Attributes:
        best: label of the best strategy.
        mean: its mean over users.
        comparable: strategies that are not clearly behind it, best first.
        clearly_behind: number of strategies that are clearly behind it.
    """

    best: str
    mean: float
    comparable: tuple[str, ...]
    clearly_behind: int


def verdict(comparison: Comparison, row: str, column: str, metric: str = "") -> Verdict | None:
    """The best strategy of a cell, without bounds and networks that did not learn; None if no strategy has the cell."""
    lines = comparison.matrix(metric).query("row == @row and column == @column").dropna(subset="mean")
    if lines.empty:
        return None
    choices = ~lines["strategy"].map(is_bound) & ~lines["strategy"].isin(comparison.unlearned)
    lines = lines[choices].sort_values("mean", ascending=not comparison.higher_is_better(metric), kind="stable")
    if lines.empty:
        return None
    best, *others = lines["strategy"]
    behind = {s for s in others if comparison.contrast(best, s, row, column, metric).users.excludes_zero}
    return Verdict(best, float(lines["mean"].iloc[0]), tuple(s for s in others if s not in behind), len(behind))


def advice(directories: Sequence[Path], metric: str = "", max_names: int = 4) -> str:
    """Make a Markdown table of the best strategies, followed by the reversals.

    Args:
        directories: result directories.
        metric: the metric to compare by; the displayed one of each comparison by default.
        max_names: how many comparable strategies to list by name.
    """
    lines, reversals = [], []
    for directory in directories:
        comparison = Comparison.load(directory)
        verdicts = {cell: verdict(comparison, *cell, metric) for cell in CELLS}
        cells = {f"{ROWS[row][0]}, {column}": _text(v, max_names) for (row, column), v in verdicts.items()}
        lines.append({"comparison": directory.name} | cells)
        own, pooled = verdicts["own", "aggregated"], verdicts["global", "aggregated"]
        if own and pooled and own.best not in (pooled.best, *pooled.comparable):
            global_means = comparison.matrix(metric).query("row == 'global' and column == 'aggregated'")
            mean = global_means.set_index("strategy").loc[own.best, "mean"]
            reversals.append(
                f"- {directory.name}: `{own.best}` is best on users' own tests ({format_number(own.mean)}) and clearly "
                f"behind `{pooled.best}` on the pooled test ({format_number(mean)} against "
                f"{format_number(pooled.mean)})."
            )
    tail = "\n".join(["Reversals:", "", *reversals]) if reversals else "No clear reversal between own and pooled test."
    return f"{markdown_table(lines)}\n{tail}\n"


def _text(result: Verdict | None, max_names: int) -> str:
    if result is None:
        return "–"
    names = ", ".join(f"`{s}`" for s in result.comparable[:max_names])
    more = len(result.comparable) - max_names
    rest = f"; not clearly behind: {names}{f' and {more} more' if more > 0 else ''}" if names else "; clearly best"
    return f"`{result.best}` {format_number(result.mean)}{rest}"
