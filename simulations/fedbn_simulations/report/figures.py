"""The figures of a report, as inline SVG for the page and as files."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.figure import Figure

from fedbn.files import write_atomically
from fedbn_simulations.report import plots
from fedbn_simulations.results.comparison import Comparison
from fedbn_simulations.results.matrix import COLUMNS, ROWS


@dataclass(frozen=True)
class Picture:
    """A figure of the page; also saved as ``figures/<name>`` with ``.png``, ``.svg`` and ``.pdf``."""

    name: str
    title: str
    caption: str
    svg: Markup


def paired_pictures(comparison: Comparison) -> list[Picture]:
    """Paired differences on own test and unseen users, each in the first column that has the row."""
    pictures = []
    for row in ("own", "unseen"):
        column = next((c for r, c in comparison.cells if r == row), None)
        figure = plots.paired_figure(comparison, row, column) if column else None
        if figure is not None and column is not None:
            title = f"{ROWS[row][0]}, {COLUMNS[column][0]}: each user's difference to {comparison.reference}"
            caption = "One point per user. Line and band: mean and its 95 % interval. Below 0: worse for the user."
            pictures.append(_save(comparison, f"paired-{row}-{column}", title[0].upper() + title[1:], caption, figure))
    return pictures


def picture(comparison: Comparison, name: str, title: str, caption: str) -> Picture | None:
    """The figure ``matrix``, ``convergence`` or ``shift``; None if there is nothing to draw."""
    draw = {"matrix": plots.matrix_figure, "convergence": plots.convergence_figure, "shift": plots.shift_figure}[name]
    figure = draw(comparison)
    return None if figure is None else _save(comparison, name, title, caption, figure)


def _save(comparison: Comparison, name: str, title: str, caption: str, figure: Figure) -> Picture:
    """Save a figure in the results directory and return it for the page."""
    text = plots.svg(figure, name, f"{title}. {caption} The numbers are in the tables of this page.")
    for suffix, draw in ((".png", plots.png), (".pdf", plots.pdf)):
        write_atomically(comparison.directory / "figures" / f"{name}{suffix}", draw(figure))
    write_atomically(comparison.directory / "figures" / f"{name}.svg", text.encode())
    # Matplotlib's XML writer escapes the labels.
    return Picture(name, title, caption, Markup(text))
