"""The result of a comparison in sentences."""

from __future__ import annotations

import math
import re
from typing import Any

from fedbn.strategies.base import strategies
from fedbn_simulations.results.formatting import (
    format_count,
    format_estimate,
    format_interval,
    format_number,
    format_p_value,
    format_signed,
)
from fedbn_simulations.results.inference import ALPHA, MIN_USERS, Interval
from fedbn_simulations.results.matrix import COLUMNS, ROWS, STARTS, Matrix


def answer(comparison: Matrix, metric: str = "") -> str:
    """The result in words, one sentence per kind of test: best strategy against the reference.

    Strategies that pool all data in one place are bounds, not options for a federation, and are skipped. The difference
    of the best of several strategies is slightly optimistic, so a "clear" difference also requires a small p-value
    after correction for all comparisons. If the interval includes 0, there is no clear difference. Too few users for a
    small p-value are named. Without a clear difference, the sentence says how large a difference would have been found.
    """
    return " ".join(sentences(comparison, metric))


def sentences(comparison: Matrix, metric: str = "") -> list[str]:
    """The sentences of `answer`, one per kind of test that the comparison has."""
    rows = dict.fromkeys(row for row, _ in comparison.cells if row != "worst")
    return [_sentence(comparison, row, metric) for row in rows]


def is_clear(line: Any) -> bool:
    """Whether a line of `Matrix.paired` is a clear difference, by interval and corrected p-value."""
    return _interval(line)[0].excludes_zero and not line.p_adjusted >= ALPHA


def is_bound(label: str) -> bool:
    """Whether a strategy pools all data in one place; False for one that is not installed.

    >>> is_bound("centralized"), is_bound("groupnorm:groups=4"), is_bound("third-party")
    (True, False, False)
    """
    known = strategies().get(re.split("[:+]", label)[0])
    return known is not None and known.is_centralized


def starts_rows(comparison: Matrix, metric: str = "") -> list[list[str]]:
    """Results of unseen users by initial statistics as text: a header, then one line per strategy."""
    frame = comparison.starts(metric)
    starts = [s for s in STARTS if (frame["start"] == s).any()]
    rows = [["strategy", *(STARTS[s][0] for s in starts)]]
    for strategy, lines in frame.groupby("strategy", sort=False):
        by_start = {line.start: format_estimate(line.mean, line.ci_low, line.ci_high) for line in lines.itertuples()}
        rows.append([comparison.names[strategy], *(by_start.get(s, "–") for s in starts)])
    return rows


def _sentence(comparison: Matrix, row: str, metric: str) -> str:
    """The sentence of one kind of test, in the first column of the matrix that has it."""
    column = next(c for r, c in comparison.cells if r == row)
    title = ROWS[row][0].capitalize() + ("" if column == "aggregated" else f" ({COLUMNS[column][0]})")
    means = comparison.matrix(metric).query("row == @row and column == @column").set_index("strategy")["mean"]
    lines = comparison.paired(metric).query("row == @row and column == @column").dropna(subset="difference")
    reference, names = comparison.reference, comparison.names
    if lines.empty:
        return f"{title}: " + ", ".join(f"{names[s]} {format_number(mean)}" for s, mean in means.dropna().items()) + "."
    choices = lines[~lines["strategy"].map(is_bound)]
    lines = choices if len(choices) else lines
    best = next(
        lines.sort_values("difference", ascending=not comparison.higher_is_better(metric), kind="stable")
        .head(1)
        .itertuples()
    )
    winner, baseline = (f"{names[s]} {format_number(means[s])}" for s in (best.strategy, reference))
    gain = best.difference if comparison.higher_is_better(metric) else -best.difference
    interval, over = _interval(best)
    # If the interval is over seeds, all users share one model and are not counted.
    users = [] if over else [format_count(best.n_users, "user")]
    # If the interval excludes 0 but the difference is not clear, state the corrected p-value as the reason.
    unclear = interval.excludes_zero and not is_clear(best)
    few = best.n_users < MIN_USERS
    corrected = [f"corrected {format_p_value(best.p_adjusted)}"] if unclear and not few else []
    estimate = format_estimate(best.difference, *interval, format_signed) + over
    evidence = ", ".join([estimate, *corrected, *users, format_count(best.n_seeds, "seed")])
    if not best.difference:
        return f"{title}: {winner} and {baseline} do not differ ({evidence})."
    if not math.isfinite(interval.low):
        return f"{title}: {winner} and {baseline}, too few data for an interval ({evidence})."
    if not over and few:
        return f"{title}: {winner} and {baseline}, too few users ({best.n_users}) to test ({evidence})."
    if not is_clear(best):
        missed = f"; {format_number(best.detectable)} would be detected with 80 % power" if best.detectable > 0 else ""
        return f"{title}: no clear difference between {winner} and {baseline} ({evidence}{missed})."
    if gain > 0:
        return f"{title}: {winner} against {baseline} ({evidence})."
    return f"{title}: no strategy reaches {baseline}; the nearest is {winner} ({evidence})."


def _interval(line: Any) -> tuple[Interval, str]:
    """The interval over users, or over seeds if there is none over users, with a suffix for the text."""
    if math.isfinite(line.ci_low):
        return Interval(line.ci_low, line.ci_high), ""
    seeds = Interval(line.seed_low, line.seed_high)
    return seeds, " over seeds" if format_interval(*seeds) else ""
