"""A comparison in the terminal: the answer in words, the evaluation matrix, paired differences, cost.

Strategies stand below each other within one treatment of the statistics, because that is what one
compares. A star is earned: the paired interval against *every* other strategy excludes zero. It is printed
besides being bold, because a pipe or a log has no bold.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedbn.roles import Role
from fedbn.strategy import strategies
from fedbn.traffic import MESSAGE
from simulations.inference import Interval
from simulations.matrix import COLUMNS, METRICS, ROWS, STARTS
from simulations.numerals import bracket, cell, number, signed
from simulations.results import Comparison

if TYPE_CHECKING:
    import pandas as pd

#: A difference is called clear when its interval excludes 0 and its corrected p is below this.
ALPHA = 0.05
#: Of a longer label this much must fit on one line beside the numbers.
SHORTEST_LABEL = 12

Cells = dict[tuple[str, str, str], tuple[str, ...]]
"""The parts of a cell by column, strategy and row."""


def answer(comparison: Comparison, metric: str = "accuracy") -> str:
    """The finding in words, one sentence per kind of test: best strategy against the reference.

    A strategy that gathers all data in one place is a bound, no choice that a federation has, and is not named.
    The best of several is named, so its difference is a little optimistic; "clear" therefore also asks
    for the p-value corrected for all comparisons. An interval that includes 0 is called no clear difference.
    """
    return " ".join(sentences(comparison, metric))


def sentences(comparison: Comparison, metric: str = "accuracy") -> list[str]:
    """The sentences of `answer`, one per kind of test that the comparison has."""
    rows = dict.fromkeys(row for row, _ in comparison.cells if row != "worst")
    return [_sentence(comparison, row, metric) for row in rows]


def is_clear(line: Any) -> bool:
    """Whether a line of `Comparison.paired` is a clear difference, by interval and corrected p-value."""
    return _interval(line)[0].excludes_zero and not line.p_adjusted >= ALPHA


def is_bound(label: str) -> bool:
    """Whether a strategy gathers all data in one place; False for one that is not installed here.

    >>> is_bound("centralised"), is_bound("groupnorm:groups=4"), is_bound("somebody's")
    (True, False, False)
    """
    known = strategies().get(re.split("[:+]", label)[0])
    return known is not None and known.gathers


def show(comparison: Comparison, console: Console | None = None, metric: str = "accuracy") -> None:
    """Print answer, matrix, paired differences and cost, at most as wide as the console."""
    console = console or Console()
    console.print(Text(answer(comparison, metric), style="bold"), "")
    console.print(matrix_table(comparison, metric, console.width), "")
    if len(comparison.strategies) > 1:
        console.print(paired_table(comparison, metric, console.width), "")
    if len(starts := starts_rows(comparison, metric)) > 1:
        console.print(starts_table(starts, metric), "")
    console.print(cost_table(comparison))
    for notice in comparison.notices:
        console.print(Text(f"Note: {notice}", style="yellow"))


def matrix_table(comparison: Comparison, metric: str = "accuracy", width: int = 100) -> Table:
    """Mean over users with its 95 % interval; sections by how the statistics were obtained."""
    best = comparison.clear_best(metric)
    text: Cells = {}
    for line in comparison.matrix(metric).dropna(subset="mean").itertuples():
        star = "*" if (line.strategy, line.row, line.column) in best else ""
        parts = number(line.mean), bracket(line.ci_low, line.ci_high) + star
        text[line.column, line.strategy, line.row] = parts
    return _sections(
        comparison,
        comparison.strategies,
        list(comparison.meta["columns"]),
        text,
        width,
        title=f"{_metric(metric)}, mean over users [95 % interval], {_size(comparison)}",
        caption="*: better than each other strategy, every paired interval excludes 0." if best else None,
    )


def paired_table(comparison: Comparison, metric: str = "accuracy", width: int = 100) -> Table:
    """Each strategy minus the reference, user by user, in the first column of the matrix.

    The other columns and the worst users are on the report's page: a terminal is no place for all of it.
    """
    first = next(c for c in comparison.meta["columns"] if any(c == column for _, column in comparison.cells))
    text: Cells = {}
    for line in comparison.paired(metric).dropna(subset="difference").itertuples():
        if line.row == "worst":
            continue
        shown = cell(line.difference, line.ci_low, line.ci_high, signed) + ("*" if is_clear(line) else "")
        counts = f"{line.better}↑ {line.worse}↓" if line.row != "global" else ""
        text[line.column, line.strategy, line.row] = (*shown.split(" ", 1), counts)
    return _sections(
        comparison,
        comparison.strategies[1:],
        [first],
        text,
        width,
        title=f"{_metric(metric)} minus that of {comparison.reference}, user by user [95 % interval]",
        caption="*: interval excludes 0 and corrected p < .05. ↑ ↓: users gaining, losing over one point. "
        "More in the report.",
    )


def starts_rows(comparison: Comparison, metric: str = "accuracy") -> list[list[str]]:
    """What unseen users start from, as text: a heading, then one line a strategy that sends statistics."""
    found = comparison.starts(metric)
    starts = [s for s in STARTS if (found["start"] == s).any()]
    rows = [["strategy", *(STARTS[s][0] for s in starts)]]
    for strategy, lines in found.groupby("strategy", sort=False):
        known = {line.start: cell(line.mean, line.ci_low, line.ci_high) for line in lines.itertuples()}
        rows.append([str(strategy), *(known.get(s, "–") for s in starts)])
    return rows


def starts_table(rows: list[list[str]], metric: str = "accuracy") -> Table:
    """The rows of `starts_rows` as a table."""
    table = _table(
        title=f"{_metric(metric)} of unseen users by the statistics they start from [95 % interval]",
        caption="Before any adaptation; nearest, mixture and prior-mixed look at the user's earlier unlabelled data.",
    )
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    return table


def cost_table(comparison: Comparison) -> Table:
    """Who owns what, bytes per client and round, seconds per run."""
    owners = comparison.traffic()
    # Step counters are always the client's own and never travel; messages besides entries have no owner.
    owned = owners.loc[owners["owner"] != MESSAGE, "role"]
    roles = [role for role in dict.fromkeys(owned) if role != Role.COUNTER]
    seconds = comparison.seconds().set_index("strategy")
    table = _table(
        title="Owner of each role, bytes per client and round, seconds per run",
        caption="shared: the server's. seeded: the client's own, averaged for newcomers. local: stays.",
    )
    table.add_column("strategy", overflow="fold")
    for name in roles:
        table.add_column(name, no_wrap=True)
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


def _table(title: str, caption: str | None) -> Table:
    return Table(
        title=Text(title, style="bold"),
        title_justify="left",
        caption=Text(caption, style="dim") if caption else None,
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def _sections(
    comparison: Comparison,
    strategies: list[str],
    columns: list[str],
    text: Cells,
    width: int,
    *,
    title: str,
    caption: str | None,
) -> Table:
    """Strategies down, rows of the matrix across, one section per column of the matrix.

    The parts of a cell stand beside each other where the console is wide enough, else below each other.
    """
    rows = [r for r in ROWS if any(row == r and column in columns for column, _, row in text)]
    spans = [max(len(" ".join(filter(None, parts))) for key, parts in text.items() if key[2] == r) for r in rows]
    longest = max(map(len, strategies))
    wide = sum(span + 2 for span in spans) + min(longest, SHORTEST_LABEL) <= width
    table = _table(title, caption)
    table.add_column("strategy", overflow="fold")
    for row in rows:
        table.add_column(ROWS[row][0], no_wrap=wide)
    for column in columns:
        present = [s for s in strategies if any((column, s, row) in text for row in rows)]
        if present:
            table.add_row(Text(COLUMNS[column][0], style="italic"))
        for strategy in present:
            cells = (text.get((column, strategy, row), ("–",)) for row in rows)
            joined = [(" " if wide else "\n").join(filter(None, parts)) for parts in cells]
            style = ["bold" if "*" in cell else "" for cell in joined]
            table.add_row(Text(strategy), *map(Text, joined, style))
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
    choices = lines[~lines["strategy"].map(is_bound)]
    lines = choices if len(choices) else lines
    best = next(lines.sort_values("difference", ascending=not METRICS[metric], kind="stable").head(1).itertuples())
    ours, theirs = (
        f"{best.strategy} {number(means[best.strategy])}",
        f"{reference} {number(means[reference])}",
    )
    gain = best.difference if METRICS[metric] else -best.difference
    interval, over = _interval(best)
    # Where the interval is over seeds, all users hold one model: they are no evidence to be counted.
    users = [] if over else [count(best.n_users, "user")]
    # An interval that excludes 0 in a sentence that says "no clear difference" needs its reason.
    corrected = [f"corrected {p_value(best.p_adjusted)}"] if interval.excludes_zero and not is_clear(best) else []
    parts = [cell(best.difference, *interval, signed) + over, *corrected, *users, count(best.n_seeds, "seed")]
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
    return Interval(line.seed_low, line.seed_high), " over seeds" if bracket(line.seed_low, line.seed_high) else ""


def _metric(metric: str) -> str:
    return metric.replace("_", "-").capitalize()


def _size(comparison: Comparison) -> str:
    seen = comparison.evaluations.query("row == 'own'")["user"].nunique()
    unseen = comparison.evaluations.query("row == 'unseen'")["user"].nunique()
    users = f"{count(seen, 'seen user')}, " + (f"{unseen} unseen, " if unseen else "")
    return users + count(comparison.runs["seed"].nunique(), "seed")


def count(many: int, noun: str) -> str:
    """A number of things.

    >>> count(1, "user"), count(24, "user")
    ('1 user', '24 users')
    """
    return f"{many} {noun}{'' if many == 1 else 's'}"


def frame_table(frame: pd.DataFrame, title: str) -> Table:
    """A table of text as it is, its index in front."""
    flat = frame.reset_index()
    table = _table(title, None)
    for name in flat.columns:
        table.add_column(str(name), overflow="fold")
    for line in flat.to_numpy().tolist():
        table.add_row(*(Text(str(value)) for value in line))
    return table
