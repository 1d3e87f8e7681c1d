"""Figures of claims: all verdicts; values of every arm of a study, and effects with their intervals."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedbn_simulations.claims.claim import Verdict
from fedbn_simulations.claims.verdicts import Entry
from fedbn_simulations.report.style import INK, MARKERS, PAGE_WIDTH, PALETTE, direction, styled
from fedbn_simulations.results.labels import readable

#: Color and marker of each verdict.
VERDICT_STYLE: dict[Verdict, tuple[str, str]] = {
    "holds": (PALETTE[2], "o"),
    "undecided": (PALETTE[4], "D"),
    "does not hold": (PALETTE[1], "s"),
}


@dataclass(frozen=True)
class Verdicted:
    """A claim's effect with its 95 % interval, threshold and verdict."""

    name: str
    mean: float
    low: float
    high: float
    threshold: float
    verdict: Verdict


@styled
def figure(entries: Sequence[Entry]) -> Figure:
    """One row per claim: values of every arm in the claim's drawing, and the effect with its interval.

    Several claims may have the same values. These are drawn once; the effects of the other claims take the whole row.
    """
    drawn: set[Any] = set()
    rows = []
    for entry in entries:
        key = entry.claim.run, entry.claim.arms, entry.claim.measure
        rows.append((entry, key not in drawn))
        drawn.add(key)
    heights = [_height(entry) if is_first else 0.9 for entry, is_first in rows]
    fig = Figure(figsize=(PAGE_WIDTH, sum(heights)), layout="constrained")
    grid = fig.add_gridspec(len(rows), 2, height_ratios=heights, width_ratios=[3, 2])
    for i, (entry, is_first) in enumerate(rows):
        c = entry.claim
        if is_first:
            left = fig.add_subplot(grid[i, 0])
            left.set_title(c.name)
            left.set_xlabel(_label(c.measure))
            {"dots": _dots, "curves": _curves, "grid": _grid}[c.drawing](left, entry)
        _effect(fig.add_subplot(grid[i, 1] if is_first else grid[i, :]), entry, title=not is_first)
    return fig


@styled
def verdicts_figure(entries: Sequence[Verdicted]) -> Figure:
    """Every claim's effect and interval, in units in which its threshold is at 0 and its interval 2 wide.

    Claims have different units. In the units of its own interval, a claim holds if its bar is to the right of 0.
    """
    order = list(VERDICT_STYLE)
    shown = sorted(entries, key=lambda e: (order.index(e.verdict), -_scaled(e)))
    fig = Figure(figsize=(PAGE_WIDTH, 0.7 + 0.125 * len(shown)), layout="constrained")
    axes = fig.subplots()
    limit = 6.0
    for y, entry in enumerate(shown):
        color, marker = VERDICT_STYLE[entry.verdict]
        center = _scaled(entry)
        inside = min(max(center, -limit), limit)
        if abs(center) < limit:
            axes.plot([max(center - 1, -limit), min(center + 1, limit)], [y, y], color=color, linewidth=1.6)
        axes.plot(inside, y, marker=marker if abs(center) < limit else (">" if center > 0 else "<"), color=color)
    axes.axvline(0, color=INK, linestyle="--", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [e.name for e in shown], fontsize=6.5)
    axes.set_ylim(len(shown) - 0.3, -0.7)
    axes.set_xlim(-limit - 0.3, limit + 0.3)
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("effect minus threshold, in half-widths of its 95 % interval (right of 0: the claim holds)")
    counts = {verdict: sum(e.verdict == verdict for e in shown) for verdict in order}
    handles = [Line2D([], [], color=color, marker=marker) for color, marker in VERDICT_STYLE.values()]
    fig.legend(handles, [f"{verdict} ({n})" for verdict, n in counts.items()], loc="outside upper left", ncols=3)
    return fig


def _readable(arm: str) -> str:
    """An arm with the readable names of strategies.

    >>> _readable("global-naive sorted")
    'FedAvg (naive BN) sorted'
    """
    return " ".join(map(readable, arm.split(" ")))


def _label(measure: str) -> str:
    """Label of an axis, with the direction of quantities of which it is known.

    >>> _label("own test"), _label("test error"), _label("growth per layer")
    ('own test (higher is better)', 'test error (lower is better)', 'growth per layer')
    """
    if re.search("error|gap|distance|deviation|spread|shift", measure):
        return f"{measure} ({direction(False)})"
    is_score = re.match("(mean )?accuracy|F-score|own test|global test|largest stable rate", measure)
    return f"{measure} ({direction(True)})" if is_score else measure


def _scaled(entry: Verdicted) -> float:
    half, above = (entry.high - entry.low) / 2, entry.mean - entry.threshold
    return above / half if half else math.copysign(math.inf, above) if above else 0.0


def _height(entry: Entry) -> float:
    of_dots = 0.7 + 0.24 * max(3, len(entry.claim.arms))
    return {"curves": 2.2, "grid": 3.2, "dots": of_dots}[entry.claim.drawing]


def _dots(axes: Axes, entry: Entry) -> None:
    for i, (_, values) in enumerate(entry.values.items()):
        color = PALETTE[i % len(PALETTE)]
        axes.plot(values, [i] * len(values), linestyle="", marker=MARKERS[i % len(MARKERS)], color=color, alpha=0.5)
        axes.plot([sum(values) / len(values)] * 2, [i - 0.3, i + 0.3], color=color, linewidth=2)
    axes.set_yticks(range(len(entry.values)), [_readable(arm) for arm in entry.values])
    axes.set_ylim(len(entry.values) - 0.5, -0.5)
    # Differences of less than a few percent of the values must not look large.
    low, high = axes.get_xlim()
    missing = max(abs(low), abs(high)) / 10 - (high - low)
    if missing > 0:
        axes.set_xlim(low - missing / 2, high + missing / 2)
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5))


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
        axes.plot(xs, means, marker=MARKERS[i % len(MARKERS)], markersize=4, color=color, label=_readable(name))
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
    axes.set_ylabel(_label(entry.claim.measure).replace(" (", "\n("))
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
    axes.set_xlabel(f"mean {_label(entry.claim.measure)}, in %")


def _effect(axes: Axes, entry: Entry, title: bool) -> None:
    e = entry.effect
    axes.axvline(entry.claim.threshold, color=INK, linestyle="--", linewidth=0.8)
    axes.plot([e.low, e.high], [0, 0], color=INK, linewidth=1.6)
    axes.plot(e.mean, 0, marker="o", color=INK)
    axes.plot(entry.effects, [0.3] * len(entry.effects), linestyle="", marker="|", color=INK, alpha=0.6)
    axes.set_ylim(-1, 1)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_title(f"{entry.claim.name}: {entry.verdict}" if title else entry.verdict)
    axes.set_xlabel(f"effect{' ' if title else chr(10)}(right of the dashed line: holds)")
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
    axes.xaxis.set_major_formatter("{x:g}")
