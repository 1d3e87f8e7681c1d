"""Insert a comparison's tables into a document between two markers, so that no number is typed by hand."""

from __future__ import annotations

import math
import re
from pathlib import Path

from fedbn.errors import UserError
from fedbn.federation.traffic import REPEATED
from fedbn.files import write_atomically
from fedbn_simulations.report.plots import paired_figure
from fedbn_simulations.report.style import png
from fedbn_simulations.results.comparison import Comparison
from fedbn_simulations.results.formatting import capitalize, format_number, format_size, markdown_table, metric_title
from fedbn_simulations.results.matrix import BRIEF_CELLS
from fedbn_simulations.results.summary import answer, is_bound, starts_rows

MAX_BRIEF = 5
"""Strategies of a brief table."""


def update_document(
    directory: Path, document: Path, *, full: bool = False, brief: bool = False, metric: str = ""
) -> None:
    """Replace the text between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; NAME is the directory's name.

    If the document shows ``NAME.png``, the plot of paired differences is drawn there.

    Args:
        directory: results directory of a comparison.
        document: a Markdown file.
        metric: the metric to show; the comparison's by default.
        full: also insert the results of unseen users by initial statistics, and the costs.
        brief: insert only means of the first strategies, with readable names.

    Raises:
        UserError: the document or its markers are missing, or there is nothing to draw.
    """
    name = directory.resolve().name
    replace_block(document, name)  # fail before any computation
    comparison = Comparison.load(directory, metric)
    seeds = len(comparison.meta["seeds"])
    seeds_text = "one seed" if seeds == 1 else f"{seeds} paired seeds"
    made = f"{seeds_text}; made by `{comparison.meta['command']}`."
    name_of_metric = metric_title(comparison.metric)
    parts = (
        [brief_table(comparison).rstrip(), f"Mean {name_of_metric} over users, {made}"]
        if brief
        else [
            answer(comparison),
            markdown_table(comparison.wide(labels=True).reset_index().to_dict("records")).rstrip(),
            f"Mean {name_of_metric} over users [95 % interval over users], {made}",
        ]
    )
    if full:
        parts += _more(comparison)
    for target in re.findall(rf"!\[.*?\]\((.*?{re.escape(name)}\.png)\)", document.read_text(encoding="utf-8")):
        picture = document.parent / target
        picture.parent.mkdir(exist_ok=True)
        figure = paired_figure(comparison, "own", "aggregated")
        if figure is None:
            raise UserError(f"{target} cannot be drawn: {name} compares a single strategy")
        write_atomically(picture, png(figure))
    replace_block(document, name, "\n\n".join(parts) + "\n")


def brief_table(comparison: Comparison) -> str:
    """Means of the first strategies that are no bounds, as a Markdown table with readable names."""
    means = comparison.matrix().set_index(["strategy", "row", "column"])["mean"]
    shown = [strategy for strategy in comparison.strategies if not is_bound(strategy)][:MAX_BRIEF]
    return markdown_table(
        [
            {"strategy": comparison.names[strategy]}
            | {title: format_number(means.get((strategy, *cell), math.nan)) for title, cell in BRIEF_CELLS.items()}
            for strategy in shown
        ]
    )


def _more(comparison: Comparison) -> list[str]:
    """Results by initial statistics and costs as Markdown, each with a caption."""
    parts = list(comparison.notices)
    if tuned := comparison.meta["settings"].get("tuned"):
        parts.insert(0, f"Tuned: {tuned}.")
    head, *lines = starts_rows(comparison)
    if lines:
        rows = [dict(zip(head, line, strict=True)) for line in lines]
        parts += [
            f"{capitalize(metric_title(comparison.metric))} of unseen users by the statistics they start from:",
            markdown_table(rows).rstrip(),
        ]
    seconds, traffic = comparison.seconds().set_index("strategy"), comparison.traffic()
    sent = traffic.groupby("strategy")[["bytes_down", "bytes_up"]].sum()
    repeated = traffic[traffic["role"] == REPEATED].set_index("strategy")["bytes_down"]
    costs = [
        {
            "strategy": strategy,
            "time": format_number(seconds["mean"][strategy] / seconds["mean"][comparison.reference], 2),
            "CPU s": "–" if math.isnan(seconds["cpu"][strategy]) else f"{seconds['cpu'][strategy]:.1f}",
            "down": format_size(sent["bytes_down"][strategy]),
            "up": format_size(sent["bytes_up"][strategy]),
        }
        | ({"repeated": format_size(repeated.get(strategy, 0))} if len(repeated) else {})
        for strategy in seconds.index
    ]
    caption = f"Time of a run relative to {comparison.reference}, its CPU seconds, and bytes per client and round"
    if len(repeated):
        caption += "; repeated is the part of down that clients would not need if they kept state between messages"
    return [*parts, f"{caption}:", markdown_table(costs).rstrip()]


def replace_block(document: Path, name: str, content: str | None = None) -> None:
    """Replace the text between a document's markers for ``name``; without content, only check that they exist.

    Raises:
        UserError: the document or its markers are missing.
    """
    if not document.exists():
        raise UserError(f"{document} does not exist: give a file with <!-- begin {name} --> and <!-- end {name} -->")
    text = document.read_text(encoding="utf-8")
    block = re.compile(f"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.DOTALL)
    if not block.search(text):
        raise UserError(f"{document} has no block for {name}: add <!-- begin {name} --> and <!-- end {name} -->")
    if content is not None:
        write_atomically(document, block.sub(lambda m: m[1] + content + m[2], text).encode())
