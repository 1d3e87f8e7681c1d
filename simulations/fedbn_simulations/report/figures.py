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
    """A figure of the page; also saved as ``figures/<name>.svg``, and as PNG and PDF if asked for.

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


def paired_pictures(comparison: Comparison, *, print_formats: bool = False) -> list[Picture]:
    """Paired differences on own test and unseen users, each in the first column that has the row.

    Args:
        comparison: the comparison.
        print_formats: also write PNG and PDF, which takes longer than drawing the page.
    """
    pictures = []
    for row in ("own", "unseen"):
        column = next((c for r, c in comparison.cells if r == row), None)
        if column is None:
            continue
        figure, narrow = _both(partial(plots.paired_figure, comparison, row, column))
        if figure is not None and narrow is not None:
            title = f"{ROWS[row][0]}, {COLUMNS[column][0]}: each user's difference to {comparison.reference_name}"
            caption = "One point per user. Line or mark: mean over users. Band or bar: its 95 % interval."
            found = _picture(f"paired-{row}-{column}", title[0].upper() + title[1:], caption, figure, narrow)
            _save(comparison, found, figure, print_formats)
            pictures.append(found)
    return pictures


def picture(
    comparison: Comparison, name: str, title: str, caption: str, *, print_formats: bool = False
) -> Picture | None:
    """The figure ``matrix``, ``convergence`` or ``shift``; None if there is nothing to draw."""
    known: dict[str, Callable[..., Figure | None]] = {
        "matrix": plots.matrix_figure,
        "convergence": plots.convergence_figure,
        "shift": plots.shift_figure,
    }
    figure, narrow = _both(partial(known[name], comparison))
    if figure is None or narrow is None:
        return None
    found = _picture(name, title, caption, figure, narrow)
    _save(comparison, found, figure, print_formats)
    return found


def _both(draw: Callable[..., Figure | None]) -> tuple[Figure | None, Figure | None]:
    """The figure in the widths of a page and of a phone."""
    return draw(width=PAGE_WIDTH), draw(width=COLUMN_WIDTH)


def _picture(name: str, title: str, caption: str, figure: Figure, narrow: Figure) -> Picture:
    description = f"{title}. {caption} The numbers are in the tables of this page."
    texts = (svg(figure, name, description), svg(narrow, f"{name}-narrow", description))
    return Picture(name, title, caption, *map(Markup, texts))  # Matplotlib's XML writer escapes the labels


def _save(comparison: Comparison, picture: Picture, figure: Figure, print_formats: bool) -> None:
    path = comparison.directory / "figures" / picture.name
    write_atomically(path.with_suffix(".svg"), picture.svg.encode())
    if print_formats:
        figure.set_layout_engine("none")  # the layout is done, and takes half of the time of a drawing
        for suffix, draw in ((".png", png), (".pdf", pdf)):
            write_atomically(path.with_suffix(suffix), draw(figure))
