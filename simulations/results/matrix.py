"""The evaluation matrix of a comparison, and the statistics over it.

A comparison runs every strategy with the same seeds on the same users. The *user* is the unit of
inference: intervals come from resampling users with all their seeds kept together (a cluster
bootstrap), and strategies are compared user by user (paired). Seeds say how much of a mean is luck of
initialization and sampling; they get their own interval. Nothing is chosen on test data.
What an interval is: `simulations.results.inference`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from fedbn.errors import unknown
from simulations.results.inference import (
    Estimate,
    Interval,
    Statistic,
    adjust,
    estimate,
    mean_of_users,
    signed_rank,
    uniform,
    worst_of_users,
)

#: Rows of the evaluation matrix: name -> (title, what it means).
ROWS = {
    "own": ("own test", "seen users, each with their own model on their own later recordings"),
    "worst": (
        "worst 10 %",
        "the mean of own test over the worst tenth of the seen users (at least one user), in each seed",
    ),
    "global": (
        "global test",
        "each seen user's model on the pooled test data of all; the test data are shared, so the interval "
        "speaks of differences between models only, and there is none where all users hold one model",
    ),
    "unseen": ("unseen users", "users that took no part in training, on their own recordings"),
}

#: Columns of the evaluation matrix: name -> (title, what it means).
COLUMNS = {
    "aggregated": ("as aggregated", "normalization statistics as training left them"),
    "recalibrated": (
        "recalibrated",
        "statistics estimated again under the final weights, without labels, before the test",
    ),
    "online": ("adapted online", "statistics follow the user's unlabeled stream during the test"),
}

#: What an unseen user may start from: name -> (title, what it means).
STARTS = {
    "initial": ("initial", "statistics of the model as built"),
    "mean": ("clients' mean", "mean of what the clients sent last"),
    "pooled": ("pooled", "the same, with the variance of the union"),
    "nearest": ("nearest client", "the entries of the client whose moments are nearest to the user's own"),
    "mixture": ("mixture", "all clients, weighted by one over that distance"),
    "prior": ("prior-mixed", "pooled, shrunk towards the user's own with an empirical-Bayes weight per channel"),
}

#: Metrics of an evaluation, and whether more is better.
METRICS = {"accuracy": True, "macro_f1": True, "loss": False}

#: A user counts as better or worse off when the difference exceeds one point.
POINT = 0.01
#: Per-domain results are shown for this many domains; beyond, a domain is as good as a user.
DOMAINS = range(2, 13)

T = TypeVar("T")


def _remembered(method: Callable[[Matrix, str], T]) -> Callable[..., T]:
    """Compute once per metric and hand out copies: answer, tables and figures all ask for the same."""

    @wraps(method)
    def remembered(self: Matrix, metric: str = "accuracy") -> T:
        key = (method.__name__, metric)
        if key not in self._memo:
            self._memo[key] = method(self, metric)
        return copy.copy(self._memo[key])

    return remembered


@dataclass(frozen=True, eq=False, repr=False)
class Matrix:
    """How every strategy does on every user, in every row and column.

    Attributes:
        meta: of the comparison: its ``strategies``, in display order, and ``columns``.
        evaluations: one line per run x user x row x column: n, accuracy, macro_f1, loss.
    """

    meta: dict[str, Any]
    evaluations: pd.DataFrame
    _memo: dict[tuple[str, str], Any] = field(default_factory=dict, kw_only=True)

    @property
    def strategies(self) -> list[str]:
        """Labels in display order; the first is the reference of paired comparisons."""
        return list(self.meta["strategies"])

    @property
    def reference(self) -> str:
        """The strategy that the others are compared with."""
        return self.strategies[0]

    @property
    def cells(self) -> list[tuple[str, str]]:
        """The (row, column) pairs that at least one strategy has, in display order."""
        present = set(zip(self.evaluations["row"], self.evaluations["column"]))
        present |= {("worst", column) for row, column in present if row == "own"}
        return [(row, column) for row in ROWS for column in self.meta["columns"] if (row, column) in present]

    def values(self, strategy: str, row: str, column: str, metric: str = "accuracy") -> pd.DataFrame:
        """Users x seeds of one cell; empty if the strategy lacks it. ``worst`` reads ``own``."""
        return self._cube(metric).get((strategy, "own" if row == "worst" else row, column), pd.DataFrame())

    @_remembered
    def matrix(self, metric: str = "accuracy") -> pd.DataFrame:
        """The evaluation matrix: one line per strategy, row and column.

        Returns:
            strategy, row, column, mean; ci_low, ci_high (95 %, users resampled); seed_sd, seed_low,
            seed_high (95 %, over seeds); n_users, n_seeds. A cell that a strategy lacks has NaN and n 0.

        Raises:
            UserError: unknown metric.
        """
        lines = []
        for strategy in self.strategies:
            for row, column in self.cells:
                values = self.values(strategy, row, column, metric).to_numpy()
                found = estimate(_statistic(row, metric), values) if values.size else Estimate()
                lines.append((strategy, row, column, *_flat(found)))
        return pd.DataFrame(lines, columns=["strategy", "row", "column", "mean", *_SPREAD])

    @_remembered
    def paired(self, metric: str = "accuracy") -> pd.DataFrame:
        """Each strategy against the reference, user by user, on the users and seeds both have.

        Returns:
            strategy, reference, row, column, difference (strategy minus reference); ci_low, ci_high
            (95 %, users resampled); seed_sd, seed_low, seed_high (95 %, over seeds); n_users, n_seeds;
            p (Wilcoxon signed-rank over users), p_adjusted (Benjamini-Hochberg over this table);
            better, worse (users that gain or lose more than one point). ``worst`` has no per-user
            differences, hence neither p nor counts.

        Raises:
            UserError: unknown metric.
        """
        lines = []
        for strategy in self.strategies[1:]:
            for row, column in self.cells:
                found = self.contrast(strategy, self.reference, row, column, metric)
                gap = self._gap(strategy, row, column, metric)
                by_user = gap.mean(axis=1).to_numpy()
                line = (strategy, self.reference, row, column, *_flat(found))
                if row == "worst" or not by_user.size:
                    lines.append((*line, math.nan, pd.NA, pd.NA))
                    continue
                gain = by_user if METRICS[metric] else -by_user
                better, worse = int((gain > POINT).sum()), int((gain < -POINT).sum())
                # One observation repeated is no sample of users, except that nothing differs is a fact.
                repeated = by_user.any() and uniform(gap.to_numpy())
                lines.append((*line, math.nan if repeated else signed_rank(by_user), better, worse))
        frame = pd.DataFrame(
            lines,
            columns=[
                "strategy",
                "reference",
                "row",
                "column",
                "difference",
                *_SPREAD,
                "p",
                "better",
                "worse",
            ],
        ).astype({"p": "float64", "better": "Int64", "worse": "Int64"})
        frame.insert(frame.columns.get_loc("p") + 1, "p_adjusted", adjust(frame["p"]))
        return frame

    def differences(self, strategy: str, row: str, column: str, metric: str = "accuracy") -> pd.Series:
        """Strategy minus reference by user, mean over common seeds, ascending; empty if a side lacks it."""
        return self._gap(strategy, row, column, metric).mean(axis=1).sort_values()

    @_remembered
    def clear_best(self, metric: str = "accuracy") -> set[tuple[str, str, str]]:
        """The (strategy, row, column) that beat every other strategy, each paired interval excluding 0."""
        sign = 1 if METRICS[metric] else -1
        found = set()
        for (row, column), lines in self.matrix(metric).dropna(subset="mean").groupby(["row", "column"]):
            best, *others = lines.sort_values("mean", ascending=sign < 0)["strategy"]
            # The nearest rival first: it settles most cells at once.
            against = (self.contrast(best, other, row, column, metric) for other in others)
            if others and all(a.users.excludes_zero and sign * a.value > 0 for a in against):
                found.add((best, row, column))
        return found

    def by_domain(self, metric: str = "accuracy") -> pd.DataFrame:
        """The matrix by domain, when there are 2 to 12 domains; else empty.

        Returns:
            strategy, row (``own``: seen users, ``unseen``: unseen users), column, domain, mean, ci_low,
            ci_high, n_users.
        """
        domain = self.evaluations.groupby("user")["domain"].first()
        lines = []
        if domain.nunique() in DOMAINS:
            for (strategy, row, column), frame in self._cube(metric).items():
                if row == "global" or column not in self.meta["columns"]:
                    continue
                for name, users in frame.groupby(domain.reindex(frame.index)):
                    # A domain that is unseen in a seed has no own test there.
                    found = estimate(mean_of_users, users.dropna(axis=1, how="all").to_numpy())
                    lines.append((strategy, row, column, name, found.value, *found.users, found.n_users))
        return pd.DataFrame(
            lines, columns=["strategy", "row", "column", "domain", "mean", "ci_low", "ci_high", "n_users"]
        )

    @_remembered
    def starts(self, metric: str = "accuracy") -> pd.DataFrame:
        """Unseen users by what they start from, before any adaptation.

        Returns:
            strategy, start (a key of `STARTS`), mean, ci_low, ci_high, n_users; strategies that send statistics.
        """
        lines = []
        for strategy in self.strategies:
            for start in STARTS:
                values = self.values(strategy, "unseen", start, metric).to_numpy()
                if values.size:
                    found = estimate(mean_of_users, values)
                    lines.append((strategy, start, found.value, *found.users, found.n_users))
        return pd.DataFrame(lines, columns=["strategy", "start", "mean", "ci_low", "ci_high", "n_users"])

    @_remembered
    def _cube(self, metric: str) -> dict[tuple[str, str, str], pd.DataFrame]:
        """Users x seeds by (strategy, row, column)."""
        if metric not in METRICS:
            raise unknown("metric", metric, METRICS)
        known = self.evaluations.dropna(subset=metric)
        return {
            key: lines.pivot(index="user", columns="seed", values=metric)
            for key, lines in known.groupby(["strategy", "row", "column"], sort=False)
        }

    def _gap(self, strategy: str, row: str, column: str, metric: str) -> pd.DataFrame:
        """Strategy minus reference, users x seeds, of what both have; empty if a side lacks the cell."""
        ours, theirs = (self.values(s, row, column, metric) for s in (strategy, self.reference))
        if ours.empty or theirs.empty:
            return pd.DataFrame(dtype=float)
        return (ours - theirs).dropna(how="all").dropna(how="all", axis=1)

    def contrast(self, ours: str, theirs: str, row: str, column: str, metric: str) -> Estimate:
        """Ours minus theirs on the users and seeds that both have."""
        a, b = (self.values(strategy, row, column, metric) for strategy in (ours, theirs))
        return contrast(a, b, row, metric)


def contrast(a: pd.DataFrame, b: pd.DataFrame, row: str, metric: str = "accuracy") -> Estimate:
    """One cell minus another, users x seeds each as of `Comparison.values`, on the users and seeds that both have."""
    a, b = a.align(b, join="inner")
    both = a.notna() & b.notna()
    kept = both.any(axis=1), both.any(axis=0)
    if not any(kept[0]):
        return Estimate()
    x, y = (frame.where(both).loc[kept].to_numpy() for frame in (a, b))
    if row == "worst":
        one = _statistic(row, metric)
        return estimate(lambda left, right: one(left) - one(right), x, y)
    found = estimate(mean_of_users, x - y)
    # No user differs at all: that is known exactly, not unknown.
    return found._replace(users=Interval(0.0, 0.0)) if not np.nan_to_num(x - y).any() else found


_SPREAD = ["ci_low", "ci_high", "seed_sd", "seed_low", "seed_high", "n_users", "n_seeds"]


def _flat(found: Estimate) -> tuple[float, ...]:
    """In the order value, then `_SPREAD`."""
    return (found.value, *found.users, found.seed_sd, *found.seeds, found.n_users, found.n_seeds)


def _statistic(row: str, metric: str) -> Statistic:
    """How users make up a row; the worst users of a loss are those with the highest."""
    if row != "worst":
        return mean_of_users
    return worst_of_users if METRICS[metric] else lambda values: -worst_of_users(-values)
