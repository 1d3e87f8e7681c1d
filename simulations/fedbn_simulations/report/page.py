"""The report of a comparison: a self-contained HTML page, with its figures and tables as separate files.

The page shows the result first, then the evidence, then how to reproduce it. The template escapes all text; all numbers
come from the results directory.
"""

from __future__ import annotations

import shlex
from base64 import b64encode
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from fedbn.data.packages import SOURCES
from fedbn.files import write_atomically
from fedbn.scenarios.base import scenarios
from fedbn_simulations.report import html_tables
from fedbn_simulations.report.figures import paired_pictures, picture
from fedbn_simulations.results.comparison import Comparison
from fedbn_simulations.results.formatting import capitalize, metric_title
from fedbn_simulations.results.labels import data_name
from fedbn_simulations.results.matrix import COLUMNS, ROWS
from fedbn_simulations.results.side_by_side import SideBySide
from fedbn_simulations.results.summary import is_bound, sentences


def write_report(comparison: Comparison, *, print_formats: bool = False) -> Path:
    """Write ``report.html``, the matrix as ``matrix`` with ``.csv``, ``.tex`` and ``.md``, ``paired.csv`` and figures.

    The files are in the results directory of the comparison.

    Args:
        comparison: a comparison, finished or not.
        print_formats: write the figures not only as SVG, but also as PNG and PDF.

    Returns:
        Path of the page.

    Raises:
        UserError: the directory cannot be written.
    """
    directory = comparison.directory
    tables = {name: write(comparison) for name, (_, write) in FORMATS.items()}
    for name, text in tables.items():
        write_atomically(directory / _file_name(name), text.encode())
    write_atomically(directory / "paired.csv", comparison.paired().to_csv(index=False).encode())
    page = directory / "report.html"
    write_atomically(page, _template().render(_context(comparison, tables, print_formats)).encode())
    return page


def write_side_by_side(directories: Sequence[Path], page: Path, metric: str = "") -> SideBySide:
    """Write a page with several comparisons side by side.

    Raises:
        UserError: one of them cannot be read, or the page cannot be written.
    """
    loaded = SideBySide.load(directories, metric)
    title = capitalize(metric_title(loaded.metric))
    titles = ("strategy", "statistics", "comparison")
    context = {
        "title": f"{len(loaded.comparisons)} comparisons side by side",
        "answers": {name: sentences(comparison) for name, comparison in loaded.comparisons.items()},
        "matrix": html_tables.plain(
            loaded.wide(),
            f"{title}: mean over users [95 % interval over users]",
            titles,
        ),
        "differences": html_tables.plain(
            loaded.differences_wide(),
            f"{title} minus that of {next(iter(loaded.comparisons))}, user by user [95 % interval over users]",
            titles,
        ),
        "settings": html_tables.plain(loaded.settings(), "Settings that differ", ("setting",)),
        "exports": _exports({name: write(loaded) for name, (_, write) in FORMATS.items()}),
        "page_command": shlex.join(["fedbn", "report", *map(str, directories)]),
    }
    write_atomically(page, _template("side_by_side.html.j2").render(context).encode())
    return loaded


def _exports(tables: dict[str, str]) -> list[tuple[str, str, str]]:
    """File name, format and content as a data URI, so that the page contains its tables when it is mailed."""
    return [
        (_file_name(name), name, "data:text/plain;base64," + b64encode(text.encode()).decode())
        for name, text in tables.items()
    ]


def _file_name(name: str) -> str:
    return f"matrix{FORMATS[name][0]}"


#: Formats of the evaluation matrix: name -> (suffix, function that makes it).
FORMATS: dict[str, tuple[str, Callable[[Comparison | SideBySide], str]]] = {
    "csv": (".csv", lambda comparison: comparison.long().to_csv(index=False)),
    "latex": (".tex", lambda comparison: comparison.to_latex()),
    "markdown": (".md", lambda comparison: comparison.to_markdown()),
}


