"""Start the pages of docs/comparisons with a heat map and an answer, both made from the table of the page.

Run ``python docs/overview.py`` after the tables have changed (``make tables`` does).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fedbn.files import write_atomically
from fedbn_simulations.report.documents import replace_block
from fedbn_simulations.report.style import COLUMN_WIDTH, small_png, styled
from fedbn_simulations.results.formatting import capitalize, format_number
from fedbn_simulations.results.labels import readable
from fedbn_simulations.results.summary import is_bound

DOCS = Path(__file__).parent
REFERENCE = "global-naive"
CELLS = (
    ("as aggregated", "own test"),
    ("as aggregated", "worst 10 %"),
    ("as aggregated", "global test"),
    ("as aggregated", "unseen users"),
    ("recalibrated", "unseen users"),
)
"""Columns of the heat map: statistics and test."""
CLIP = 0.3
"""Differences of this size have the strongest color."""

Means = dict[str, dict[tuple[str, str], float]]


def lines_of(text: str, block: str) -> list[dict[str, str]]:
    """The first table of a block, one dictionary per line."""
    content = text.partition(f"<!-- begin {block} -->\n")[2].partition(f"<!-- end {block} -->")[0]
    table = re.search(r"(?:^\|.*\n)+", content, flags=re.MULTILINE)
    if table is None:
        return []
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines())
    return [dict(zip(head, line, strict=True)) for line in lines]


def means_of(text: str, block: str) -> Means:
    """The mean of each strategy in each cell; missing cells are left out."""
    means: Means = {}
    for line in lines_of(text, block):
        for test in ("own test", "worst 10 %", "global test", "unseen users"):
            value = line.get(test, "–").split(" ")[0]
            if value != "–":
                means.setdefault(line["strategy"].removesuffix(" †"), {})[line["statistics"], test] = float(value)
    return means


@styled
def heat_map(means: Means) -> Figure:
    """Means as numbers, and as colors their difference to FedAvg with naive BN in the same column."""
    cells = [cell for cell in CELLS if any(cell in of for of in means.values())]
    order = sorted(means, key=lambda s: -means[s].get(cells[0], 0))
    values = np.array([[means[s].get(cell, np.nan) for cell in cells] for s in order])
    differences = values - [means[REFERENCE].get(cell, np.nan) for cell in cells]
    figure = Figure(figsize=(COLUMN_WIDTH, 1.3 + 0.145 * len(order)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(differences, cmap="PuOr", vmin=-CLIP, vmax=CLIP, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            luminance = np.dot(image.to_rgba(differences[i, j])[:3], (0.2126, 0.7152, 0.0722))
            color = "white" if luminance < 0.45 else "black"
            axes.text(j, i, format_number(value), ha="center", va="center", fontsize=6, color=color)
    suffix = {"recalibrated": "\n(recalib.)"}
    names = [test.replace(" ", "\n", 1) + suffix.get(statistics, "") for statistics, test in cells]
    axes.set_xticks(range(len(cells)), names, fontsize=6)
    axes.set_yticks(range(len(order)), [readable(s) for s in order], fontsize=6)
    axes.tick_params(length=0, top=True, bottom=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, location="bottom", aspect=40, pad=0.01)
    bar.set_label("accuracy minus that of FedAvg (naive BN)\nin the same column (higher is better)", fontsize=6.5)
    bar.outline.set_visible(False)
    return figure


def answer(means: Means, advice: dict[str, str]) -> str:
    """Five lines: the best strategy of each cell, those not clearly behind it, and FedAvg with naive BN."""
    lines = []
    for statistics, test in CELLS:
        found = {s: of[statistics, test] for s, of in means.items() if (statistics, test) in of and not is_bound(s)}
        if not found:
            continue
        advised, _, rest = advice.get(f"{test}, {statistics.removeprefix('as ')}", "").partition("; ")
        best = advised.split("`")[1] if advised else max(found, key=lambda s: found[s])
        title = capitalize(test) + (", recalibrated" if statistics == "recalibrated" else "")
        text = f"- **{title}:** {readable(best)} (`{best}`) {format_number(found[best])}"
        if best != REFERENCE and REFERENCE in found:
            text += f", FedAvg (naive BN) {format_number(found[REFERENCE])}"
        lines.append(f"{text}; {rest}." if rest else f"{text}; not tested.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Update the heat maps, and the answers of the pages that have a block NAME-answer."""
    advice = {line["comparison"]: line for line in lines_of((DOCS / "comparisons.md").read_text("utf-8"), "advice")}
    for page in sorted((DOCS / "comparisons").glob("*.md")):
        text, name = page.read_text(encoding="utf-8"), page.stem
        if f"({name}-map.png)" in text:
            means = means_of(text, name)
            write_atomically(page.with_name(f"{name}-map.png"), small_png(heat_map(means)))
            if f"<!-- begin {name}-answer -->" in text:
                replace_block(page, f"{name}-answer", answer(means, advice.get(name, {})))


if __name__ == "__main__":
    sys.exit(main())
