"""Put a study of personalisation into a document, between two markers, so that no number in it is typed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from simulations.embed import markdown, replace_block
from simulations.numerals import bracket, number, signed
from simulations.personalise_cells import BOUNDS


def embed_study(directory: Path, document: Path) -> None:
    """Replace what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; NAME is the directory's name.

    Args:
        directory: of a finished study.
        document: a Markdown text.

    Raises:
        UserError: the document or its markers are missing.
    """
    found = pd.read_parquet(directory / "summary.parquet")
    replace_block(document, directory.resolve().name, table(found))


def table(found: pd.DataFrame) -> str:
    """A Markdown table of a study's summary: rules down, three columns for each kind of stream; bounds last.

    Args:
        found: as `simulations.personalise_results.summary` gives it.
    """
    lines = found.set_index(["rule", "stream"])
    streams = list(dict.fromkeys(found["stream"]))
    rules = sorted(dict.fromkeys(found["rule"]), key=lambda name: name in BOUNDS)
    rows = [_row(name, {s: lines.loc[(name, s)] for s in streams}) for name in rules]
    people, seeds = found["users"].max(), found["seeds"].max()
    return f"{people} people, {seeds} seeds.\n\n{markdown(rows)}"


def _row(name: str, by_stream: dict[str, Any]) -> dict[str, str]:
    row = {"rule": name}
    for stream, line in by_stream.items():
        star = "*" if line["p_adjusted"] < 0.05 else ""
        gain = "" if name == "source" else f", {signed(line['gain'])}{star} {_signed_bracket(line)}"
        row[stream] = f"{number(line['accuracy'])} {bracket(line['low'], line['high'])}{gain}".rstrip()
        row[f"worst, {stream}"] = number(line["worst"])
        row[f"harmed, {stream}"] = f"{line['harmed']:.0%}"
    return row


def _signed_bracket(line: Any) -> str:
    return f"[{signed(line['gain_low'])}, {signed(line['gain_high'])}]"