@cache
def _template(name: str = "report.html.j2") -> Template:
    environment = Environment(
        loader=PackageLoader("fedbn_simulations.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _context(comparison: Comparison, tables: dict[str, str], print_formats: bool) -> dict[str, Any]:
    draw = partial(picture, comparison, print_formats=print_formats)
    meta = comparison.meta
    unseen = comparison.evaluations.query("row == 'unseen'")["user"].nunique()
    digest = {"code digest": meta["code"]} if "code" in meta else {}
    return {
        "meta": meta,
        "title": meta["title"],
        "exports": _exports(tables),
        "sentences": sentences(comparison),
        "notices": comparison.notices,
        "facts": {
            "seen users": comparison.evaluations.query("row == 'own'")["user"].nunique(),
            **({"unseen users": unseen} if unseen else {}),
            "seeds": comparison.runs["seed"].nunique(),
            "runs": len(comparison.runs),
            "reference": comparison.reference_name,
            "engine": comparison.engine,
            **({"CPU seconds": comparison.time} if comparison.time else {}),
        },
        "rows": [ROWS[row] for row in dict.fromkeys(row for row, _ in comparison.cells)],
        "columns": [COLUMNS[column] for column in dict.fromkeys(column for _, column in comparison.cells)],
        "bounds": [comparison.names[strategy] for strategy in comparison.strategies if is_bound(strategy)],
        "brief": html_tables.brief(comparison),
        "strategies": html_tables.strategies_table(comparison),
        "matrix": html_tables.matrix(comparison),
        "matrix_second": html_tables.matrix(comparison, _second_metric(comparison)),
        "matrix_long": html_tables.matrix_long(comparison),
        "matrix_picture": draw("matrix", "Evaluation matrix", "Dots: mean over users. Bars: 95 % interval over users."),
        "paired": html_tables.paired(comparison),
        "paired_long": html_tables.paired_long(comparison),
        "paired_pictures": paired_pictures(comparison, print_formats=print_formats),
        "convergence": draw(
            "convergence",
            "Convergence",
            "Lines: mean over seeds, each the mean over users. Bands: from the lowest to the highest seed.",
        ),
        "domains": html_tables.domains(comparison),
        "ownership": html_tables.ownership(comparison),
        "newcomers": html_tables.newcomers(comparison),
        "starts": html_tables.starts(comparison),
        "skew": html_tables.skew(comparison),
        "shift": draw(
            "shift",
            "Distance between users' statistics",
            "Every user's training data are passed through the same network. Each square compares two users; brighter "
            "squares are larger distances.",
        ),
        "layers": html_tables.layers(comparison),
        "settings": html_tables.facts("Settings of every run", "setting", meta["settings"]),
        "versions": html_tables.facts("Versions", "package", meta["versions"] | digest),
        "sources": html_tables.facts("SHA-256 of the data", "file", meta["sources"]),
        "citations": _citations(meta),
        "citation": cite(meta),
        "page_command": f"fedbn report {shlex.quote(str(comparison.directory))}",
    }


def _second_metric(comparison: Comparison) -> str:
    """The first metric besides the displayed one, which an app may have alone."""
    return next((metric for metric in comparison.metrics if metric != comparison.metric), comparison.metric)


def cite(meta: dict[str, Any]) -> str:
    """BibTeX entry for the software that produced a comparison."""
    version = meta["versions"].get("fedbn", "")
    digest = f", code digest {meta['code']}" if "code" in meta else ""
    return (
        "@software{fedbn,\n"
        "  author = {{The fedbn developers}},\n"
        "  title = {fedbn: federated and domain-adaptive batch normalization},\n"
        f"  version = {{{version}}},\n"
        f"  year = {{{str(meta['created'])[:4]}}},\n"
        f"  note = {{{data_name(meta['scenario'])}, seeds {', '.join(map(str, meta['seeds']))}{digest}}},\n"
        "}"
    )


def _citations(meta: dict[str, Any]) -> list[tuple[str, str]]:
    """Citation of the data, and where they are from with their license, if known."""
    name = str(meta["scenario"]).partition(":")[0]
    sources = (s for s in SOURCES.values() if s.label in meta["sources"] or s.scenario == name)
    found = [(s.citation, f"From {s.package}; license: {s.license}.") for s in sources]
    scenario = scenarios().get(name)
    if citation := getattr(scenario, "citation", ""):
        found.append((citation, f"License: {getattr(scenario, 'license', 'unknown')}."))
    return found
