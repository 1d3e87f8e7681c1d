"""The figure of a study: values of every arm, and effects with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedbn_simulations.claims.verdicts import Entry
from fedbn_simulations.report.plots import INK, MARKERS, PALETTE


def figure(entries: Sequence[Entry]) -> Figure:
    """One row per claim: values of every arm in the claim's drawing, and the effect with its interval.

    The same values are drawn only once for several claims.
    """
    with mpl.rc_context(
        {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
    ):
        drawn: dict[Any, str] = {}
        firsts = [drawn.setdefault((e.claim.run, e.claim.arms, e.claim.measure), e.claim.name) for e in entries]
        heights = [_height(e) if first == e.claim.name else 0.9 for e, first in zip(entries, firsts, strict=True)]
        fig = Figure(figsize=(8.6, sum(heights)), layout="constrained")
        panels = fig.subplots(
            len(entries), 2, squeeze=False, gridspec_kw={"height_ratios": heights, "width_ratios": [3, 2]}
        )
        for (left, right), entry, first in zip(panels, entries, firsts, strict=True):
            _effect(right, entry)
            c = entry.claim
            left.set_title(c.name, loc="left", fontweight="bold")
            if first != c.name:
                left.set_axis_off()
                left.text(0, 0.5, f"{c.measure}: see {first} above", transform=left.transAxes)
                continue
            left.set_xlabel(c.measure)
            {"dots": _dots, "curves": _curves, "grid": _grid}[c.drawing](left, entry)
        return fig


def _height(entry: Entry) -> float:
    of_dots = 0.7 + 0.24 * max(3, len(entry.claim.arms))
    return {"curves": 2.2, "grid": 3.2, "dots": of_dots}[entry.claim.drawing]


def _dots(axes: Axes, entry: Entry) -> None:
    for i, (_, values) in enumerate(entry.values.items()):
        color = PALETTE[i % len(PALETTE)]
        axes.plot(values, [i] * len(values), linestyle="", marker=MARKERS[i % len(MARKERS)], color=color, alpha=0.5)
        axes.plot([sum(values) / len(values)] * 2, [i - 0.3, i + 0.3], color=color, linewidth=2)
    axes.set_yticks(range(len(entry.values)), list(entry.values))
    axes.set_ylim(len(entry.values) - 0.5, -0.5)


def _curves(axes: Axes, entry: Entry) -> None:
    """Mean over seeds with a band from lowest to highest; an axis with a wide range of values is logarithmic."""
    series: dict[str, list[tuple[float, list[float]]]] = {}
    for arm, values in entry.values.items():
        name, _, number = arm.rpartition(" ")
        series.setdefault(name, []).append((float(number), values))
    for i, (name, points) in enumerate(series.items()):
        points.sort()
        xs, color = [x for x, _ in points], PALETTE[i % len(PALETTE)]
        axes.fill_between(xs, [min(v) for _, v in points], [max(v) for _, v in points], color=color, alpha=0.12, lw=0)
        means = [sum(v) / len(v) for _, v in points]
        axes.plot(xs, means, marker=MARKERS[i % len(MARKERS)], markersize=4, color=color, label=name)
    numbers = sorted({x for points in series.values() for x, _ in points})
    if numbers[0] > 0 and numbers[-1] > 5 * numbers[0]:
        axes.set_xscale("log")
    axes.set_xticks(numbers, [f"{x:g}" for x in numbers])
    axes.minorticks_off()
    all_values = [v for points in series.values() for _, values in points for v in values]
    if min(all_values) > 0 and max(all_values) > 100 * min(all_values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(entry.claim.axis)
    axes.set_ylabel(entry.claim.measure)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _grid(axes: Axes, entry: Entry) -> None:
    """Means over seeds, as colors and numbers."""
    pairs = [arm.split(" @ ") for arm in entry.values]
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*pairs, strict=True))
    table = np.full((len(rows), len(columns)), np.nan)
    for (row, column), values in zip(pairs, entry.values.values(), strict=True):
        table[rows.index(row), columns.index(column)] = sum(values) / len(values)
    axes.imshow(table, cmap="cividis", aspect="auto")
    middle = (np.nanmin(table) + np.nanmax(table)) / 2
    for (i, j), value in np.ndenumerate(table):
        if np.isfinite(value):
            color = "white" if value < middle else "black"
            axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(f"mean {entry.claim.measure}, %")


def _effect(axes: Axes, entry: Entry) -> None:
    e = entry.effect
    axes.axvline(entry.claim.threshold, color=INK, linestyle="--", linewidth=0.8)
    axes.plot([e.low, e.high], [0, 0], color=INK, linewidth=1.6)
    axes.plot(e.mean, 0, marker="o", color=INK)
    axes.plot(entry.effects, [0.3] * len(entry.effects), linestyle="", marker="|", color=INK, alpha=0.6)
    axes.set_ylim(-1, 1)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_title(f"{entry.verdict} (dashed: threshold)", loc="left")
    axes.set_xlabel("effect")
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
    axes.xaxis.set_major_formatter("{x:g}")
