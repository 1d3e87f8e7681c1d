"""Figures of a comparison, as SVG that follows the page's colors and as PNG for slides and papers.

Okabe-Ito colors, distinct under the common color deficiencies, each with its own marker, so that no
figure depends on color alone. Text and axes are drawn in one ink which the SVG turns into
``currentColor``: the same figure is readable on a light and on a dark page. No pyplot, hence no global state.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from functools import wraps
from html import escape
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from simulations.results.comparison import Comparison
from simulations.results.matrix import COLUMNS, ROWS

P = ParamSpec("P")
T = TypeVar("T")

#: Okabe and Ito (2008) without yellow, which vanishes on white; black is the ink of the reference.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
INK = "#1b1c1d"
#: At most this many layers are drawn, evenly spaced from the first to the last.
LAYERS = 8
LONGEST_LABEL = 26

_STYLE: Any = {
    # A label is a user's text and never a formula: "$x" must neither vanish nor crash.
    "text.parse_math": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 9,
    "axes.titlesize": 9,
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
    # Text stays text: it can be searched, read aloud, and takes the page's color.
    "svg.fonttype": "none",
    "svg.hashsalt": "fedbn",
}


def _styled(draw: Callable[P, T]) -> Callable[P, T]:
    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> T:
        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


def svg(figure: Figure, name: str, description: str) -> str:
    """The figure as inline SVG: no ids shared with other figures, and a description for screen readers.

    Args:
        figure: one of this module's.
        name: prefix of all ids, unique on the page.
        description: what the figure shows, in words.
    """
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", text)
    text = text.replace(INK, "currentColor").replace("'DejaVu Sans', ", "")
    width = round(96 * figure.get_size_inches()[0])
    # On a phone a figure scrolls sideways rather than shrink its text below what can be read.
    opening = f'<svg role="img" aria-label="{escape(description)}" style="min-width:{4 * width // 5}px"'
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 width="{width}"', text, count=1)
    return text.replace("<svg", opening, 1)


def pdf(figure: Figure) -> bytes:
    """The figure as PDF for LaTeX, its text as text."""
    buffer = io.BytesIO()
    with mpl.rc_context({**_STYLE, "pdf.fonttype": 42}):
        FigureCanvasPdf(figure).print_pdf(buffer, metadata=dict.fromkeys(("CreationDate", "Creator", "Producer")))
    return buffer.getvalue()


def png(figure: Figure) -> bytes:
    """The figure as PNG, dark on white, 200 dots per inch."""
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


@_styled
def matrix_figure(comparison: Comparison, metric: str = "accuracy") -> Figure:
    """The evaluation matrix: one panel per row, a dot with its 95 % interval over users per cell."""
    matrix = comparison.matrix(metric).dropna(subset="mean")
    rows = list(dict.fromkeys(row for row, _ in comparison.cells))
    columns = [c for c in comparison.meta["columns"] if c in set(matrix["column"])]
    strategies = comparison.strategies
    figure = Figure(figsize=(8.6, 0.9 + 0.42 * len(strategies)), layout="constrained")
    panels = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
    shifts = dict(zip(columns, np.linspace(-0.24, 0.24, len(columns)) if len(columns) > 1 else [0.0]))
    for axes, row in zip(panels, rows):
        for line in matrix[matrix["row"] == row].itertuples():
            place = strategies.index(line.strategy)
            y = place + shifts[line.column]
            color = _color(place)
            axes.plot([line.ci_low, line.ci_high], [y, y], color=color, linewidth=1.2)
            axes.plot(line.mean, y, **_look(columns.index(line.column), color))
        axes.set_title(ROWS[row][0])
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
    panels[0].set_yticks(range(len(strategies)), [_short(s) for s in strategies])
    panels[0].set_ylim(len(strategies) - 0.5, -0.5)
    figure.supxlabel(f"{metric.replace('_', '-')}, mean over users with 95 % interval", fontsize=9)
    figure.legend(
        [Line2D([], [], linestyle="", **_look(i, INK)) for i in range(len(columns))],
        [COLUMNS[c][0] for c in columns],
        loc="outside upper right",
        ncols=3,
    )
    return figure


@_styled
def paired_figure(comparison: Comparison, row: str, column: str, metric: str = "accuracy") -> Figure | None:
    """Every user's difference to the reference, sorted, one panel per strategy; None if there is none.

    A mean hides who pays for it: points below the line are users that the strategy harms.
    """
    found = {
        strategy: differences
        for strategy in comparison.strategies[1:]
        if len(differences := comparison.differences(strategy, row, column, metric))
    }
    if not found:
        return None
    down = math.ceil(len(found) / 5)
    across = math.ceil(len(found) / down)
    figure = Figure(figsize=(min(8.6, 1.0 + 2.4 * across), 0.5 + 1.9 * down), layout="constrained")
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    lines = comparison.paired(metric).query("row == @row and column == @column").set_index("strategy")
    for axes, (strategy, differences) in zip(panels.flat, found.items()):
        place = comparison.strategies.index(strategy)
        color = _color(place)
        rank = np.arange(1, len(differences) + 1)
        line = lines.loc[strategy]
        axes.axhspan(line["ci_low"], line["ci_high"], color=color, alpha=0.2, linewidth=0)
        axes.axhline(line["difference"], color=color, linewidth=1)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.vlines(rank, 0, differences, color=color, linewidth=0.8, alpha=0.6)
        axes.plot(
            rank,
            differences,
            linestyle="",
            marker=MARKERS[(place - 1) % len(MARKERS)],
            color=color,
            markersize=3,
        )
        axes.set_title(_short(strategy))
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4, integer=True))
    for axes in panels.flat[len(found) :]:
        axes.set_visible(False)
    figure.supxlabel("users, sorted by their difference", fontsize=9)
    figure.supylabel(f"{metric.replace('_', '-')} − {_short(comparison.reference)}", fontsize=9)
    return figure


@_styled
def convergence_figure(comparison: Comparison) -> Figure | None:
    """Accuracy and training loss by round: mean over seeds, band lowest to highest; None if not recorded."""
    titles = {"own": "own test accuracy", "unseen": "unseen users' accuracy", "train_loss": "training loss"}
    # One evaluated round is no curve; its number is in the matrix.
    shown = [name for name in titles if comparison.curves.dropna(subset=name)["round"].nunique() > 1]
    if not shown:
        return None
    legend_rows = math.ceil(len(comparison.strategies) / (len(shown) + 1))
    figure = Figure(figsize=(max(4.4, 2.87 * len(shown)), 2.7 + 0.2 * legend_rows), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    handles: dict[str, Line2D] = {}
    for axes, name in zip(panels, shown):
        for strategy, lines in comparison.curves.dropna(subset=name).groupby("strategy", sort=False):
            place = comparison.strategies.index(strategy)
            color = _color(place)
            by_round = lines.groupby("round")[name].agg(["mean", "min", "max"])
            axes.fill_between(by_round.index, by_round["min"], by_round["max"], color=color, alpha=0.15, linewidth=0)
            (handles[strategy],) = axes.plot(
                by_round.index, by_round["mean"], color=color, **_stroke(place), markersize=3, markevery=0.2
            )
        axes.set_title(titles[name])
        axes.set_xlabel("round")
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5, integer=True))
    figure.legend(
        list(handles.values()),
        [_short(s) for s in handles],
        loc="outside lower center",
        ncols=min(len(shown) + 1, len(handles)),
    )
    return figure


@_styled
def shift_figure(comparison: Comparison) -> Figure | None:
    """Distance between users' normalization statistics, one map per layer; None if not measured."""
    layers = comparison.shift.get("layers") or []
    if not layers:
        return None
    if len(layers) > LAYERS:
        layers = [layers[i] for i in np.linspace(0, len(layers) - 1, LAYERS).round().astype(int)]
    across = min(4, len(layers))
    down = math.ceil(len(layers) / across)
    figure = Figure(figsize=(0.9 + 1.95 * across, 0.3 + 2.0 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    maps = [np.array(layer["distance"], dtype=float) for layer in layers]
    highest = max((float(np.nanmax(m)) for m in maps if np.isfinite(m).any()), default=0.0)
    for axes, layer, distance in zip(panels.flat, layers, maps):
        axes.imshow(distance, cmap="cividis", vmin=0, vmax=highest or 1, interpolation="nearest")
        axes.set_title(_short(layer["layer"]))
        _name_users(axes, layer["users"])
    for axes in panels.flat[len(layers) :]:
        axes.set_visible(False)
    figure.colorbar(panels.flat[0].images[0], ax=panels, label="distance", shrink=0.8).outline.set_visible(False)
    return figure


def _name_users(axes: Axes, users: list[str]) -> None:
    """Names beside the map where they fit, else their number."""
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    if len(users) <= 8:
        axes.set_yticks(range(len(users)), [_short(u, 10) for u in users], fontsize=7)
    else:
        axes.set_yticks([])
        axes.set_xlabel(f"{len(users)} users", fontsize=8)
    axes.tick_params(length=0)


def _color(place: int) -> str:
    """Ink for the reference, then the palette in turn."""
    return INK if place == 0 else PALETTE[(place - 1) % len(PALETTE)]


def _stroke(place: int) -> dict[str, Any]:
    """Marker and dash of a strategy; the dash changes when the palette starts again."""
    if place == 0:
        return {"linestyle": "--", "marker": ""}
    again, index = divmod(place - 1, len(PALETTE))
    return {"linestyle": ("-", ":", "-.")[again % 3], "marker": MARKERS[index]}


def _look(column: int, color: str) -> dict[str, Any]:
    """Marker of a treatment of the statistics."""
    return {
        "marker": "osD"[column % 3],
        "color": color,
        "markerfacecolor": ("none", color)[column % 3 == 0],
    }


def _short(label: str, longest: int = LONGEST_LABEL) -> str:
    """A label that fits; a leading underscore would hide it from matplotlib's legend.

    >>> _short("groupnorm:groups=4:affine=false"), len(_short("_x"))
    ('groupnorm:groups=4:affine…', 3)
    """
    text = label if len(label) <= longest else label[: longest - 1] + "…"
    return "\u200b" + text if text.startswith("_") else text
