"""Several comparisons side by side: their results, settings and differences.

If two comparisons tested a strategy on the same users with the same seeds, the first is subtracted from the later one
user by user. No difference is called clear here, because the comparisons were not planned together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fedbn.errors import UserError
from fedbn_simulations.results.comparison import CAPTION, Comparison
from fedbn_simulations.results.formatting import (
    format_estimate,
    format_signed,
    latex_table,
    markdown_table,
    metric_title,
)
from fedbn_simulations.results.labels import distinct_names
from fedbn_simulations.results.matrix import COLUMNS, ROWS, common, contrast


@dataclass(frozen=True)
class SideBySide:
    """Comparisons by short name, in the given order."""

    comparisons: dict[str, Comparison]

    @staticmethod
    def load(directories: Sequence[Path], metric: str = "") -> SideBySide:
        """Load comparisons; the short names are the shortest distinct ends of the paths.

        Raises:
            UserError: a directory is not a comparison, is given twice, or has no such metric.
        """
        paths = [Path(d).resolve() for d in directories]
        if len(set(paths)) < len(paths):
            raise UserError("the same comparison is given twice: give different directories")
        depth = 1
        while len({path.parts[-depth:] for path in paths}) < len(paths):
            depth += 1
        return SideBySide({"/".join(path.parts[-depth:]): Comparison.load(path, metric) for path in paths})

    @property
    def metric(self) -> str:
        """The metric of the first comparison that is displayed."""
        return next(iter(self.comparisons.values())).metric

    def long(self, metric: str = "") -> pd.DataFrame:
        """The concatenated `Comparison.matrix` tables, with the name of the comparison in the first column."""
        parts = [c.matrix(metric or self.metric).assign(comparison=name) for name, c in self.comparisons.items()]
        frame = pd.concat(parts, ignore_index=True)
        return frame[["comparison", *frame.columns.drop("comparison")]]

    def wide(self, metric: str = "") -> pd.DataFrame:
        """The matrices as text: statistics, strategy and comparison down, rows of the matrix across."""
        frame = self.long(metric).dropna(subset="mean")
        order = {s: i for i, s in enumerate(dict.fromkeys(frame["strategy"]))}
        frame = frame.assign(
            text=[format_estimate(line.mean, line.ci_low, line.ci_high) for line in frame.itertuples()],
            rank=frame["strategy"].map(order),
            run=frame["comparison"].map(list(self.comparisons).index),
        )
        frame["strategy"] = frame["strategy"].map(distinct_names(order))
        return _across(frame, ["rank", "strategy", "run", "comparison"], drop=["rank", "run"])

    def differences(self, metric: str = "") -> pd.DataFrame:
        """Every later comparison minus the first, on the strategies, users and seeds they have in common.

        Returns:
            strategy, comparison, minus, row, column, difference, ci_low, ci_high (95 %, users resampled), n_users,
            n_seeds; empty if the scenarios differ, because the users are not the same.
        """
        (first, base), *others = self.comparisons.items()
        lines: list[tuple[Any, ...]] = []
        for name, other in others:
            if _scenario(other) != _scenario(base):
                continue
            for strategy in (s for s in base.strategies if s in other.strategies):
                for row, column in base.cells:
                    a, b = (c.values(strategy, row, column, metric or self.metric) for c in (other, base))
                    result = contrast(*common(a, b), row, base.higher_is_better(metric or self.metric))
                    if result.n_users:
                        counts = result.n_users, result.n_seeds
                        lines.append((strategy, name, first, row, column, result.value, *result.users, *counts))
        columns = ["strategy", "comparison", "minus", "row", "column", "difference", "ci_low", "ci_high"]
        return pd.DataFrame(lines, columns=[*columns, "n_users", "n_seeds"])

    def differences_wide(self, metric: str = "") -> pd.DataFrame:
        """`differences` as text: strategy, statistics and comparison down, rows of the matrix across."""
        frame = self.differences(metric)
        if frame.empty:
            return frame
        lines = frame.itertuples()
        frame["text"] = [format_estimate(line.difference, line.ci_low, line.ci_high, format_signed) for line in lines]
        frame["strategy"] = frame["strategy"].map(distinct_names(dict.fromkeys(frame["strategy"])))
        return _across(frame, ["strategy", "comparison"])

    def settings(self) -> pd.DataFrame:
        """Settings, versions and data that differ: one line each, one column per comparison."""
        table = pd.DataFrame({name: _settings(c) for name, c in self.comparisons.items()}).fillna("–")
        return table[table.nunique(axis=1) > 1].rename_axis("setting")

    def to_markdown(self, metric: str = "") -> str:
        """The wide table as Markdown."""
        return markdown_table(self.wide(metric).reset_index().to_dict("records"))

    def to_latex(self, metric: str = "") -> str:
        """The wide table as LaTeX (packages booktabs and multirow)."""
        return latex_table(self.wide(metric), f"{metric_title(metric or self.metric)}: {CAPTION}")


def _across(frame: pd.DataFrame, index: list[str], drop: Sequence[str] = ()) -> pd.DataFrame:
    """Pivot the column ``text``: statistics and ``index`` down (without ``drop``), rows of the matrix across."""
    frame = frame.assign(
        position=frame["column"].map(list(COLUMNS).index), statistics=[COLUMNS[column][0] for column in frame["column"]]
    )
    table = frame.pivot(index=["position", "statistics", *index], columns="row", values="text").sort_index()
    table = table.droplevel(["position", *drop]).fillna("–")
    table = table[[row for row in ROWS if row in table.columns]]
    return table.rename(columns={row: title for row, (title, _) in ROWS.items()}).rename_axis(columns=None)


def _scenario(comparison: Comparison) -> str:
    return str(comparison.meta["scenario"]).partition(":")[0]


def _settings(comparison: Comparison) -> dict[str, str]:
    meta = comparison.meta
    facts = {"scenario": meta["scenario"], "seeds": len(meta["seeds"])} | meta["settings"] | meta["versions"]
    facts |= {f"data: {name}": digest for name, digest in meta["sources"].items()}
    return {name.replace("_", " "): "–" if value in (None, "") else str(value) for name, value in facts.items()}
