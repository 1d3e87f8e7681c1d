"""Figures of an adaptation study: the metric over the stream, and each user's difference to the source."""

from __future__ import annotations

from itertools import product
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from fedbn.online.prequential_metrics import harm_limits
from fedbn_simulations.adaptation.cells import BOUNDS, SOURCE
from fedbn_simulations.adaptation.metric import StudyMetric
from fedbn_simulations.adaptation.tables import rows
from fedbn_simulations.report.style import INK, PALETTE, direction, styled
from fedbn_simulations.results.formatting import metric_title


@styled
def curve_figure(curves: pd.DataFrame, metric: StudyMetric) -> Figure:
    """A row of panels per strategy and start, a column per kind of stream; source and oracles in every panel.

    Args:
        curves: a `fedbn_simulations.adaptation.results.metric_curve`.
        metric: the study's metric.
    """
    low, high = (0, 1 if metric.is_share else None) if metric.of_windows != "loss" else (None, None)
    kinds = list(dict.fromkeys(curves["stream"]))
    starts = list(dict.fromkeys(zip(curves["strategy"], curves["start"], strict=True)))
    several = curves["strategy"].nunique() > 1
    names = [n for n in dict.fromkeys(curves["rule"]) if n != SOURCE and n not in BOUNDS]
    styles: dict[str, Any] = {SOURCE: {"color": INK, "linestyle": "--"}}
    styles |= {n: {"color": INK, "linestyle": line, "alpha": 0.5} for n, line in zip(BOUNDS, (":", "-."))}
    for i, name in enumerate(names):
        styles[name] = {"color": PALETTE[i % len(PALETTE)], "linestyle": ("-", "--", ":", "-.")[i // len(PALETTE) % 4]}
    figure = Figure(figsize=(2.2 + 3.6 * len(kinds), 0.6 + 2.7 * len(starts)), layout="constrained")
    panels = figure.subplots(len(starts), len(kinds), sharey=True, sharex="col", squeeze=False)
    for (row, (strategy, begin)), (column, kind) in product(enumerate(starts), enumerate(kinds)):
        axes = panels[row, column]
        panel = curves[(curves["strategy"] == strategy) & (curves["stream"] == kind)]
        panel = panel[(panel["start"] == begin) | panel["rule"].isin(BOUNDS)]
        for name, part in panel.groupby("rule", sort=False):
            axes.plot(part["window"], part[metric.of_windows], linewidth=1.3, label=name, **styles[str(name)])
            if name in names:
                band = part["window"], part["low"].clip(lower=low), part["high"].clip(upper=high)
                axes.fill_between(*band, color=styles[str(name)]["color"], alpha=0.12, linewidth=0)
        title = kind if begin == "cold" else f"{kind}, from {begin}"
        axes.set_title(f"{strategy}: {title}" if several else title)
        axes.grid(alpha=0.18)
    figure.supxlabel("window")
    better = direction(metric.higher_in_windows)
    text = f"fading {metric_title(metric.of_windows)} ({better})\nband: interval of the difference to source"
    figure.supylabel(text, multialignment="center")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    return figure


@styled
def users_figure(users: pd.DataFrame, found: pd.DataFrame, metric: StudyMetric) -> Figure:
    """Each user's difference to the source, one panel per kind of stream. Users to the left of zero got worse.

    Args:
        users: a `users_frame`.
        found: its `summary`.
        metric: the study's metric.
    """
    better = 1 if metric.higher_is_better else -1
    shown = [(name, by_kind) for name, by_kind in rows(found) if name.rpartition(": ")[2] != SOURCE]
    kinds = list(dict.fromkeys(found["stream"]))
    values = users.pivot_table(metric.name, ["strategy", "stream", "label", "user"], "seed")
    figure = Figure(figsize=(2.6 + 3.4 * len(kinds), 1.2 + 0.34 * len(shown)), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, sharex=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        for place, (_, by_kind) in enumerate(shown):
            line = by_kind[kind]
            of = values.loc[line["strategy"], kind]
            difference = (of.loc[line["rule"]] - of.loc[SOURCE]).stack()
            gains, source = better * difference, of.loc[SOURCE].stack().loc[difference.index]
            is_harmed = gains < -harm_limits(source, metric.is_share)
            for part, mark, color in ((gains[~is_harmed], "o", PALETTE[0]), (gains[is_harmed], "x", PALETTE[1])):
                axes.plot(part, [place] * len(part), mark, color=color, markersize=4, alpha=0.5)
            axes.plot([line["gain_low"], line["gain_high"]], [place - 0.3] * 2, color=INK, linewidth=1.6)
            axes.plot(line["gain"], place - 0.3, "|", color=INK, markersize=7)
            axes.annotate(
                f"{line['harmed']:.0%}", (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8
            )
        axes.axvline(0, color=INK, linestyle="--", linewidth=0.8)
        axes.set_title(kind)
        axes.annotate("harmed", (1.01, -0.75), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        axes.set_yticks(range(len(shown)), [name for name, _ in shown])
        axes.set_ylim(len(shown) - 0.4, -0.9)
        axes.grid(alpha=0.18)
    name = metric_title(metric.name)
    pair = f"{name} minus source" if metric.higher_is_better else f"source minus {name}"
    text = f"{pair} (right of 0 is better): one mark per user and seed, crosses are harmed; above: mean and interval"
    figure.supxlabel(text)
    return figure
