"""The report of a comparison: one HTML page that needs no network, its figures and tables as files beside it.

The page says the finding first, then shows what it rests on, then how to do it again. All text is escaped
by the template; all numbers come from the result directory.
"""

from __future__ import annotations

import math
import shlex
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from matplotlib.figure import Figure

from fedbn.data.packages import SOURCES
from simulations import plots
from simulations.numerals import bracket, number, signed
from simulations.results import COLUMNS, ROWS, Comparison
from simulations.side_by_side import SideBySide
from simulations.store import write_atomically
from simulations.tables import is_bound, is_clear, p_value, sentences, size, starts_rows

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


@dataclass(frozen=True)
class Picture:
    """A figure of the page, also written as ``figures/<name>`` with ``.png``, ``.svg`` and ``.pdf``."""

    name: str
    title: str
    caption: str
    svg: Markup


def write_report(directory: str | Path) -> Path:
    """Write ``report.html``, the matrix as ``matrix`` with ``.csv``, ``.tex`` and ``.md``, ``paired.csv`` and figures.

    Args:
        directory: of a comparison, finished or not.

    Returns:
        Path of the page.

    Raises:
        UserError: the directory is no comparison, is damaged, or holds no finished run.
    """
    comparison = Comparison.load(directory)
    directory = comparison.directory
    for suffix, write in FORMATS.values():
        (directory / f"matrix{suffix}").write_text(write(comparison), encoding="utf-8")
    comparison.paired().to_csv(directory / "paired.csv", index=False)
    (directory / "figures").mkdir(exist_ok=True)
    page = directory / "report.html"
    page.write_text(_template().render(_context(comparison)), encoding="utf-8")
    return page


def write_side_by_side(directories: Sequence[Path], page: Path) -> SideBySide:
    """Write several comparisons beside each other as one page.

    Raises:
        UserError: one of them cannot be read, or the page cannot be written.
    """
    found = SideBySide.load(directories)
    titles = ("strategy", "statistics", "comparison")
    context = {
        "title": f"{len(found.comparisons)} comparisons side by side",
        "answers": {name: sentences(comparison) for name, comparison in found.comparisons.items()},
        "matrix": _plain(found.wide(), "Accuracy: mean over users [95 % interval over users]", titles),
        "differences": _plain(
            found.differences_wide(),
            f"Accuracy minus that of {next(iter(found.comparisons))}, user by user [95 % interval over users]",
            titles,
        ),
        "settings": _plain(found.settings(), "What is not the same in all", ("setting",)),
        "exports": _exports(found),
        "again": shlex.join(["fedbn", "report", *map(str, directories)]),
    }
    write_atomically(page, _template("side_by_side.html.j2").render(context).encode())
    return found


def _plain(frame: pd.DataFrame, caption: str, names: Sequence[str]) -> Table | None:
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


def _exports(found: Comparison | SideBySide) -> list[tuple[str, str, str]]:
    """Name of the file, what it is and its content as a data URI: a page that is mailed has its tables with it."""
    return [
        (f"matrix{suffix}", name, "data:text/plain;base64," + b64encode(write(found).encode()).decode())
        for name, (suffix, write) in FORMATS.items()
    ]


#: Formats of the evaluation matrix: name -> (suffix, how it is made).
FORMATS: dict[str, tuple[str, Callable[[Comparison | SideBySide], str]]] = {
    "csv": (".csv", lambda found: found.long().to_csv(index=False)),
    "latex": (".tex", lambda found: found.to_latex()),
    "markdown": (".md", lambda found: found.to_markdown()),
}


