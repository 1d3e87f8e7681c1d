"""Tables of the HTML report, with cells that have a text, a small text and a sort key."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fedbn.federation.traffic import REPEATED
from fedbn.strategies.base import strategies
from fedbn_simulations.report.style import direction
from fedbn_simulations.results.comparison import Comparison
from fedbn_simulations.results.formatting import (
    capitalize,
    format_interval,
    format_number,
    format_p_value,
    format_signed,
    format_size,
    metric_title,
)
from fedbn_simulations.results.matrix import BRIEF_CELLS, COLUMNS, ROWS
from fedbn_simulations.results.papers import link_of, without_link, without_options
from fedbn_simulations.results.summary import is_bound, is_clear, starts_rows

#: Measures of ``shift.json``: name -> (title, description).
SKEW = {
    "label_divergence": (
        "labels",
        "Jensen-Shannon divergence between a user's class distribution and the pooled one, mean over users, in bits: "
        "0 if all are the same, at most 1",
    ),
    "quantity_cv": ("quantity", "standard deviation of the number of examples per user, divided by its mean"),
    "quantity_ratio": ("quantity", "largest number of examples per user, divided by the smallest"),
    "feature_w2": (
        "inputs",
        "2-Wasserstein distance between two users' input channels, approximated as Gaussian, mean over pairs, in "
        "pooled standard deviations",
    ),
}


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: main text.
        small: small text; its first line is next to the main text and the others are below.
        sort: sort key of the column; empty keys are sorted last.
        strong: whether the main text is bold.
    """

    text: str
    small: str = ""
    sort: float | str = ""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table of the page; the first ``names`` columns are text, the others numbers."""

    caption: str
    head: list[str]
    rows: list[list[Cell]]
    names: int = 1


MISSING = Cell("–")
MAX_BRIEF = 8
"""Rows of the first table of the page."""
INTERVALS = ["over users", "over seeds", "sd of seeds", "users", "seeds"]


def plain(frame: pd.DataFrame, caption: str, names: Sequence[str]) -> Table | None:
    """Table of a frame of text; the columns ``names`` are text, the others numbers."""
    if frame.empty:
        return None
    flat = frame.reset_index()
    text_columns = [name for name in names if name in flat.columns]
    flat = flat[text_columns + [name for name in flat.columns if name not in names]]
    lines = [
        [
            *(Cell(text, sort=text) for text in line[: len(text_columns)]),
            *(_interval_cell(text) for text in line[len(text_columns) :]),
        ]
        for line in flat.astype(str).to_numpy().tolist()
    ]
    return Table(caption, list(flat.columns), lines, names=len(text_columns))


def _interval_cell(text: str) -> Cell:
    """A value with its interval, if any, as small text."""
    value, bracket, rest = text.partition(" [")
    return Cell(value, (bracket + rest).strip(), _sort_key(value))


def _sort_key(text: str) -> float | str:
    """The text as a number if possible, else as it is; empty for a missing cell."""
    try:
        return float(text.replace("−", "-"))
    except ValueError:
        return "" if text == "–" else text


def _title(comparison: Comparison, metric: str = "") -> str:
    return capitalize(metric_title(metric or comparison.metric))


def brief(comparison: Comparison) -> Table:
    """Means of the reference and the strategies with the best own tests, without bounds; at most `MAX_BRIEF` rows."""
    means = comparison.matrix().dropna(subset="mean").set_index(["strategy", "row", "column"])["mean"]
    cells = {title: cell for title, cell in BRIEF_CELLS.items() if cell in {key[1:] for key in means.index}}
    first = next(iter(cells.values()), None)
    sign = -1 if comparison.higher_is_better() else 1
    others = [s for s in comparison.strategies[1:] if not is_bound(s)]
    if len(others) >= MAX_BRIEF:
        others.sort(key=lambda s: sign * means.get((s, *first), -sign * math.inf) if first else 0)
        others = others[: MAX_BRIEF - 1]
    rows = [
        [_strategy(comparison, s), *(_number(means.get((s, *cell), math.nan)) for cell in cells.values())]
        for s in (comparison.reference, *others)
    ]
    better = direction(comparison.higher_is_better())
    return Table(f"{_title(comparison)}, mean over users ({better})", ["strategy", *cells], rows)


def strategies_table(comparison: Comparison) -> list[tuple[str, str, str, str, str]]:
    """Label, readable name, description, paper and its link of each strategy."""
    known = strategies()
    lines = []
    for label in comparison.strategies:
        part = known.get(re.split("[:+]", label)[0])
        about = (without_options(part.about), without_link(part.source), link_of(part)) if part else ("", "", "")
        lines.append((label, comparison.names[label], *about))
    return lines


def matrix(comparison: Comparison, metric: str = "") -> Table:
    """Evaluation matrix: strategies and statistics down, rows of the matrix across."""
    best = comparison.clear_best(metric)
    cells = {
        (line.strategy, line.column, line.row): Cell(
            format_number(line.mean),
            format_interval(line.ci_low, line.ci_high),
            line.mean,
            (line.strategy, line.row, line.column) in best,
        )
        for line in comparison.matrix(metric).dropna(subset="mean").itertuples()
    }
    caption = f"{_title(comparison, metric)}: mean over users [95 % interval over users]"
    return _across(comparison, comparison.strategies, cells, caption)


def paired(comparison: Comparison) -> Table:
    """Differences to the reference in the layout of the matrix, with corrected p and counts of users."""
    cells = {}
    for line in comparison.paired().dropna(subset="difference").itertuples():
        users, seeds = (
            format_interval(*ends, format_signed)
            for ends in ((line.ci_low, line.ci_high), (line.seed_low, line.seed_high))
        )
        evidence = "over seeds" if seeds and not users else format_p_value(line.p_adjusted)
        below = "" if line.row == "worst" else f"\n{evidence}, {line.better}↑ {line.worse}↓"
        cells[line.strategy, line.column, line.row] = Cell(
            format_signed(line.difference), (users or seeds) + below, line.difference, is_clear(line)
        )
    caption = f"{_title(comparison)} minus that of {comparison.reference_name}, user by user [95 % interval over users]"
    return _across(comparison, comparison.strategies[1:], cells, caption)


def _across(
    comparison: Comparison, strategies: list[str], cells: dict[tuple[str, str, str], Cell], caption: str
) -> Table:
    rows = list(dict.fromkeys(row for row, _ in comparison.cells))
    lines = []
    for i, column in enumerate(comparison.meta["columns"]):
        for strategy in strategies:
            line = [cells.get((strategy, column, row), MISSING) for row in rows]
            if any(cell is not MISSING for cell in line):
                title = COLUMNS[column][0]
                lines.append([_strategy(comparison, strategy), Cell(title, sort=f"{i} {title}"), *line])
    return Table(caption, ["strategy", "statistics", *(ROWS[row][0] for row in rows)], lines, names=2)


def matrix_long(comparison: Comparison) -> Table:
    """One line per cell of the matrix, with every interval."""
    lines = [
        [*_labels(comparison, line), _number(line.mean), *_intervals(line)]
        for line in comparison.matrix().dropna(subset="mean").itertuples()
    ]
    head = ["strategy", "test", "statistics", "mean", *INTERVALS]
    return Table("Every cell with its intervals over users and over seeds", head, lines, names=3)


def paired_long(comparison: Comparison) -> Table:
    """One line per difference to the reference, with every interval."""
    lines = [
        [
            *_labels(comparison, line),
            _number(line.difference, format_signed),
            *_intervals(line, format_signed),
            _number(line.p),
            _number(line.p_adjusted),
            *(MISSING if pd.isna(count) else Cell(str(count), sort=int(count)) for count in (line.better, line.worse)),
        ]
        for line in comparison.paired().dropna(subset="difference").itertuples()
    ]
    head = ["strategy", "test", "statistics", "difference", *INTERVALS, "p", "corrected p", "better", "worse"]
    return Table("Every difference with its intervals over users and over seeds", head, lines, names=3)


def domains(comparison: Comparison) -> Table | None:
    """Results by domain: strategies down, domains across; None for too few or too many domains."""
    frame = comparison.by_domain()
    if frame.empty:
        return None
    domains = sorted(frame["domain"].unique())
    cells = {
        (line.strategy, line.column, line.row, line.domain): Cell(
            format_number(line.mean), format_interval(line.ci_low, line.ci_high), line.mean
        )
        for line in frame.itertuples()
    }
    lines = [
        [
            _strategy(comparison, strategy),
            Cell(ROWS[row][0], sort=row),
            Cell(COLUMNS[column][0], sort=column),
            *(cells.get((strategy, column, row, domain), MISSING) for domain in domains),
        ]
        for row in ("own", "unseen")
        for column in comparison.meta["columns"]
        for strategy in comparison.strategies
        if any((strategy, column, row, domain) in cells for domain in domains)
    ]
    caption = f"{_title(comparison)} by domain: mean over the domain's users [95 % interval over users]"
    return Table(caption, ["strategy", "test", "statistics", *domains], lines, names=3)


def ownership(comparison: Comparison) -> Table:
    """Owner of each role, and the bytes received and sent for it per client and round."""
    owners = comparison.traffic()
    roles = list(dict.fromkeys(owners["role"]))
    lines = []
    for strategy, of_strategy in owners.groupby("strategy", sort=False):
        by_role = of_strategy.set_index("role")
        line = [_strategy(comparison, str(strategy))]
        for role in roles:
            line.append(MISSING if role not in by_role.index else _owner(by_role.loc[role]))
        down, up = of_strategy["bytes_down"].sum(), of_strategy["bytes_up"].sum()
        lines.append([*line, Cell(format_size(down + up), "\n" + _traffic(down, up), float(down + up))])
    caption = "Owner of each role, with the bytes received ↓ and sent ↑ per client and round"
    if REPEATED in roles:
        caption += f"; {REPEATED}: sent once more, because clients keep no model between messages"
    return Table(caption, ["strategy", *roles, "total"], lines)


def _owner(line: Any) -> Cell:
    return Cell(line["owner"], "\n" + _traffic(line["bytes_down"], line["bytes_up"]), line["owner"])


def _traffic(down: float, up: float) -> str:
    return f"{format_size(down)} ↓ {format_size(up)} ↑" if down or up else "not sent"


def starts(comparison: Comparison) -> Table | None:
    """Results of unseen users by initial statistics, before any adaptation."""
    head, *lines = starts_rows(comparison)
    if not lines:
        return None
    start = "by the statistics they start from, before adaptation"
    caption = f"{_title(comparison)} of unseen users {start} [95 % interval over users]"
    return Table(caption, head, [[Cell(text, sort=text) for text in line] for line in lines])


def newcomers(comparison: Comparison) -> Table:
    """Initial model of an unseen user, and the cost of a run."""
    starts = comparison.runs.groupby("strategy")["newcomer"].first()
    lines = [
        [
            _strategy(comparison, line.strategy),
            Cell(starts[line.strategy], sort=starts[line.strategy]),
            Cell(line.lr, sort=line.lr),
            Cell(f"{line.mean:.1f}", f"±{line.sd:.1f}" if math.isfinite(line.sd) else "", line.mean),
            Cell(f"{line.per_round:.2f}", sort=line.per_round),
        ]
        for line in comparison.seconds().itertuples()
    ]
    head = ["strategy", "unseen users start from", "learning rate", "seconds per run", "seconds per round"]
    return Table("Initial model of unseen users, and cost of a run (mean ± sd over seeds)", head, lines, names=2)


def skew(comparison: Comparison) -> Table | None:
    """Measured skew; unknown measures are shown with their names."""
    scalars = {name: value for name, value in comparison.shift.items() if not isinstance(value, list | dict)}
    if not scalars:
        return None
    lines = []
    for name, value in scalars.items():
        title, meaning = SKEW.get(name, (name.replace("_", " "), ""))
        cell = _number(value) if isinstance(value, int | float) else Cell(str(value)) if value else MISSING
        lines.append([Cell(title, sort=title), Cell(meaning, sort=meaning), cell])
    return Table("Differences between seen users", ["skew in", "measured as", "value"], lines, names=2)


def layers(comparison: Comparison) -> Table | None:
    """Distances between users' statistics by layer: the figure as numbers, for accessibility."""
    lines = []
    for i, layer in enumerate(comparison.shift.get("layers") or []):
        distance = np.array(layer["distance"], dtype=float)
        pairs = distance[np.triu_indices(len(distance), 1)]
        pairs = pairs[np.isfinite(pairs)]
        if len(pairs):
            cells = [_number(value) for value in (pairs.mean(), pairs.min(), pairs.max())]
            lines.append([Cell(layer["layer"], sort=i), *cells])
    if not lines:
        return None
    caption = "Distance between two users' statistics, over all pairs"
    return Table(caption, ["layer", "mean", "minimum", "maximum"], lines)


