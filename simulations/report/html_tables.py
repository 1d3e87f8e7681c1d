"""The tables of a report's page: cells with what they say, what they say quietly, and what they are ordered by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from simulations.results.comparison import Comparison
from simulations.results.formatting import format_interval, format_number, format_p_value, format_signed, format_size
from simulations.results.matrix import COLUMNS, ROWS
from simulations.results.summary import is_clear, starts_rows

#: Measures of ``shift.json``: name -> (title, what it means).
SKEW = {
    "label_divergence": (
        "labels",
        "Jensen-Shannon divergence of a user's shares of classes to the pooled ones, mean over users, in bits: "
        "0 if all have the same, at most 1",
    ),
    "quantity_cv": ("quantity", "standard deviation of the users' number of examples over its mean"),
    "quantity_ratio": ("quantity", "most examples of a user over fewest"),
    "feature_w2": (
        "inputs",
        "2-Wasserstein distance between two users' input channels taken as Gaussian, mean over pairs, in pooled "
        "standard deviations",
    ),
}


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: what it says.
        small: said more quietly, its first line beside the text and the others below.
        sort: what the column is ordered by; empty cells stay last.
        strong: whether it stands out.
    """

    text: str
    small: str = ""
    sort: float | str = ""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table of the page; the first ``names`` columns hold words, the others numbers."""

    caption: str
    head: list[str]
    rows: list[list[Cell]]
    names: int = 1


MISSING = Cell("–")
SPREAD = ["over users", "over seeds", "sd of seeds", "users", "seeds"]


def plain(frame: pd.DataFrame, caption: str, names: Sequence[str]) -> Table | None:
    """A table of text; columns called ``names`` hold words."""
    if frame.empty:
        return None
    flat = frame.reset_index()
    words = [name for name in names if name in flat.columns]
    flat = flat[words + [name for name in flat.columns if name not in names]]
    lines = [
        [
            *(Cell(text, sort=text) for text in line[: len(words)]),
            *(_interval_cell(text) for text in line[len(words) :]),
        ]
        for line in flat.astype(str).to_numpy().tolist()
    ]
    return Table(caption, list(flat.columns), lines, names=len(words))


def _interval_cell(text: str) -> Cell:
    """A number, its interval said more quietly; a setting is one word or has no interval."""
    value, bracket_, rest = text.partition(" [")
    return Cell(value, (bracket_ + rest).strip(), _leading(value))


def _leading(text: str) -> float | str:
    """The number that a cell is, else the text; nothing for a missing cell."""
    try:
        return float(text.replace("−", "-"))
    except ValueError:
        return "" if text == "–" else text


def matrix(comparison: Comparison, metric: str = "accuracy") -> Table:
    """Strategies and statistics down, rows of the matrix across."""
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
    caption = f"{metric.replace('_', '-').capitalize()}: mean over users [95 % interval over users]"
    return _across(comparison, comparison.strategies, cells, caption)


def paired(comparison: Comparison) -> Table:
    """As the matrix: differences to the reference, with corrected p and the number of users on either side."""
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
    caption = f"Accuracy minus that of {comparison.reference}, user by user [95 % interval over users]"
    return _across(comparison, comparison.strategies[1:], cells, caption)


def _across(
    comparison: Comparison, strategies: list[str], cells: dict[tuple[str, str, str], Cell], caption: str
) -> Table:
    rows = list(dict.fromkeys(row for row, _ in comparison.cells))
    lines = []
    for place, column in enumerate(comparison.meta["columns"]):
        for strategy in strategies:
            line = [cells.get((strategy, column, row), MISSING) for row in rows]
            if any(cell is not MISSING for cell in line):
                title = COLUMNS[column][0]
                lines.append([Cell(strategy, sort=strategy), Cell(title, sort=f"{place} {title}"), *line])
    return Table(caption, ["strategy", "statistics", *(ROWS[row][0] for row in rows)], lines, names=2)


def matrix_long(comparison: Comparison) -> Table:
    """One line a cell of the matrix, with every interval."""
    lines = [
        [*_place(line), _number(line.mean), *_spread(line)]
        for line in comparison.matrix().dropna(subset="mean").itertuples()
    ]
    head = ["strategy", "test", "statistics", "mean", *SPREAD]
    return Table("Every cell with its intervals over users and over seeds", head, lines, names=3)


def paired_long(comparison: Comparison) -> Table:
    """One line a difference to the reference, with every interval."""
    lines = [
        [
            *_place(line),
            _number(line.difference, format_signed),
            *_spread(line, format_signed),
            _number(line.p),
            _number(line.p_adjusted),
            *(MISSING if pd.isna(count) else Cell(str(count), sort=int(count)) for count in (line.better, line.worse)),
        ]
        for line in comparison.paired().dropna(subset="difference").itertuples()
    ]
    head = ["strategy", "test", "statistics", "difference", *SPREAD, "p", "corrected p", "better", "worse"]
    return Table("Every difference with its intervals over users and over seeds", head, lines, names=3)


def domains(comparison: Comparison) -> Table | None:
    """Strategies down, domains across; None if there are too few or too many domains."""
    found = comparison.by_domain()
    if found.empty:
        return None
    domains = sorted(found["domain"].unique())
    cells = {
        (line.strategy, line.column, line.row, line.domain): Cell(
            format_number(line.mean), format_interval(line.ci_low, line.ci_high), line.mean
        )
        for line in found.itertuples()
    }
    lines = [
        [
            Cell(strategy, sort=strategy),
            Cell(ROWS[row][0], sort=row),
            Cell(COLUMNS[column][0], sort=column),
            *(cells.get((strategy, column, row, domain), MISSING) for domain in domains),
        ]
        for row in ("own", "unseen")
        for column in comparison.meta["columns"]
        for strategy in comparison.strategies
        if any((strategy, column, row, domain) in cells for domain in domains)
    ]
    caption = "Accuracy by domain: mean over the domain's users [95 % interval over users]"
    return Table(caption, ["strategy", "test", "statistics", *domains], lines, names=3)


def ownership(comparison: Comparison) -> Table:
    """Owner of each role, and what a client receives and sends for it in a round."""
    owners = comparison.traffic()
    roles = list(dict.fromkeys(owners["role"]))
    lines = []
    for strategy, of_strategy in owners.groupby("strategy", sort=False):
        by_role = of_strategy.set_index("role")
        line = [Cell(str(strategy), sort=str(strategy))]
        for role in roles:
            line.append(MISSING if role not in by_role.index else _owner(by_role.loc[role]))
        down, up = of_strategy["bytes_down"].sum(), of_strategy["bytes_up"].sum()
        lines.append([*line, Cell(format_size(down + up), "\n" + _ways(down, up), float(down + up))])
    caption = (
        "Owner of each role, and the bytes that a client receives ↓ and sends ↑ in a round; then what it hears and "
        "says besides, of which repeated is what it is told anew since it keeps nothing between messages"
    )
    return Table(caption, ["strategy", *roles, "in all"], lines)


def _owner(line: Any) -> Cell:
    return Cell(line["owner"], "\n" + _ways(line["bytes_down"], line["bytes_up"]), line["owner"])


def _ways(down: float, up: float) -> str:
    return f"{format_size(down)} ↓ {format_size(up)} ↑" if down or up else "stays"


def starts(comparison: Comparison) -> Table | None:
    """What unseen users reach from each start, before any adaptation."""
    head, *lines = starts_rows(comparison)
    if not lines:
        return None
    caption = "Accuracy of unseen users by the statistics they start from, before adaptation [95 % interval over users]"
    cells = [[Cell(text, sort=text) for text in line] for line in lines]
    return Table(caption, head, cells)


def newcomers(comparison: Comparison) -> Table:
    """What an unseen user starts from, and what a run costs."""
    starts = comparison.runs.groupby("strategy")["newcomer"].first()
    lines = [
        [
            Cell(line.strategy, sort=line.strategy),
            Cell(starts[line.strategy], sort=starts[line.strategy]),
            Cell(line.lr, sort=line.lr),
            Cell(f"{line.mean:.1f}", f"±{line.sd:.1f}" if math.isfinite(line.sd) else "", line.mean),
            Cell(f"{line.per_round:.2f}", sort=line.per_round),
        ]
        for line in comparison.seconds().itertuples()
    ]
    head = ["strategy", "a newcomer starts from", "learning rate", "seconds a run", "seconds a round"]
    return Table("What an unseen user starts from, and the cost of a run (mean ± sd over seeds)", head, lines, names=2)


def skew(comparison: Comparison) -> Table | None:
    """Measured skew; measures that this version does not know are shown by their name."""
    scalars = {name: value for name, value in comparison.shift.items() if not isinstance(value, list | dict)}
    if not scalars:
        return None
    lines = []
    for name, value in scalars.items():
        title, meaning = SKEW.get(name, (name.replace("_", " "), ""))
        shown = _number(value) if isinstance(value, int | float) else Cell(str(value)) if value else MISSING
        lines.append([Cell(title, sort=title), Cell(meaning, sort=meaning), shown])
    return Table("How far seen users are apart", ["skew of", "measured as", "value"], lines, names=2)


def layers(comparison: Comparison) -> Table | None:
    """Distances between users' statistics by layer, as numbers for those who do not see the map."""
    lines = []
    for place, layer in enumerate(comparison.shift.get("layers") or []):
        distance = np.array(layer["distance"], dtype=float)
        pairs = distance[np.triu_indices(len(distance), 1)]
        pairs = pairs[np.isfinite(pairs)]
        if len(pairs):
            shown = [_number(value) for value in (pairs.mean(), pairs.min(), pairs.max())]
            lines.append([Cell(layer["layer"], sort=place), *shown])
    if not lines:
        return None
    return Table("Distance between two users' statistics, over all pairs", ["layer", "mean", "least", "most"], lines)


