"""The figures of a report, as inline SVG for the page and as files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from markupsafe import Markup
from matplotlib.figure import Figure

from fedbn.files import write_atomically
from fedbn_simulations.report import plots
from fedbn_simulations.report.style import COLUMN_WIDTH, PAGE_WIDTH, pdf, png, svg
from fedbn_simulations.results.comparison import Comparison
from fedbn_simulations.results.matrix import COLUMNS, ROWS


@dataclass(frozen=True)
class Picture:
    """A figure of the page; also saved as ``figures/<name>`` with ``.png``, ``.svg`` and ``.pdf``.

    Attributes:
        name: name of its files.
        title: what it shows.
        caption: how to read it.
        svg: the figure in the width of a page.
        narrow: the figure in the width of a phone, with its panels stacked.
    """

    name: str
    title: str
    caption: str
    svg: Markup
    narrow: Markup


def paired_pictures(comparison: Comparison) -> list[Picture]:
    """Paired differences on own test and unseen users, each in the first column that has the row."""
    pictures = []
    for row in ("own", "unseen"):
        column = next((c for r, c in comparison.cells if r == row), None)
        if column is None:
            continue
        figure, narrow = _both(partial(plots.paired_figure, comparison, row, column))
        if figure is not None and narrow is not None:
            title = f"{ROWS[row][0]}, {COLUMNS[column][0]}: each user's difference to {comparison.reference_name}"
            caption = "One point per user. Line and band: mean and its 95 % interval. Below 0: worse for the user."
            pictures.append(
                _save(comparison, f"paired-{row}-{column}", title[0].upper() + title[1:], caption, figure, narrow)
            )
    return pictures


def picture(comparison: Comparison, name: str, title: str, caption: str) -> Picture | None:
    """The figure ``matrix``, ``convergence`` or ``shift``; None if there is nothing to draw."""
    known: dict[str, Callable[..., Figure | None]] = {
        "matrix": plots.matrix_figure,
        "convergence": plots.convergence_figure,
        "shift": plots.shift_figure,
    }
    figure, narrow = _both(partial(known[name], comparison))
    if figure is None or narrow is None:
        return None
    return _save(comparison, name, title, caption, figure, narrow)


def _both(draw: Callable[..., Figure | None]) -> tuple[Figure | None, Figure | None]:
    """The figure in the widths of a page and of a phone."""
    return draw(width=PAGE_WIDTH), draw(width=COLUMN_WIDTH)


def _save(comparison: Comparison, name: str, title: str, caption: str, figure: Figure, narrow: Figure) -> Picture:
    """Save a figure in the results directory and return it for the page."""
    description = f"{title}. {caption} The numbers are in the tables of this page."
    text = svg(figure, name, description)
    figure.set_layout_engine("none")  # the layout is done, and takes half of the time of a drawing
    for suffix, draw in ((".png", png), (".pdf", pdf)):
        write_atomically(comparison.directory / "figures" / f"{name}{suffix}", draw(figure))
    write_atomically(comparison.directory / "figures" / f"{name}.svg", text.encode())
    # Matplotlib's XML writer escapes the labels.
    return Picture(name, title, caption, Markup(text), Markup(svg(narrow, f"{name}-narrow", description)))