def facts(caption: str, kind: str, values: dict[str, Any]) -> Table | None:
    """Table of names and values; None if there are none."""
    lines = [[Cell(name.replace("_", " "), sort=name), _fact(value)] for name, value in values.items()]
    return Table(caption, [kind, "value"], lines, names=2) if lines else None


def _fact(value: Any) -> Cell:
    text = "–" if value is None or value == "" else f"{value:g}" if isinstance(value, float) else str(value)
    return Cell(text, sort=text)


def _strategy(comparison: Comparison, label: str) -> Cell:
    return Cell(comparison.names[label], sort=comparison.names[label])


def _labels(comparison: Comparison, line: Any) -> list[Cell]:
    return [
        _strategy(comparison, line.strategy),
        Cell(ROWS[line.row][0], sort=list(ROWS).index(line.row)),
        Cell(COLUMNS[line.column][0], sort=list(COLUMNS).index(line.column)),
    ]


def _intervals(line: Any, style: Any = format_number) -> list[Cell]:
    """The columns `INTERVALS` of a line of the matrix or the paired differences."""
    return [
        Cell(format_interval(line.ci_low, line.ci_high, style) or "–", sort=_finite_key(line.ci_low)),
        Cell(format_interval(line.seed_low, line.seed_high, style) or "–", sort=_finite_key(line.seed_low)),
        _number(line.seed_sd),
        Cell(str(line.n_users), sort=line.n_users),
        Cell(str(line.n_seeds), sort=line.n_seeds),
    ]


def _number(value: float, style: Any = format_number) -> Cell:
    return Cell(style(value), sort=_finite_key(value))


def _finite_key(value: float) -> float | str:
    """The sort key of a number; empty if it is not finite."""
    return value if math.isfinite(value) else ""
