"""Put a comparison's table into a document, between two markers, so that no number in it is typed by hand."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from fedbn.errors import UserError
from fedbn.federation.traffic import REPEATED
from simulations.results.comparison import Comparison
from simulations.results.formatting import format_number, format_size
from simulations.results.summary import answer, starts_rows


def update_document(directory: Path, document: Path, *, full: bool = False) -> None:
    """Replace what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; NAME is the directory's name.

    Where the document shows ``NAME.png``, the plot of paired differences is copied there.

    Args:
        directory: of a comparison.
        document: a Markdown text.
        full: also what unseen users start from, and what each strategy costs.

    Raises:
        UserError: the document or its markers are missing.
    """
    name = directory.resolve().name
    replace_block(document, name)  # before anything is computed
    comparison = Comparison.load(directory)
    seeds = len(comparison.meta["seeds"])
    told = "one seed" if seeds == 1 else f"{seeds} paired seeds"
    parts = [
        answer(comparison),
        comparison.to_markdown().rstrip(),
        f"Mean accuracy over users [95 % interval over users], {told}; made by `{comparison.meta['command']}`.",
    ]
    if full:
        parts += _more(comparison)
    for shown in re.findall(rf"!\[.*?\]\((.*?{re.escape(name)}\.png)\)", document.read_text(encoding="utf-8")):
        picture = document.parent / shown
        picture.parent.mkdir(exist_ok=True)
        shutil.copy(directory / "figures" / "paired-own-aggregated.png", picture)
    replace_block(document, name, "\n\n".join(parts) + "\n")


def _more(comparison: Comparison) -> list[str]:
    """Starts and costs as Markdown, each after a line that says what it is."""
    parts = list(comparison.notices)
    if (rates := str(comparison.meta["settings"]["lr"])).startswith("tuned"):
        parts.insert(0, f"Learning rates, {rates}.")
    head, *lines = starts_rows(comparison)
    if lines:
        rows = [dict(zip(head, line, strict=True)) for line in lines]
        parts += ["Accuracy of unseen users by the statistics they start from:", markdown(rows).rstrip()]
    seconds, traffic = comparison.seconds().set_index("strategy"), comparison.traffic()
    moved = traffic.groupby("strategy")[["bytes_down", "bytes_up"]].sum()
    again = traffic[traffic["role"] == REPEATED].set_index("strategy")["bytes_down"]
    costs = [
        {
            "strategy": strategy,
            "time": format_number(seconds["mean"][strategy] / seconds["mean"][comparison.reference], 2),
            "down": format_size(moved["bytes_down"][strategy]),
            "up": format_size(moved["bytes_up"][strategy]),
        }
        | ({"repeated": format_size(again.get(strategy, 0))} if len(again) else {})
        for strategy in seconds.index
    ]
    told = f"Time of a run as a ratio to {comparison.reference}, and bytes per client and round"
    if len(again):
        told += "; repeated is the part of down that a client with a memory between messages would not need"
    return [*parts, f"{told}:", markdown(costs).rstrip()]


def replace_block(document: Path, name: str, content: str | None = None) -> None:
    """Replace what stands between a document's two markers for ``name``; without content only look for them.

    Raises:
        UserError: the document or its markers are missing.
    """
    if not document.exists():
        raise UserError(f"{document} does not exist: give a text with <!-- begin {name} --> and <!-- end {name} -->")
    text = document.read_text(encoding="utf-8")
    block = re.compile(f"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.DOTALL)
    if not block.search(text):
        raise UserError(f"{document} has no block for {name}: add <!-- begin {name} --> and <!-- end {name} -->")
    if content is not None:
        document.write_text(block.sub(lambda m: m[1] + content + m[2], text), encoding="utf-8")


def markdown(rows: Sequence[dict[str, str]]) -> str:
    r"""Rows of one shape as a Markdown table.

    >>> print(markdown([{"name": "fedbn", "what": "a|b"}]), end="")
    | name | what |
    | --- | --- |
    | fedbn | a\|b |
    """
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([str(row[name]).replace("|", "\\|") for name in head] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
