"""A comparison in the terminal: the answer in words, the evaluation matrix, paired differences, cost.

Strategies are listed below each other for each kind of statistics, because these are the values to compare. A star
means that the paired interval against *every* other strategy excludes zero. It is printed in addition to bold text,
because pipes and logs have no bold text.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedbn.federation.traffic import MESSAGE
from fedbn.nn.roles import Role
from simulations.results.comparison import Comparison
from simulations.results.formatting import (
    capitalize,
    format_count,
    format_estimate,
    format_interval,
    format_number,
    format_signed,
    format_size,
    metric_title,
)
from simulations.results.matrix import COLUMNS, ROWS
from simulations.results.summary import answer, is_clear, starts_rows

if TYPE_CHECKING:
    import pandas as pd

#: Minimum width of a label that must fit on one line with the numbers; longer labels are folded.
MIN_LABEL_WIDTH = 14

Cells = dict[tuple[str, str, str], tuple[str, ...]]
"""The parts of a cell by column, strategy and row."""


def show(comparison: Comparison, console: Console | None = None, metric: str = "") -> None:
    """Print answer, matrix, paired differences and cost, at most as wide as the console."""
    console = console or Console()
    console.print(Text(answer(comparison, metric), style="bold"), "")
    console.print(matrix_table(comparison, metric, console.width), "")
    if len(comparison.strategies) > 1:
        console.print(paired_table(comparison, metric, console.width), "")
    if len(starts := starts_rows(comparison, metric)) > 1:
        console.print(starts_table(starts, metric or comparison.metric), "")
    console.print(cost_table(comparison))
    if comparison.engine and f"engine {comparison.engine}" not in comparison.notices:
        console.print(Text(f"Engine {comparison.engine}"))
    for notice in comparison.notices:
        console.print(Text(f"Note: {notice}", style="yellow"))


def _title(comparison: Comparison, metric: str) -> str:
    return capitalize(metric_title(metric or comparison.metric))


def matrix_table(comparison: Comparison, metric: str = "", width: int = 100) -> Table:
    """Mean over users with its 95 % interval, in one section per column of the matrix."""
    best = comparison.clear_best(metric)
    text: Cells = {}
    for line in comparison.matrix(metric).dropna(subset="mean").itertuples():
        star = "*" if (line.strategy, line.row, line.column) in best else ""
        parts = format_number(line.mean), format_interval(line.ci_low, line.ci_high) + star
        text[line.column, line.strategy, line.row] = parts
    return _sections(
        comparison,
        comparison.strategies,
        list(comparison.meta["columns"]),
        text,
        width,
        title=f"{_title(comparison, metric)}, mean over users [95 % interval], {_counts(comparison)}",
        caption="*: better than every other strategy; every paired interval excludes 0." if best else None,
    )


def paired_table(comparison: Comparison, metric: str = "", width: int = 100) -> Table:
    """Each strategy minus the reference, user by user, in the first column of the matrix.

    The other columns and the worst users are only in the HTML report.
    """
    first = next(c for c in comparison.meta["columns"] if any(c == column for _, column in comparison.cells))
    text: Cells = {}
    for line in comparison.paired(metric).dropna(subset="difference").itertuples():
        if line.row == "worst":
            continue
        estimate = format_estimate(line.difference, line.ci_low, line.ci_high, format_signed)
        star = "*" if is_clear(line) else ""
        counts = f"{line.better}↑ {line.worse}↓" if line.row != "global" else ""
        text[line.column, line.strategy, line.row] = (*f"{estimate}{star}".split(" ", 1), counts)
    return _sections(
        comparison,
        comparison.strategies[1:],
        [first],
        text,
        width,
        title=f"{_title(comparison, metric)} minus that of {comparison.reference}, user by user [95 % interval]",
        caption="*: interval excludes 0 and corrected p < .05. ↑ ↓: users gaining, losing over one point. "
        "More in the report.",
    )


def starts_table(rows: list[list[str]], metric: str) -> Table:
    """Table of the rows from `starts_rows`."""
    table = _table(
        title=f"{capitalize(metric_title(metric))} of unseen users by the statistics they start from [95 % interval]",
        caption="Before any adaptation; nearest, mixture and prior-mixed use the user's earlier unlabeled data.",
    )
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    return table


def cost_table(comparison: Comparison) -> Table:
    """Owner of each role, bytes per client and round, seconds per run."""
    owners = comparison.traffic()
    # Step counters are always local and never sent; additional messages have no owner.
    owned = owners.loc[owners["owner"] != MESSAGE, "role"]
    roles = [role for role in dict.fromkeys(owned) if role != Role.COUNTER]
    seconds = comparison.seconds().set_index("strategy")
    table = _table(
        title="Owner of each role, bytes per client and round, seconds per run",
        caption="shared: on the server. seeded: per client, averaged for newcomers. local: per client, never sent.",
    )
    table.add_column("strategy", overflow="fold")
    for name in roles:
        table.add_column(name, no_wrap=True)
    for name in ("down", "up", "seconds", "lr"):
        table.add_column(name, justify="right")
    for strategy in seconds.index:
        lines = owners[owners["strategy"] == strategy].set_index("role")
        run = seconds.loc[strategy]
        sd = f" ±{run['sd']:.1f}" if math.isfinite(run["sd"]) else ""
        table.add_row(
            Text(strategy),
            *(Text(lines["owner"].get(role, "–")) for role in roles),
            format_size(lines["bytes_down"].sum()),
            format_size(lines["bytes_up"].sum()),
            f"{run['mean']:.1f}{sd}",
            run["lr"],
        )
    return table


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

    The parts of a cell share a line if the console is wide enough, otherwise they are stacked.
    """
    rows = [r for r in ROWS if any(row == r and column in columns for column, _, row in text)]
    cells = {r: [" ".join(filter(None, parts)) for key, parts in text.items() if key[2] == r] for r in rows}
    widths = [max(map(len, [ROWS[r][0], *cells[r]])) for r in rows]
    labels = [*strategies, *(COLUMNS[column][0] for column in columns)]
    label = min(max(map(len, labels)), MIN_LABEL_WIDTH)
    wide = sum(w + 2 for w in widths) + label <= width
    table = _table(title, caption)
    table.add_column("strategy", overflow="fold", min_width=label)
    for row in rows:
        table.add_column(ROWS[row][0], no_wrap=wide)
    for column in columns:
        present = [s for s in strategies if any((column, s, row) in text for row in rows)]
        if present:
            table.add_row(Text(COLUMNS[column][0], style="italic"))
        for strategy in present:
            line = (text.get((column, strategy, row), ("–",)) for row in rows)
            joined = [(" " if wide else "\n").join(filter(None, parts)) for parts in line]
            style = ["bold" if "*" in cell else "" for cell in joined]
            table.add_row(Text(strategy), *map(Text, joined, style))
    return table


def _counts(comparison: Comparison) -> str:
    seen = comparison.evaluations.query("row == 'own'")["user"].nunique()
    unseen = comparison.evaluations.query("row == 'unseen'")["user"].nunique()
    users = f"{format_count(seen, 'seen user')}, " + (f"{unseen} unseen, " if unseen else "")
    return users + format_count(comparison.runs["seed"].nunique(), "seed")


def frame_table(frame: pd.DataFrame, title: str) -> Table:
    """Table of a frame of text, with its index in the first columns."""
    flat = frame.reset_index()
    table = _table(title, None)
    for name in flat.columns:
        table.add_column(str(name), overflow="fold")
    for line in flat.to_numpy().tolist():
        table.add_row(*(Text(str(value)) for value in line))
    return table