@cache
def _template(name: str = "report.html.j2") -> Template:
    environment = Environment(
        loader=PackageLoader("simulations"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _context(comparison: Comparison) -> dict[str, Any]:
    meta = comparison.meta
    unseen = comparison.evaluations.query("row == 'unseen'")["user"].nunique()
    return {
        "meta": meta,
        "title": meta["title"],
        "exports": _exports(comparison),
        "sentences": sentences(comparison),
        "notices": comparison.notices,
        "facts": {
            "seen users": comparison.evaluations.query("row == 'own'")["user"].nunique(),
            **({"unseen users": unseen} if unseen else {}),
            "seeds": comparison.runs["seed"].nunique(),
            "runs": len(comparison.runs),
            "reference": comparison.reference,
        },
        "rows": [ROWS[row] for row in dict.fromkeys(row for row, _ in comparison.cells)],
        "columns": [COLUMNS[column] for column in dict.fromkeys(column for _, column in comparison.cells)],
        "bounds": [strategy for strategy in comparison.strategies if is_bound(strategy)],
        "matrix": _matrix(comparison),
        "matrix_f1": _matrix(comparison, "macro_f1"),
        "matrix_long": _matrix_long(comparison),
        "matrix_picture": _picture(
            comparison, "matrix", "Evaluation matrix", "Dots: mean over users. Bars: 95 % interval over users."
        ),
        "paired": _paired(comparison),
        "paired_long": _paired_long(comparison),
        "paired_pictures": _paired_pictures(comparison),
        "convergence": _picture(
            comparison,
            "convergence",
            "Convergence",
            "Lines: mean over seeds, each the mean over users. Bands: from the lowest to the highest seed.",
        ),
        "domains": _domains(comparison),
        "ownership": _ownership(comparison),
        "newcomers": _newcomers(comparison),
        "starts": _starts(comparison),
        "skew": _skew(comparison),
        "shift": _picture(
            comparison,
            "shift",
            "Distance between users' statistics",
            "Every user's training data pass through one network; each square compares two users, brighter is "
            "farther apart.",
        ),
        "layers": _layers(comparison),
        "settings": _facts("Settings of every run", "setting", meta["settings"]),
        "versions": _facts("Versions", "package", meta["versions"] | _given(meta, "code", "code digest")),
        "sources": _facts("SHA-256 of the data", "file", meta["sources"]),
        "citations": _citations(meta),
        "citation": cite(meta),
        "again": f"fedbn report {shlex.quote(str(comparison.directory))}",
    }


# ---------------------------------------------------------------- tables


def _matrix(comparison: Comparison, metric: str = "accuracy") -> Table:
    """Strategies and statistics down, rows of the matrix across."""
    best = comparison.clear_best(metric)
    cells = {
        (line.strategy, line.column, line.row): Cell(
            number(line.mean),
            bracket(line.ci_low, line.ci_high),
            line.mean,
            (line.strategy, line.row, line.column) in best,
        )
        for line in comparison.matrix(metric).dropna(subset="mean").itertuples()
    }
    caption = f"{metric.replace('_', '-').capitalize()}: mean over users [95 % interval over users]"
    return _across(comparison, comparison.strategies, cells, caption)


def _paired(comparison: Comparison) -> Table:
    """As the matrix: differences to the reference, with corrected p and the number of users on either side."""
    cells = {}
    for line in comparison.paired().dropna(subset="difference").itertuples():
        users, seeds = (
            bracket(*ends, signed) for ends in ((line.ci_low, line.ci_high), (line.seed_low, line.seed_high))
        )
        evidence = "over seeds" if seeds and not users else p_value(line.p_adjusted)
        below = "" if line.row == "worst" else f"\n{evidence}, {line.better}↑ {line.worse}↓"
        cells[line.strategy, line.column, line.row] = Cell(
            signed(line.difference), (users or seeds) + below, line.difference, is_clear(line)
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


def _matrix_long(comparison: Comparison) -> Table:
    lines = [
        [*_place(line), _number(line.mean), *_spread(line)]
        for line in comparison.matrix().dropna(subset="mean").itertuples()
    ]
    head = ["strategy", "test", "statistics", "mean", *SPREAD]
    return Table("Every cell with its intervals over users and over seeds", head, lines, names=3)


def _paired_long(comparison: Comparison) -> Table:
    lines = [
        [
            *_place(line),
            _number(line.difference, signed),
            *_spread(line, signed),
            _number(line.p),
            _number(line.p_adjusted),
            *(MISSING if pd.isna(count) else Cell(str(count), sort=int(count)) for count in (line.better, line.worse)),
        ]
        for line in comparison.paired().dropna(subset="difference").itertuples()
    ]
    head = ["strategy", "test", "statistics", "difference", *SPREAD, "p", "corrected p", "better", "worse"]
    return Table("Every difference with its intervals over users and over seeds", head, lines, names=3)


def _domains(comparison: Comparison) -> Table | None:
    """Strategies down, domains across; None if there are too few or too many domains."""
    found = comparison.by_domain()
    if found.empty:
        return None
    domains = sorted(found["domain"].unique())
    cells = {
        (line.strategy, line.column, line.row, line.domain): Cell(
            number(line.mean), bracket(line.ci_low, line.ci_high), line.mean
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


def _ownership(comparison: Comparison) -> Table:
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
        lines.append([*line, Cell(size(down + up), "\n" + _ways(down, up), float(down + up))])
    caption = (
        "Owner of each role, and the bytes that a client receives ↓ and sends ↑ in a round; then what it hears and "
        "says besides, of which repeated is what it is told anew since it keeps nothing between messages"
    )
    return Table(caption, ["strategy", *roles, "in all"], lines)


def _owner(line: Any) -> Cell:
    return Cell(line["owner"], "\n" + _ways(line["bytes_down"], line["bytes_up"]), line["owner"])


def _ways(down: float, up: float) -> str:
    return f"{size(down)} ↓ {size(up)} ↑" if down or up else "stays"


def _starts(comparison: Comparison) -> Table | None:
    """What unseen users reach from each start, before any adaptation."""
    head, *lines = starts_rows(comparison)
    if not lines:
        return None
    caption = "Accuracy of unseen users by the statistics they start from, before adaptation [95 % interval over users]"
    cells = [[Cell(text, sort=text) for text in line] for line in lines]
    return Table(caption, head, cells)


def _newcomers(comparison: Comparison) -> Table:
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


def _skew(comparison: Comparison) -> Table | None:
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


def _layers(comparison: Comparison) -> Table | None:
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


def _facts(caption: str, kind: str, facts: dict[str, Any]) -> Table | None:
    lines = [[Cell(name.replace("_", " "), sort=name), _fact(value)] for name, value in facts.items()]
    return Table(caption, [kind, "value"], lines, names=2) if lines else None


def _fact(value: Any) -> Cell:
    text = "–" if value is None or value == "" else f"{value:g}" if isinstance(value, float) else str(value)
    return Cell(text, sort=text)


def _given(meta: dict[str, Any], key: str, title: str) -> dict[str, Any]:
    return {title: meta[key]} if key in meta else {}


MISSING = Cell("–")
SPREAD = ["over users", "over seeds", "sd of seeds", "users", "seeds"]


def _place(line: Any) -> list[Cell]:
    return [
        Cell(line.strategy, sort=line.strategy),
        Cell(ROWS[line.row][0], sort=list(ROWS).index(line.row)),
        Cell(COLUMNS[line.column][0], sort=list(COLUMNS).index(line.column)),
    ]


def _spread(line: Any, style: Any = number) -> list[Cell]:
    """The columns `SPREAD` of a line of the matrix or of the paired differences."""
    return [
        Cell(bracket(line.ci_low, line.ci_high, style) or "–", sort=_key(line.ci_low)),
        Cell(bracket(line.seed_low, line.seed_high, style) or "–", sort=_key(line.seed_low)),
        _number(line.seed_sd),
        Cell(str(line.n_users), sort=line.n_users),
        Cell(str(line.n_seeds), sort=line.n_seeds),
    ]


def _number(value: float, style: Any = number) -> Cell:
    return Cell(style(value), sort=_key(value))


def _key(value: float) -> float | str:
    """What to sort by; nothing where there is no number."""
    return value if math.isfinite(value) else ""


# ---------------------------------------------------------------- figures and data


def _paired_pictures(comparison: Comparison) -> list[Picture]:
    """Own test and unseen users, each in the first column of the matrix that has it."""
    found = []
    for row in ("own", "unseen"):
        column = next((c for r, c in comparison.cells if r == row), None)
        figure = plots.paired_figure(comparison, row, column) if column else None
        if figure is not None and column is not None:
            title = f"{ROWS[row][0]}, {COLUMNS[column][0]}: each user's difference to {comparison.reference}"
            caption = "One point per user. Line and band: mean and its 95 % interval. Below 0: the user is worse off."
            found.append(_draw(comparison, f"paired-{row}-{column}", title[0].upper() + title[1:], caption, figure))
    return found


def _picture(comparison: Comparison, name: str, title: str, caption: str) -> Picture | None:
    draw = {
        "matrix": plots.matrix_figure,
        "convergence": plots.convergence_figure,
        "shift": plots.shift_figure,
    }[name]
    figure = draw(comparison)
    return None if figure is None else _draw(comparison, name, title, caption, figure)


def _draw(comparison: Comparison, name: str, title: str, caption: str, figure: Figure) -> Picture:
    """The figure for the page; as files it goes to the directory."""
    text = plots.svg(figure, name, f"{title}. {caption} The numbers are in the tables of this page.")
    for suffix, draw in ((".png", plots.png), (".pdf", plots.pdf)):
        (comparison.directory / "figures" / f"{name}{suffix}").write_bytes(draw(figure))
    (comparison.directory / "figures" / f"{name}.svg").write_text(text, encoding="utf-8")
    # Labels inside are escaped by matplotlib's XML writer.
    return Picture(name, title, caption, Markup(text))


def cite(meta: dict[str, Any]) -> str:
    """How to cite the software that made a comparison, as BibTeX."""
    version = meta["versions"].get("fedbn", "")
    digest = f", code digest {meta['code']}" if "code" in meta else ""
    return (
        "@software{fedbn,\n"
        "  author = {{The fedbn developers}},\n"
        "  title = {fedbn: federated and domain-adaptive batch normalisation},\n"
        f"  version = {{{version}}},\n"
        f"  year = {{{str(meta['created'])[:4]}}},\n"
        f"  note = {{{meta['scenario']}, seeds {', '.join(map(str, meta['seeds']))}{digest}}},\n"
        "}"
    )


def _citations(meta: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Package, whom to credit and licence of the data, as far as known."""
    scenario = str(meta["scenario"]).partition(":")[0]
    known: Iterable[Any] = (s for s in SOURCES.values() if s.label in meta["sources"] or s.scenario == scenario)
    return [(source.package, source.citation, source.licence) for source in known]
