"""Style of all figures: SVG that follows a page's colors, PNG and PDF for slides and papers.

The Okabe-Ito colors can be distinguished with common color deficiencies, and each has its own marker, so that no figure
depends on color alone. Text and axes have one color, which the SVG replaces by ``currentColor``, so that figures are
readable on light and dark pages. Figures are as wide as a column or a page of a paper. Pyplot is not used, so there is
no global state.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from functools import wraps
from html import escape
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from PIL import Image

P = ParamSpec("P")
T = TypeVar("T")

#: Okabe and Ito (2008) without yellow, which is invisible on white; black is the color of the reference.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
INK = "#1b1c1d"

#: Width of a figure in inches: one column of a paper with two columns (and a phone), and the whole page.
COLUMN_WIDTH = 3.5
PAGE_WIDTH = 7.2

STYLE: Any = {
    # Labels are user input and never formulas: "$x" must be shown as it is.
    "text.parse_math": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 8,
    "figure.labelsize": "medium",
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.18,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "grid.color": INK,
    # Keep text as text, so that it can be searched, read aloud and styled by the page.
    "svg.fonttype": "none",
    "svg.hashsalt": "fedbn",
}


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Draw in the style of this module."""

    @wraps(draw)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapped


def svg(figure: Figure, name: str, description: str) -> str:
    """The figure as inline SVG with unique ids and a description for screen readers.

    Args:
        figure: a figure that was drawn in this style.
        name: prefix of all ids; unique on the page.
        description: text alternative of the figure.
    """
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", text)
    text = text.replace(INK, "currentColor").replace("'DejaVu Sans', ", "")
    width = round(96 * figure.get_size_inches()[0])
    opening = f'<svg role="img" aria-label="{escape(description)}"'
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 width="{width}"', text, count=1)
    return text.replace("<svg", opening, 1)


def pdf(figure: Figure) -> bytes:
    """The figure as PDF for LaTeX, with text as text."""
    buffer = io.BytesIO()
    with mpl.rc_context({**STYLE, "pdf.fonttype": 42}):
        FigureCanvasPdf(figure).print_pdf(buffer, metadata=dict.fromkeys(("CreationDate", "Creator", "Producer")))
    return buffer.getvalue()


def png(figure: Figure) -> bytes:
    """The figure as PNG, dark on white, 200 dots per inch."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def small_png(figure: Figure) -> bytes:
    """The figure as PNG with 256 colors, a third of the size of `png`, for pages with many figures."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png(figure))) as image:
        few = image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def direction(higher_is_better: bool) -> str:
    """Which values of an axis are better.

    >>> direction(True)
    'higher is better'
    """
    return "higher is better" if higher_is_better else "lower is better"
