"""A comparison in the terminal: the answer in words, the evaluation matrix, paired differences, cost.

Strategies stand below each other within one treatment of the statistics, because that is what one
compares. Bold is earned: the paired interval against *every* other strategy excludes zero.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from simulations.results import COLUMNS, METRICS, ROWS, Comparison, Interval, bracket, cell, number, signed

#: A difference is called clear when its interval excludes 0 and its corrected p is below this.
ALPHA = 0.05


def answer(comparison: Comparison, metric: str = "accuracy") -> str:
    """The finding in words, one sentence per kind of test: best strategy against the reference.

    The best of several is named, so its difference is a little optimistic; "clear" therefore also asks
    for the p-value corrected for all comparisons. An interval that includes 0 is called no clear difference.
    """
    rows = [row for row in ("own", "global", "unseen") if any(row == r for r, _ in comparison.cells)]
    return " ".join(_sentence(comparison, row, metric) for row in rows)


def is_clear(line: Any) -> bool:
    """Whether a line of `Comparison.paired` is a clear difference, by interval and corrected p-value."""
    return _interval(line)[0].excludes_zero and not line.p_adjusted >= ALPHA


def show(comparison: Comparison, console: Console | None = None, metric: str = "accuracy") -> None:
    """Print answer, matrix, paired differences and cost."""
    console = console or Console()
    console.print(Text(answer(comparison, metric), style="bold"), "")
    console.print(matrix_table(comparison, metric), "")
    if len(comparison.strategies) > 1:
        console.print(paired_table(comparison, metric), "")
    console.print(cost_table(comparison))
    for notice in comparison.notices:
        console.print(Text(f"Note: {notice}", style="yellow"))


def matrix_table(comparison: Comparison, metric: str = "accuracy") -> Table:
    """Mean over users with its 95 % interval; sections by how the statistics were obtained."""
    best = comparison.clear_best(metric)
    text = {
        (line.column, line.strategy, line.row): Text(
            cell(line.mean, line.ci_low, line.ci_high),
            style="bold" if (line.strategy, line.row, line.column) in best else "",
        )
        for line in comparison.matrix(metric).dropna(subset="mean").itertuples()
    }
    return _sections(
        comparison,
        comparison.strategies,
        text,
        f"{_metric(metric)}, mean over users [95 % interval, users resampled], {_size(comparison)}",
        "Bold: better than each other strategy, every paired interval excludes 0.",
    )


def paired_table(comparison: Comparison, metric: str = "accuracy") -> Table:
    """Each strategy minus the reference, user by user."""
    text = {}
    for line in comparison.paired(metric).dropna(subset="difference").itertuples():
        value = Text(
            cell(line.difference, line.ci_low, line.ci_high, signed), style="bold" if is_clear(line) else ""
        )
        if not pd.isna(line.better):
            value.append(f"\n{p_value(line.p_adjusted)}  {line.better}↑ {line.worse}↓", style="dim")
        text[line.column, line.strategy, line.row] = value
    return _sections(
        comparison,
        comparison.strategies[1:],
        text,
        f"{_metric(metric)} minus that of {comparison.reference}, same users and seeds [95 % interval]",
        "p: Wilcoxon signed-rank over users, Benjamini-Hochberg over this table. "
        "↑ ↓: users that gain or lose more than one point.\nBold: interval excludes 0 and p < .05.",
    )


def cost_table(comparison: Comparison) -> Table:
    """Who owns what, bytes per client and round, seconds per run."""
    owners = comparison.traffic()
    roles = list(dict.fromkeys(owners["role"]))
    seconds = comparison.seconds().set_index("strategy")
    table = Table(
        title="Owner of each role, bytes per client and round, seconds per run",
        title_justify="left",
        caption="shared: the server's. seeded: the client's own, averaged for newcomers. local: stays.",
        caption_justify="left",
    )
    table.add_column("strategy")
    for name in roles:
        table.add_column(name)
    for name in ("down", "up", "seconds", "lr"):
        table.add_column(name, justify="right")
    for strategy in seconds.index:
        lines = owners[owners["strategy"] == strategy].set_index("role")
        run = seconds.loc[strategy]
        spread = f" ±{run['sd']:.1f}" if math.isfinite(run["sd"]) else ""
        table.add_row(
            Text(strategy),
            *(Text(lines["owner"].get(role, "–")) for role in roles),
            size(lines["bytes_down"].sum()),
            size(lines["bytes_up"].sum()),
            f"{run['mean']:.1f}{spread}",
            run["lr"],
        )
    return table


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


def _sections(
    comparison: Comparison,
    strategies: list[str],
    text: dict[tuple[str, str, str], Text],
    title: str,
    caption: str,
) -> Table:
    """Strategies down, rows of the matrix across, one section per column of the matrix."""
    rows = list(dict.fromkeys(row for row, _ in comparison.cells))
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("strategy")
    for row in rows:
        table.add_column(ROWS[row][0])
    for column in comparison.meta["columns"]:
        present = [s for s in strategies if any((column, s, row) in text for row in rows)]
        if present:
            table.add_row(Text(COLUMNS[column][0], style="italic dim"))
        for strategy in present:
            table.add_row(Text(strategy), *(text.get((column, strategy, row), Text("–")) for row in rows))
        table.add_section()
    return table


def _sentence(comparison: Comparison, row: str, metric: str) -> str:
    """One kind of test, in the first column of the matrix that has it."""
    column = next(c for r, c in comparison.cells if r == row)
    title = ROWS[row][0].capitalize() + ("" if column == "aggregated" else f" ({COLUMNS[column][0]})")
    means = comparison.matrix(metric).query("row == @row and column == @column").set_index("strategy")["mean"]
    lines = comparison.paired(metric).query("row == @row and column == @column").dropna(subset="difference")
    reference = comparison.reference
    if lines.empty:
        known = means.dropna()
        return f"{title}: " + ", ".join(f"{name} {number(mean)}" for name, mean in known.items()) + "."
    best = next(
        lines.sort_values("difference", ascending=not METRICS[metric], kind="stable").head(1).itertuples()
    )
    ours, theirs = (
        f"{best.strategy} {number(means[best.strategy])}",
        f"{reference} {number(means[reference])}",
    )
    gain = best.difference if METRICS[metric] else -best.difference
    interval, over = _interval(best)
    evidence = ", ".join(
        part
        for part in (
            f"{cell(best.difference, *interval, signed)}{over}",
            _count(best.n_users, "user"),
            _count(best.n_seeds, "seed"),
        )
    )
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
    return Interval(line.seed_low, line.seed_high), " over seeds" if bracket(
        line.seed_low, line.seed_high
    ) else ""


def _metric(metric: str) -> str:
    return metric.replace("_", "-").capitalize()


def _size(comparison: Comparison) -> str:
    seen = comparison.evaluations.query("row == 'own'")["user"].nunique()
    unseen = comparison.evaluations.query("row == 'unseen'")["user"].nunique()
    users = f"{_count(seen, 'seen user')}, " + (f"{unseen} unseen, " if unseen else "")
    return users + _count(comparison.runs["seed"].nunique(), "seed")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
