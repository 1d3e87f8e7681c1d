"""Figures of a comparison. On a page's width, panels are next to each other; in a column or on a phone, they stack."""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedbn_simulations.report.style import INK, MARKERS, PAGE_WIDTH, PALETTE, direction, styled
from fedbn_simulations.results.comparison import Comparison
from fedbn_simulations.results.formatting import format_signed, metric_title
from fedbn_simulations.results.matrix import COLUMNS, ROWS

#: Maximum number of layers to draw, evenly spaced from the first to the last.
MAX_LAYERS = 8
MAX_LABEL_LENGTH = 26
MAX_PANELS = 12
"""Strategies with a panel of their own in the figure of paired differences; more have a line each."""


@styled
def matrix_figure(comparison: Comparison, metric: str = "", width: float = PAGE_WIDTH) -> Figure:
    """The evaluation matrix: one panel per row, a dot with its 95 % interval over users per cell."""
    matrix = comparison.matrix(metric).dropna(subset="mean")
    rows = list(dict.fromkeys(row for row, _ in comparison.cells))
    columns = [c for c in comparison.meta["columns"] if c in set(matrix["column"])]
    strategies = comparison.strategies
    down, across = _grid(len(rows), width, 1.75)
    height = down * (0.45 + 0.06 * max(6, len(columns) * len(strategies) + 2)) + 0.55
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(down, across, sharey=True, squeeze=False)
    shifts = dict(zip(columns, np.linspace(-0.24, 0.24, len(columns)) if len(columns) > 1 else [0.0]))
    for axes, row in zip(panels.flat, rows):
        for column, lines in matrix[matrix["row"] == row].groupby("column"):
            positions = [strategies.index(strategy) for strategy in lines["strategy"]]
            y, colors = np.array(positions) + shifts[column], [_color(position) for position in positions]
            axes.hlines(y, lines["ci_low"], lines["ci_high"], colors=colors, linewidth=1.2)
            marker = _marker(columns.index(column), INK)
            faces = "none" if marker["markerfacecolor"] == "none" else colors
            size = mpl.rcParams["lines.markersize"] ** 2
            axes.scatter(
                lines["mean"],
                y,
                size,
                marker=marker["marker"],
                facecolors=faces,
                edgecolors=colors,
                linewidths=1,
                zorder=3,
            )
        axes.set_title(ROWS[row][0])
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(3))
    _hide_rest(panels, len(rows))
    panels[0, 0].set_yticks(range(len(strategies)), [_short(comparison.names[s]) for s in strategies])
    panels[0, 0].set_ylim(len(strategies) - 0.5, -0.5)
    better = direction(comparison.higher_is_better(metric))
    figure.supxlabel(f"{metric_title(metric or comparison.metric)}, mean and 95 % interval over users ({better})")
    figure.legend(
        [Line2D([], [], linestyle="", **_marker(i, INK)) for i in range(len(columns))],
        [COLUMNS[c][0] for c in columns],
        loc="outside upper right",
        ncols=3,
        columnspacing=1.0,
        handletextpad=0.2,
    )
    return figure


@styled
def paired_figure(
    comparison: Comparison, row: str, column: str, metric: str = "", width: float = PAGE_WIDTH
) -> Figure | None:
    """Every user's difference to the reference; None if there is none.

    A mean hides differences between users: points below 0 are users harmed by the strategy. Each strategy has a panel
    with its users sorted, or a line if there are many.
    """
    by_strategy = {
        strategy: differences
        for strategy in comparison.strategies[1:]
        if len(differences := comparison.differences(strategy, row, column, metric))
    }
    if not by_strategy:
        return None
    lines = comparison.paired(metric).query("row == @row and column == @column").set_index("strategy")
    better = comparison.higher_is_better(metric)
    name = f"{metric_title(metric or comparison.metric)} minus {_short(comparison.reference_name)}"
    if len(by_strategy) > MAX_PANELS:
        return _strips(
            comparison, by_strategy, lines, f"{name}\n({'right' if better else 'left'} of 0 is better)", width
        )
    down, across = _grid(len(by_strategy), width, 1.7)
    figure = Figure(figsize=(min(width, 1.0 + 2.4 * across), 0.6 + 1.4 * down), layout="constrained")
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
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
        axes.set_title(_short(comparison.names[strategy], 20), fontsize=7.5 if across * 1.8 > width - 0.5 else None)
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4, integer=True))
        axes.yaxis.set_major_formatter(lambda value, _: format_signed(round(value, 6), 2))
    _hide_rest(panels, len(by_strategy))
    figure.supxlabel("users, sorted by their difference")
    figure.supylabel(f"{name}\n({'above' if better else 'below'} 0 is better)", multialignment="center")
    return figure


