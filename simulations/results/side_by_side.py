"""Several comparisons beside each other: what each found, what differs between them, and by how much.

Where two of them tested a strategy on the same users with the same seeds, the later is subtracted from the first user
by user. Nothing is called clear here: runs that were made at different times answer no common question beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fedbn.errors import UserError
from simulations.results.comparison import CAPTION, Comparison
from simulations.results.formatting import format_estimate, format_signed, latex_table, markdown_table
from simulations.results.matrix import COLUMNS, ROWS, contrast


@dataclass(frozen=True)
class SideBySide:
    """Comparisons by a short name, in the order given."""

    comparisons: dict[str, Comparison]

    @staticmethod
    def load(directories: Sequence[Path]) -> SideBySide:
        """Read them; a name is the end of the path, as much of it as tells them apart.

        Raises:
            UserError: one is no comparison, or one is named twice.
        """
        places = [Path(d).resolve() for d in directories]
        if len(set(places)) < len(places):
            raise UserError("the same comparison is named twice: give different directories")
        depth = 1
        while len({place.parts[-depth:] for place in places}) < len(places):
            depth += 1
        return SideBySide({"/".join(place.parts[-depth:]): Comparison.load(place) for place in places})

    def long(self, metric: str = "accuracy") -> pd.DataFrame:
        """All matrices under each other, as `Comparison.matrix` with the comparison's name in front."""
        parts = [c.matrix(metric).assign(comparison=name) for name, c in self.comparisons.items()]
        frame = pd.concat(parts, ignore_index=True)
        return frame[["comparison", *frame.columns.drop("comparison")]]

    def wide(self, metric: str = "accuracy") -> pd.DataFrame:
        """As text: statistics, strategy and comparison down, rows of the matrix across."""
        frame = self.long(metric).dropna(subset="mean")
        shown = [format_estimate(line.mean, line.ci_low, line.ci_high) for line in frame.itertuples()]
        frame = frame.assign(
            text=shown, place=frame["column"].map(list(COLUMNS).index), statistics=frame["column"].map(_title)
        )
        order = {s: i for i, s in enumerate(dict.fromkeys(frame["strategy"]))}
        frame = frame.assign(
            rank=frame["strategy"].map(order), run=frame["comparison"].map(list(self.comparisons).index)
        )
        table = frame.pivot(index=["place", "statistics", "rank", "strategy", "run", "comparison"], columns="row")[
            "text"
        ]
        table = table.sort_index().droplevel(["place", "rank", "run"]).fillna("–")
        table = table[[row for row in ROWS if row in table.columns]]
        return table.rename(columns={row: title for row, (title, _) in ROWS.items()}).rename_axis(columns=None)

    def differences(self, metric: str = "accuracy") -> pd.DataFrame:
        """Every later comparison minus the first, for strategies that both have, on users and seeds that both have.

        Returns:
            strategy, comparison, minus, row, column, difference, ci_low, ci_high (95 %, users resampled), n_users,
            n_seeds; empty if the scenarios differ, for then equal names are other people.
        """
        (first, base), *others = self.comparisons.items()
        lines: list[tuple[Any, ...]] = []
        for name, other in others:
            if _scenario(other) != _scenario(base):
                continue
            for strategy in (s for s in base.strategies if s in other.strategies):
                for row, column in base.cells:
                    found = contrast(
                        other.values(strategy, row, column, metric),
                        base.values(strategy, row, column, metric),
                        row,
                        metric,
                    )
                    if found.n_users:
                        counts = found.n_users, found.n_seeds
                        lines.append((strategy, name, first, row, column, found.value, *found.users, *counts))
        columns = ["strategy", "comparison", "minus", "row", "column", "difference", "ci_low", "ci_high"]
        return pd.DataFrame(lines, columns=[*columns, "n_users", "n_seeds"])

    def differences_wide(self, metric: str = "accuracy") -> pd.DataFrame:
        """`differences` as text: strategy, statistics and comparison down, rows of the matrix across."""
        frame = self.differences(metric)
        if frame.empty:
            return frame
        shown = [
            format_estimate(line.difference, line.ci_low, line.ci_high, format_signed) for line in frame.itertuples()
        ]
        frame = frame.assign(text=shown, place=frame["column"].map(list(COLUMNS).index))
        frame["statistics"] = frame["column"].map(_title)
        table = frame.pivot(index=["place", "statistics", "strategy", "comparison"], columns="row", values="text")
        table = table.droplevel("place").fillna("–")
        table = table[[row for row in ROWS if row in table.columns]]
        return table.rename(columns={row: title for row, (title, _) in ROWS.items()}).rename_axis(columns=None)

    def settings(self) -> pd.DataFrame:
        """Settings, versions and data that are not the same in all: one line each, one column a comparison."""
        table = pd.DataFrame({name: _told(c) for name, c in self.comparisons.items()}).fillna("–")
        return table[table.nunique(axis=1) > 1].rename_axis("setting")

    def to_markdown(self, metric: str = "accuracy") -> str:
        """The wide table as Markdown."""
        return markdown_table(self.wide(metric))

    def to_latex(self, metric: str = "accuracy") -> str:
        """The wide table as LaTeX (packages booktabs and multirow)."""
        return latex_table(self.wide(metric), f"{metric.replace('_', ' ')}: {CAPTION}")


def _title(column: str) -> str:
    return COLUMNS[column][0]


def _scenario(comparison: Comparison) -> str:
    return str(comparison.meta["scenario"]).partition(":")[0]


def _told(comparison: Comparison) -> dict[str, str]:
    meta = comparison.meta
    facts = {"scenario": meta["scenario"], "seeds": len(meta["seeds"])} | meta["settings"] | meta["versions"]
    facts |= {f"data: {name}": digest for name, digest in meta["sources"].items()}
    return {name.replace("_", " "): "–" if value in (None, "") else str(value) for name, value in facts.items()}
