"""A comparison in the terminal: the answer in words, the evaluation matrix, paired differences, cost.

Strategies are listed below each other for each kind of statistics, because these are the values to compare. A star
means that the paired interval against *every* other strategy excludes zero. It is printed in addition to bold text,
because pipes and logs have no bold text.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.text import Text

from fedbn.federation.traffic import MESSAGE
from fedbn.nn.roles import Role
from fedbn_simulations.report.layout import GAP, empty_table, fitted_table, fold_label, titled
from fedbn_simulations.results.comparison import Comparison
from fedbn_simulations.results.formatting import (
    capitalize,
    format_count,
    format_estimate,
    format_interval,
    format_number,
    format_signed,
    format_size,
    metric_title,
)
from fedbn_simulations.results.matrix import COLUMNS, ROWS, STARTS
from fedbn_simulations.results.summary import answer, is_clear, starts_rows

if TYPE_CHECKING:
    import pandas as pd

#: Longer labels of strategies are folded between their options, in characters.
MAX_LABEL_WIDTH = 22

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
        console.print(starts_table(starts, metric or comparison.metric, console.width), "")
    console.print(cost_table(comparison, console.width))
    if comparison.engine and f"engine {comparison.engine}" not in comparison.notices:
        console.print(Text(f"Engine {comparison.engine}"))
    for notice in comparison.notices:
        console.print(Text(f"Note: {notice}", style="yellow"))


def _title(comparison: Comparison, metric: str) -> str:
    return capitalize(metric_title(metric or comparison.metric))


def matrix_table(comparison: Comparison, metric: str = "", width: int = 100) -> Group:
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


def paired_table(comparison: Comparison, metric: str = "", width: int = 100) -> Group:
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
        title=f"{_title(comparison, metric)} minus that of {comparison.reference_name}, user by user [95 % interval]",
        caption="*: interval excludes 0 and corrected p < .05. ↑ ↓: users gaining, losing over one point. "
        "More in the report.",
    )


def starts_table(rows: list[list[str]], metric: str, width: int = 100) -> Group:
    """Table of the rows from `starts_rows`. A narrow table has intervals below their values, and fewer columns."""
    head, *lines = rows
    is_narrow = sum(max(len(line[i]) for line in rows) + GAP for i in range(len(head))) - GAP > width
    cells = [[cell.replace(" [", "\n[") if is_narrow else cell for cell in line] for line in lines]
    return fitted_table(
        [dict(zip(head, line, strict=True)) for line in cells],
        width,
        optional=(STARTS["initial"][0], STARTS["mixture"][0], STARTS["nearest"][0]),
        title=f"{capitalize(metric_title(metric))} of unseen users by the statistics they start from [95 % interval]",
        caption="Before any adaptation; nearest, mixture and prior-mixed use the user's earlier unlabeled data.",
    )


def cost_table(comparison: Comparison, width: int = 100) -> Group:
    """Owner of each role, bytes per client and round, seconds per run."""
    owners = comparison.traffic()
    # Step counters are always local and never sent; additional messages have no owner.
    owned = owners.loc[owners["owner"] != MESSAGE, "role"]
    roles = [role for role in dict.fromkeys(owned) if role != Role.COUNTER]
    seconds = comparison.seconds().set_index("strategy")
    has_rates = (seconds["lr"] != "").any()  # an app has none
    rows = []
    for strategy in seconds.index:
        lines = owners[owners["strategy"] == strategy].set_index("role")
        run = seconds.loc[strategy]
        sd = f" ±{run['sd']:.1f}" if math.isfinite(run["sd"]) else ""
        rows.append(
            {"strategy": fold_label(comparison.names[strategy], MAX_LABEL_WIDTH)}
            | {role: lines["owner"].get(role, "–") for role in roles}
            | {"down": format_size(lines["bytes_down"].sum()), "up": format_size(lines["bytes_up"].sum())}
            | {"seconds": f"{run['mean']:.1f}{sd}"}
            | ({"lr": run["lr"]} if has_rates else {})
        )
    return fitted_table(
        rows,
        width,
        optional=(Role.GATE, Role.SAMPLE_AFFINE, "lr", "seconds", Role.AFFINE),
        title="Owner of each role, bytes per client and round, seconds per run",
        caption="shared: on the server. seeded: per client, averaged for newcomers. local: per client, never sent.",
        right=("down", "up", "seconds", "lr"),
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
) -> Group:
    """Strategies down, rows of the matrix across, one section per column of the matrix.

    The parts of a cell share a line if the console is wide enough, otherwise they are stacked. The labels of the
    strategies in commands are added if there is room for them.
    """
    rows = [r for r in ROWS if any(row == r and column in columns for column, _, row in text)]
    cells = {r: [" ".join(filter(None, parts)) for key, parts in text.items() if key[2] == r] for r in rows}
    widths = [max(map(len, [ROWS[r][0], *cells[r]])) for r in rows]
    names = [fold_label(comparison.names[strategy], MAX_LABEL_WIDTH) for strategy in strategies]
    sections = [COLUMNS[column][0] for column in columns]
    name_width = max(len(line) for text in (*names, *sections) for line in text.split("\n"))
    needed = sum(w + GAP for w in widths) + name_width
    wide = needed <= width
    labeled = needed + max(map(len, strategies)) + GAP <= width
    table = empty_table()
    table.add_column("strategy", no_wrap=True)
    if labeled:
        table.add_column("label", no_wrap=True)
    for row in rows:
        table.add_column(ROWS[row][0], no_wrap=wide)
    for column, section in zip(columns, sections, strict=True):
        present = [s for s in strategies if any((column, s, row) in text for row in rows)]
        if present:
            table.add_row(Text(section, style="italic"))
        for strategy in present:
            line = (text.get((column, strategy, row), ("–",)) for row in rows)
            joined = [(" " if wide else "\n").join(filter(None, parts)) for parts in line]
            style = ["bold" if "*" in cell else "" for cell in joined]
            i = strategies.index(strategy)
            heads = [names[i], *([strategy] if labeled else [])]
            table.add_row(*map(Text, heads), *map(Text, joined, style))
    return titled(table, title, caption or "")


def _counts(comparison: Comparison) -> str:
    seen = comparison.evaluations.query("row == 'own'")["user"].nunique()
    unseen = comparison.evaluations.query("row == 'unseen'")["user"].nunique()
    users = f"{format_count(seen, 'seen user')}, " + (f"{unseen} unseen, " if unseen else "")
    return users + format_count(comparison.runs["seed"].nunique(), "seed")


def frame_table(frame: pd.DataFrame, title: str) -> Group:
    """Table of a frame of text, with its index in the first columns."""
    flat = frame.reset_index()
    table = empty_table()
    for name in flat.columns:
        table.add_column(str(name))
    for line in flat.to_numpy().tolist():
        table.add_row(*(Text(str(value)) for value in line))
    return titled(table, title)