def _strips(
    comparison: Comparison, by_strategy: dict[str, pd.Series], lines: pd.DataFrame, label: str, width: float
) -> Figure:
    """One line per strategy: a point per user, and a bar with the mean and its 95 % interval."""
    figure = Figure(figsize=(width, 0.7 + 0.19 * len(by_strategy)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=INK, linewidth=0.8)
    # All strategies in one collection: artists take time, and there can be many strategies.
    y, users = np.arange(len(by_strategy)), [len(differences) for differences in by_strategy.values()]
    colors = np.repeat([_color(comparison.strategies.index(strategy)) for strategy in by_strategy], users)
    axes.scatter(pd.concat(by_strategy), np.repeat(y, users), 2.5**2, color=colors, alpha=0.5, linewidths=1)
    lines = lines.loc[list(by_strategy)]
    axes.hlines(y, lines["ci_low"], lines["ci_high"], color=INK, linewidth=1.2, zorder=3)
    axes.plot(lines["difference"], y, "|", color=INK, markersize=7, markeredgewidth=1.5, zorder=3)
    axes.set_yticks(range(len(by_strategy)), [_short(comparison.names[s]) for s in by_strategy])
    axes.set_ylim(len(by_strategy) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.xaxis.set_major_formatter(lambda value, _: format_signed(round(value, 6), 2))
    figure.supxlabel(label, multialignment="center")
    return figure


@styled
def convergence_figure(comparison: Comparison, width: float = PAGE_WIDTH) -> Figure | None:
    """Main metric and training loss by round: mean over seeds, band lowest to highest; None if not recorded."""
    main = next(iter(comparison.metrics))
    name, better = metric_title(main), direction(comparison.higher_is_better(main))
    titles = {
        "own": ("Own test", f"{name} ({better})"),
        "unseen": ("Unseen users", f"{name} ({better})"),
        "train_loss": ("Training", f"loss ({direction(False)})"),
    }
    # One evaluated round makes no curve; its value is in the matrix.
    shown = [name for name in titles if comparison.curves.dropna(subset=name)["round"].nunique() > 1]
    if not shown:
        return None
    down, across = _grid(len(shown), width, 2.3)
    legend_columns = max(1, int(width // 2.3))
    legend_rows = math.ceil(len(comparison.strategies) / legend_columns)
    figure = Figure(figsize=(width, 2.0 * down + 0.18 * legend_rows), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    handles: dict[str, Line2D] = {}
    for axes, name in zip(panels.flat, shown):
        lines = comparison.curves.dropna(subset=name)
        values = lines.groupby(["strategy", "round"])[name].agg(["mean", "min", "max"])
        bands, colors = [], []
        for strategy in lines["strategy"].unique():
            index = comparison.strategies.index(strategy)
            color, by_round = _color(index), values.loc[strategy]
            rounds, low, high = by_round.index.to_numpy(), by_round["min"].to_numpy(), by_round["max"].to_numpy()
            bands.append(np.column_stack([np.r_[rounds, rounds[::-1]], np.r_[low, high[::-1]]]))
            colors.append(color)
            (handles[strategy],) = axes.plot(
                by_round.index, by_round["mean"], color=color, **_stroke(index), markersize=3, markevery=0.2
            )
        axes.add_collection(PolyCollection(bands, facecolors=colors, alpha=0.15, linewidths=0))
        title, label = titles[name]
        axes.set_title(title)
        axes.set_xlabel("round")
        axes.set_ylabel(label)
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5, integer=True))
    _hide_rest(panels, len(shown))
    figure.legend(
        list(handles.values()),
        [_short(comparison.names[s]) for s in handles],
        loc="outside lower center",
        ncols=min(legend_columns, len(handles)),
    )
    return figure


@styled
def shift_figure(comparison: Comparison, width: float = PAGE_WIDTH) -> Figure | None:
    """Distance between users' normalization statistics, one map per layer; None if not measured."""
    layers = comparison.shift.get("layers") or []
    if not layers:
        return None
    if len(layers) > MAX_LAYERS:
        layers = [layers[i] for i in np.linspace(0, len(layers) - 1, MAX_LAYERS).round().astype(int)]
    down, across = _grid(len(layers), width, 1.6)
    figure = Figure(figsize=(min(width, 0.9 + 1.95 * across), 0.3 + 1.7 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    maps = [np.array(layer["distance"], dtype=float) for layer in layers]
    highest = max((float(np.nanmax(m)) for m in maps if np.isfinite(m).any()), default=0.0)
    for axes, layer, distance in zip(panels.flat, layers, maps):
        axes.imshow(distance, cmap="cividis", vmin=0, vmax=highest or 1, interpolation="nearest")
        axes.set_title(_short(layer["layer"]))
        _name_users(axes, layer["users"])
    _hide_rest(panels, len(layers))
    label = "distance (2-Wasserstein)"
    figure.colorbar(panels.flat[0].images[0], ax=panels, label=label).outline.set_visible(False)
    return figure


def _grid(count: int, width: float, panel: float) -> tuple[int, int]:
    """Rows and columns for panels of at least ``panel`` inches, with as few empty places as possible.

    >>> _grid(6, 7.2, 1.7), _grid(6, 3.5, 1.7), _grid(4, 3.5, 1.8)
    ((2, 3), (3, 2), (4, 1))
    """
    down = math.ceil(count / max(1, int(width // panel)))
    return down, math.ceil(count / down)


def _hide_rest(panels: Any, used: int) -> None:
    for axes in panels.flat[used:]:
        axes.set_visible(False)


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
