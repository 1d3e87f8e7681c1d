"""A comparison loaded from its results directory, with its tables as text.

Files: `fedbn_simulations.results.files`; rows, columns and statistics: `fedbn_simulations.results.matrix`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, Self

import pandas as pd

from fedbn.errors import UserError, unknown
from fedbn.files import read_json
from fedbn_simulations.results.execution import ran_one_by_one, summarize_execution, summarize_time
from fedbn_simulations.results.files import finished_runs, recompute, summarize_notices
from fedbn_simulations.results.formatting import (
    format_estimate,
    format_number,
    latex_table,
    markdown_table,
    metric_title,
)
from fedbn_simulations.results.matrix import COLUMNS, METRICS, ROWS, Matrix
from fedbn_simulations.results.summary import answer
from fedbn_simulations.results.tables import (
    expand_shared_models,
    lines_table,
    ownership_table,
    runs_table,
    summarize_convergence,
)

CELL_LEGEND = "Mean over users [95 % interval over users]."
CAPTION = "mean over users [95\\% cluster bootstrap interval]"


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Matrix):
    """A comparison loaded from its results directory.

    Attributes:
        meta: ``comparison.json``.
        evaluations: one line per run x user x row x column: n, and the metrics.
        directory: the results directory.
        shift: ``shift.json``, or empty.
        runs: one line per finished run: run, strategy, seed, lr, seconds, rounds, newcomer, cpu_seconds,
            convergence.
        curves: one line per run and evaluated round: train_loss, own, unseen.
        ownership: one line per strategy and role (or kind of additional message): owner, entries, elements, and bytes
            per client and round.
        missing: number of (strategy, seed) pairs without a finished run.
        notices: notices of the comparison and its runs.
        engine: the engine, and how clients ran in it; also one of the notices if clients ran one by one in an engine
            that usually runs them side by side.
        time: CPU seconds of all runs by phase, as text; empty if the engine did not measure them.
    """

    directory: Path
    shift: dict[str, Any]
    runs: pd.DataFrame
    curves: pd.DataFrame
    ownership: pd.DataFrame
    missing: int
    notices: tuple[str, ...]
    engine: str
    time: str

    long = to_pandas = Matrix.matrix

    @classmethod
    def load(cls, directory: str | Path, metric: str = "") -> Self:
        """Load a results directory; unfinished runs are skipped and counted.

        Args:
            directory: results directory.
            metric: the metric to display; the one of the comparison by default.

        Raises:
            UserError: the directory is not a comparison, a file is damaged, no run is finished, or the metric is
                unknown.
        """
        directory = Path(directory)
        if not (directory / "comparison.json").is_file():
            raise UserError(f"{directory} is not a comparison: it has no comparison.json. Give a results directory")
        meta = read_json(directory / "comparison.json", "delete it and run the same comparison; finished runs are used")
        metrics = meta.get("metrics", METRICS)
        if metric and metric not in metrics:
            raise unknown("metric", metric, metrics)
        meta["metric"] = metric or meta.get("metric", "")
        runs, foreign = finished_runs(directory, meta)
        if not runs:
            raise UserError(f"{directory} has no finished run yet: finish the comparison first")
        planned = len(meta["strategies"]) * len(meta["seeds"])
        notices = list(meta.get("notices", []))
        if len(runs) < planned:
            notices.insert(0, f"{planned - len(runs)} of {planned} runs are not finished and left out.")
        if foreign:
            notices.append(f"Runs that do not belong to this comparison are left out: {', '.join(foreign)}.")
        notices += summarize_notices([r for _, r in runs], notices)
        table = runs_table(runs)
        notices += summarize_convergence(table)
        engine = summarize_execution(meta.get("engine", ""), [r for _, r in runs])
        if ran_one_by_one([r for _, r in runs]):
            notices.append(f"engine {engine}")
        shift = directory / "shift.json"
        loaded = cls(
            directory=directory,
            meta=meta,
            shift=read_json(shift, recompute(directory)) if shift.is_file() else {},
            runs=table,
            evaluations=expand_shared_models(
                lines_table(
                    runs,
                    "evaluations",
                    {"user": "str", "domain": "str", "row": "str", "column": "str", "n": "int64"}
                    | dict.fromkeys(metrics, "float64"),
                )
            ),
            curves=lines_table(
                runs, "curve", {"round": "int64", "train_loss": "float64", "own": "float64", "unseen": "float64"}
            ),
            ownership=ownership_table(runs),
            missing=planned - len(runs),
            notices=tuple(dict.fromkeys(notices)),
            engine=engine,
            time=summarize_time([r for _, r in runs]),
        )
        if unlearned := loaded.unlearned:
            names = ", ".join(loaded.names[strategy] for strategy in unlearned)
            notice = (
                f"Did not learn (†), and are left out of advice: {names}. No mean accuracy of theirs "
                f"reaches {format_number(meta['floor'])} (share of the most frequent class plus a third of the rest)."
            )
            return replace(loaded, notices=(*loaded.notices, notice))
        return loaded

    def __repr__(self) -> str:
        return f"{answer(self)}\n\n{self.wide().to_string()}"

    def _repr_html_(self) -> str:
        table = self.wide().to_html()  # pandas escapes labels, which are user input
        return f"<p>{escape(answer(self))}</p>{table}<p>{escape(CELL_LEGEND)}</p>"

    def traffic(self) -> pd.DataFrame:
        """Owners and traffic: one line per strategy and role, bytes per client and round."""
        return self.ownership.copy()

    def seconds(self) -> pd.DataFrame:
        """Cost by strategy: mean and sd (over seeds) of a run's seconds, CPU seconds, seconds per round, lr, rounds."""
        grouped = self.runs.groupby("strategy", sort=False)
        return pd.DataFrame(
            {
                "mean": grouped["seconds"].mean(),
                "sd": grouped["seconds"].std(),
                "cpu": grouped["cpu_seconds"].mean(),
                "per_round": grouped["seconds"].sum() / grouped["rounds"].sum(),
                "rounds": grouped["rounds"].max(),
                "lr": grouped["lr"].agg(lambda rates: ", ".join(f"{r:g}" for r in sorted(set(rates.dropna())))),
                "n_seeds": grouped.size(),
            }
        ).reset_index()

    def wide(self, metric: str = "", labels: bool = False) -> pd.DataFrame:
        """The matrix as text: statistics and strategy down, rows of the matrix across; † marks `unlearned` ones.

        Args:
            metric: a metric; the one that is displayed by default.
            labels: name strategies by the labels of commands and files instead of readable names.
        """
        marks = dict.fromkeys(self.unlearned, " †")
        text = {
            (line.column, line.strategy, line.row): format_estimate(line.mean, line.ci_low, line.ci_high)
            for line in self.matrix(metric).itertuples()
        }
        rows = list(dict.fromkeys(row for row, _ in self.cells))
        index = [
            (column, strategy)
            for column in self.meta["columns"]
            for strategy in self.strategies
            if any(text.get((column, strategy, row), "–") != "–" for row in rows)
        ]
        return pd.DataFrame(
            [[text.get((*key, row), "–") for row in rows] for key in index],
            index=pd.MultiIndex.from_tuples(
                [(COLUMNS[column][0], (s if labels else self.names[s]) + marks.get(s, "")) for column, s in index],
                names=["statistics", "strategy"],
            ),
            columns=[ROWS[row][0] for row in rows],
        )

    def to_csv(self, path: str | Path, metric: str = "") -> None:
        """Write the long matrix, unrounded."""
        self.matrix(metric).to_csv(path, index=False)

    def to_markdown(self, metric: str = "") -> str:
        """The wide matrix as a Markdown table: mean and 95 % interval over users."""
        return markdown_table(self.wide(metric).reset_index().to_dict("records"))

    def to_latex(self, metric: str = "") -> str:
        """The wide matrix as a LaTeX table (packages booktabs and multirow)."""
        return latex_table(self.wide(metric), f"{metric_title(metric or self.metric)}: {CAPTION}")
