"""Figures of a comparison: SVG that follows the page's colors, PNG and PDF for slides and papers.

The Okabe-Ito colors can be distinguished with common color deficiencies, and each has its own marker, so that no figure
depends on color alone. Text and axes have one color, which the SVG replaces by ``currentColor``, so that figures are
readable on light and dark pages. Pyplot is not used, so there is no global state.
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

from fedbn_simulations.results.comparison import Comparison
from fedbn_simulations.results.formatting import metric_title
from fedbn_simulations.results.matrix import COLUMNS, ROWS

P = ParamSpec("P")
T = TypeVar("T")

#: Okabe and Ito (2008) without yellow, which is invisible on white; black is the color of the reference.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
INK = "#1b1c1d"
#: Maximum number of layers to draw, evenly spaced from the first to the last.
MAX_LAYERS = 8
MAX_LABEL_LENGTH = 26

_STYLE: Any = {
    # Labels are user input and never formulas: "$x" must be shown as it is.
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
    # Keep text as text, so that it can be searched, read aloud and styled by the page.
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
    """The figure as inline SVG with unique ids and a description for screen readers.

    Args:
        figure: a figure of this module.
        name: prefix of all ids; unique on the page.
        description: text alternative of the figure.
    """
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", text)
    text = text.replace(INK, "currentColor").replace("'DejaVu Sans', ", "")
    width = round(96 * figure.get_size_inches()[0])
    # On a phone, figures scroll sideways, because their text would become too small to read.
    opening = f'<svg role="img" aria-label="{escape(description)}" style="min-width:{4 * width // 5}px"'
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 width="{width}"', text, count=1)
    return text.replace("<svg", opening, 1)


def pdf(figure: Figure) -> bytes:
    """The figure as PDF for LaTeX, with text as text."""
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
def matrix_figure(comparison: Comparison, metric: str = "") -> Figure:
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
            position = strategies.index(line.strategy)
            y = position + shifts[line.column]
            color = _color(position)
            axes.plot([line.ci_low, line.ci_high], [y, y], color=color, linewidth=1.2)
            axes.plot(line.mean, y, **_marker(columns.index(line.column), color))
        axes.set_title(ROWS[row][0])
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
    panels[0].set_yticks(range(len(strategies)), [_short(s) for s in strategies])
    panels[0].set_ylim(len(strategies) - 0.5, -0.5)
    figure.supxlabel(f"{metric_title(metric or comparison.metric)}, mean over users with 95 % interval", fontsize=9)
    figure.legend(
        [Line2D([], [], linestyle="", **_marker(i, INK)) for i in range(len(columns))],
        [COLUMNS[c][0] for c in columns],
        loc="outside upper right",
        ncols=3,
    )
    return figure


@_styled
def paired_figure(comparison: Comparison, row: str, column: str, metric: str = "") -> Figure | None:
    """Every user's difference to the reference, sorted, one panel per strategy; None if there is none.

    A mean hides differences between users: points below the line are users harmed by the strategy.
    """
    by_strategy = {
        strategy: differences
        for strategy in comparison.strategies[1:]
        if len(differences := comparison.differences(strategy, row, column, metric))
    }
    if not by_strategy:
        return None
    down = math.ceil(len(by_strategy) / 5)
    across = math.ceil(len(by_strategy) / down)
    figure = Figure(figsize=(min(8.6, 1.0 + 2.4 * across), 0.5 + 1.9 * down), layout="constrained")
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    lines = comparison.paired(metric).query("row == @row and column == @column").set_index("strategy")
    for axes, (strategy, differences) in zip(panels.flat, by_strategy.items()):
        index = comparison.strategies.index(strategy)
        color = _color(index)
        rank = np.arange(1, len(differences) + 1)
        line = lines.loc[strategy]
        axes.axhspan(line["ci_low"], line["ci_high"], color=color, alpha=0.2, linewidth=0)
        axes.axhline(line["difference"], color=color, linewidth=1)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.vlines(rank, 0, differences, color=color, linewidth=0.8, alpha=0.6)
        axes.plot(
            rank, differences, linestyle="", marker=MARKERS[(index - 1) % len(MARKERS)], color=color, markersize=3
        )
        axes.set_title(_short(strategy))
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4, integer=True))
    for axes in panels.flat[len(by_strategy) :]:
        axes.set_visible(False)
    figure.supxlabel("users, sorted by their difference", fontsize=9)
    figure.supylabel(f"{metric_title(metric or comparison.metric)} − {_short(comparison.reference)}", fontsize=9)
    return figure


@_styled
def convergence_figure(comparison: Comparison) -> Figure | None:
    """Main metric and training loss by round: mean over seeds, band lowest to highest; None if not recorded."""
    name = metric_title(next(iter(comparison.metrics)))
    titles = {"own": f"own test {name}", "unseen": f"unseen users' {name}", "train_loss": "training loss"}
    # One evaluated round makes no curve; its value is in the matrix.
    shown = [name for name in titles if comparison.curves.dropna(subset=name)["round"].nunique() > 1]
    if not shown:
        return None
    legend_rows = math.ceil(len(comparison.strategies) / (len(shown) + 1))
    figure = Figure(figsize=(max(4.4, 2.87 * len(shown)), 2.7 + 0.2 * legend_rows), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    handles: dict[str, Line2D] = {}
    for axes, name in zip(panels, shown):
        for strategy, lines in comparison.curves.dropna(subset=name).groupby("strategy", sort=False):
            index = comparison.strategies.index(strategy)
            color = _color(index)
            by_round = lines.groupby("round")[name].agg(["mean", "min", "max"])
            axes.fill_between(by_round.index, by_round["min"], by_round["max"], color=color, alpha=0.15, linewidth=0)
            (handles[strategy],) = axes.plot(
                by_round.index, by_round["mean"], color=color, **_stroke(index), markersize=3, markevery=0.2
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
    if len(layers) > MAX_LAYERS:
        layers = [layers[i] for i in np.linspace(0, len(layers) - 1, MAX_LAYERS).round().astype(int)]
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
    """Label the map with the names of the users if they fit, otherwise with their number."""
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    if len(users) <= 8:
        axes.set_yticks(range(len(users)), [_short(u, 10) for u in users], fontsize=7)
    else:
        axes.set_yticks([])
        axes.set_xlabel(f"{len(users)} users", fontsize=8)
    axes.tick_params(length=0)


def _color(index: int) -> str:
    """Black for the reference, then the colors of the palette in turn."""
    return INK if index == 0 else PALETTE[(index - 1) % len(PALETTE)]


def _stroke(index: int) -> dict[str, Any]:
    """Marker and line style of a strategy; the line style changes when the palette repeats."""
    if index == 0:
        return {"linestyle": "--", "marker": ""}
    cycle, color = divmod(index - 1, len(PALETTE))
    return {"linestyle": ("-", ":", "-.")[cycle % 3], "marker": MARKERS[color]}


def _marker(column: int, color: str) -> dict[str, Any]:
    """Marker of a column of the matrix."""
    return {"marker": "osD"[column % 3], "color": color, "markerfacecolor": ("none", color)[column % 3 == 0]}


def _short(label: str, length: int = MAX_LABEL_LENGTH) -> str:
    """Shorten a label; a leading underscore would hide it from matplotlib's legend.

    >>> _short("groupnorm:groups=4:affine=false"), len(_short("_x"))
    ('groupnorm:groups=4:affine…', 3)
    """
    text = label if len(label) <= length else label[: length - 1] + "…"
    return "\u200b" + text if text.startswith("_") else text
