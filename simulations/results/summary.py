"""The answer of a comparison in sentences."""

from __future__ import annotations

import math
import re
from typing import Any

from fedbn.strategies.base import strategies
from simulations.results.formatting import (
    format_count,
    format_estimate,
    format_interval,
    format_number,
    format_p_value,
    format_signed,
)
from simulations.results.inference import Interval
from simulations.results.matrix import COLUMNS, METRICS, ROWS, STARTS, Matrix

#: A difference is called clear when its interval excludes 0 and its corrected p is below this.
ALPHA = 0.05


def answer(comparison: Matrix, metric: str = "accuracy") -> str:
    """The finding in words, one sentence per kind of test: best strategy against the reference.

    A strategy that gathers all data in one place is a bound, no choice that a federation has, and is not named.
    The best of several is named, so its difference is a little optimistic; "clear" therefore also asks
    for the p-value corrected for all comparisons. An interval that includes 0 is called no clear difference.
    """
    return " ".join(sentences(comparison, metric))


def sentences(comparison: Matrix, metric: str = "accuracy") -> list[str]:
    """The sentences of `answer`, one per kind of test that the comparison has."""
    rows = dict.fromkeys(row for row, _ in comparison.cells if row != "worst")
    return [_sentence(comparison, row, metric) for row in rows]


def is_clear(line: Any) -> bool:
    """Whether a line of `Matrix.paired` is a clear difference, by interval and corrected p-value."""
    return _interval(line)[0].excludes_zero and not line.p_adjusted >= ALPHA


def is_bound(label: str) -> bool:
    """Whether a strategy gathers all data in one place; False for one that is not installed here.

    >>> is_bound("centralized"), is_bound("groupnorm:groups=4"), is_bound("somebody's")
    (True, False, False)
    """
    known = strategies().get(re.split("[:+]", label)[0])
    return known is not None and known.is_centralized


def starts_rows(comparison: Matrix, metric: str = "accuracy") -> list[list[str]]:
    """What unseen users start from, as text: a heading, then one line a strategy that sends statistics."""
    found = comparison.starts(metric)
    starts = [s for s in STARTS if (found["start"] == s).any()]
    rows = [["strategy", *(STARTS[s][0] for s in starts)]]
    for strategy, lines in found.groupby("strategy", sort=False):
        known = {line.start: format_estimate(line.mean, line.ci_low, line.ci_high) for line in lines.itertuples()}
        rows.append([str(strategy), *(known.get(s, "–") for s in starts)])
    return rows


def _sentence(comparison: Matrix, row: str, metric: str) -> str:
    """One kind of test, in the first column of the matrix that has it."""
    column = next(c for r, c in comparison.cells if r == row)
    title = ROWS[row][0].capitalize() + ("" if column == "aggregated" else f" ({COLUMNS[column][0]})")
    means = comparison.matrix(metric).query("row == @row and column == @column").set_index("strategy")["mean"]
    lines = comparison.paired(metric).query("row == @row and column == @column").dropna(subset="difference")
    reference = comparison.reference
    if lines.empty:
        known = means.dropna()
        return f"{title}: " + ", ".join(f"{name} {format_number(mean)}" for name, mean in known.items()) + "."
    choices = lines[~lines["strategy"].map(is_bound)]
    lines = choices if len(choices) else lines
    best = next(lines.sort_values("difference", ascending=not METRICS[metric], kind="stable").head(1).itertuples())
    ours, theirs = (
        f"{best.strategy} {format_number(means[best.strategy])}",
        f"{reference} {format_number(means[reference])}",
    )
    gain = best.difference if METRICS[metric] else -best.difference
    interval, over = _interval(best)
    # Where the interval is over seeds, all users hold one model: they are no evidence to be counted.
    users = [] if over else [format_count(best.n_users, "user")]
    # An interval that excludes 0 in a sentence that says "no clear difference" needs its reason.
    corrected = (
        [f"corrected {format_p_value(best.p_adjusted)}"] if interval.excludes_zero and not is_clear(best) else []
    )
    parts = [
        format_estimate(best.difference, *interval, format_signed) + over,
        *corrected,
        *users,
        format_count(best.n_seeds, "seed"),
    ]
    evidence = ", ".join(parts)
    if not best.difference:
        return f"{title}: {ours} and {theirs} do not differ ({evidence})."
    if not math.isfinite(interval.low):
        return f"{title}: {ours} and {theirs}, too few data for an interval ({evidence})."
    if not is_clear(best):
        return f"{title}: no clear difference between {ours} and {theirs} ({evidence})."
    if gain > 0:
        return f"{title}: {ours} against {theirs} ({evidence})."
    return f"{title}: no strategy reaches {theirs}; the nearest is {ours} ({evidence})."


def _interval(line: Any) -> tuple[Interval, str]:
    """The interval over users, or over seeds where users admit none, and how to say so."""
    if math.isfinite(line.ci_low):
        return Interval(line.ci_low, line.ci_high), ""
    return Interval(line.seed_low, line.seed_high), " over seeds" if format_interval(
        line.seed_low, line.seed_high
    ) else ""