def facts(caption: str, kind: str, known: dict[str, Any]) -> Table | None:
    """What is known by name; None for nothing."""
    lines = [[Cell(name.replace("_", " "), sort=name), _fact(value)] for name, value in known.items()]
    return Table(caption, [kind, "value"], lines, names=2) if lines else None


def _fact(value: Any) -> Cell:
    text = "–" if value is None or value == "" else f"{value:g}" if isinstance(value, float) else str(value)
    return Cell(text, sort=text)


def _place(line: Any) -> list[Cell]:
    return [
        Cell(line.strategy, sort=line.strategy),
        Cell(ROWS[line.row][0], sort=list(ROWS).index(line.row)),
        Cell(COLUMNS[line.column][0], sort=list(COLUMNS).index(line.column)),
    ]


def _spread(line: Any, style: Any = format_number) -> list[Cell]:
    """The columns `SPREAD` of a line of the matrix or of the paired differences."""
    return [
        Cell(format_interval(line.ci_low, line.ci_high, style) or "–", sort=_key(line.ci_low)),
        Cell(format_interval(line.seed_low, line.seed_high, style) or "–", sort=_key(line.seed_low)),
        _number(line.seed_sd),
        Cell(str(line.n_users), sort=line.n_users),
        Cell(str(line.n_seeds), sort=line.n_seeds),
    ]


def _number(value: float, style: Any = format_number) -> Cell:
    return Cell(style(value), sort=_key(value))


def _key(value: float) -> float | str:
    """What to sort by; nothing where there is no number."""
    return value if math.isfinite(value) else ""
