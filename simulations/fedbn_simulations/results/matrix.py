"""The evaluation matrix of a comparison, and the statistics over it.

A comparison runs every strategy with the same seeds on the same users, and strategies are compared user by user
(paired). Nothing is selected on test data. See `fedbn_simulations.results.inference` for the intervals over users and
seeds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd

from fedbn.errors import unknown
from fedbn_simulations.results.inference import (
    MIN_USERS,
    Estimate,
    Interval,
    Statistic,
    adjust,
    crossed_interval,
    detectable,
    estimate,
    highest_of_users,
    mean_of_users,
    signed_rank,
    uniform,
    worst_of_users,
)
from fedbn_simulations.results.labels import distinct_names

#: Rows of the evaluation matrix: name -> (title, description).
ROWS = {
    "own": ("own test", "seen users, each with their own model on their own later recordings"),
    "worst": (
        "worst 10 %",
        "mean of the own test over the worst tenth of the seen users (at least one user) of each seed",
    ),
    "global": (
        "global test",
        "each seen user's model on the pooled test data of all users; the test data are shared, so the interval only "
        "covers differences between models, and there is none if all users share one model",
    ),
    "unseen": ("unseen users", "users who did not take part in training, on their own recordings"),
}

#: Columns of the evaluation matrix: name -> (title, description).
COLUMNS = {
    "aggregated": ("as aggregated", "normalization statistics as they are after training"),
    "recalibrated": (
        "recalibrated",
        "statistics estimated again with the final weights, without labels, before the test",
    ),
    "online": ("adapted online", "statistics follow the user's unlabeled stream during the test"),
}

#: Cells of a brief table: title -> (row, column).
BRIEF_CELLS = {
    "own test": ("own", "aggregated"),
    "worst 10 %": ("worst", "aggregated"),
    "unseen users": ("unseen", "aggregated"),
    "unseen users, recalibrated": ("unseen", "recalibrated"),
}

#: Initial statistics for an unseen user: name -> (title, description).
STARTS = {
    "initial": ("initial", "statistics of the model as built"),
    "mean": ("clients' mean", "mean of the statistics that the clients sent last"),
    "pooled": ("pooled", "the same mean, with the variance of the pooled data"),
    "nearest": ("nearest client", "statistics of the client whose moments are nearest to the user's own"),
    "mixture": ("mixture", "all clients, weighted by the inverse of that distance"),
    "prior": ("prior-mixed", "pooled, mixed with the user's own by an empirical-Bayes weight per channel"),
}

#: Metrics of results that do not list theirs, and whether higher is better.
METRICS = {"accuracy": True, "macro_f1": True, "loss": False}

#: A user counts as better or worse off when the difference exceeds one point, or 1 % of a reference above 1.
POINT = 0.01
#: Numbers of domains for which results by domain are shown.
DOMAINS = range(2, 13)

T = TypeVar("T")


def _cached(method: Callable[[Matrix, str], T]) -> Callable[..., T]:
    """Compute once per metric and return copies: the answer, tables and figures share results.

    The default metric is the one that is displayed.
    """

    @wraps(method)
    def cached(self: Matrix, metric: str = "") -> T:
        metric = metric or self.metric
        key = (method.__name__, metric)
        if key not in self._cache:
            self._cache[key] = method(self, metric)
        return copy.copy(self._cache[key])

    return cached


@dataclass(frozen=True, eq=False, repr=False)
class Matrix:
    """Results of every strategy on every user, in every row and column.

    Attributes:
        meta: metadata of the comparison: its ``strategies``, in display order, ``columns``, ``metrics`` and ``metric``.
        evaluations: one line per run x user x row x column: n, and the metrics.
    """

    meta: dict[str, Any]
    evaluations: pd.DataFrame
    _cache: dict[tuple[str, str], Any] = field(default_factory=dict, kw_only=True)

    @property
    def strategies(self) -> list[str]:
        """Labels in display order; the first is the reference of paired comparisons."""
        return list(self.meta["strategies"])

    @cached_property
    def names(self) -> dict[str, str]:
        """Readable name of each strategy by label; no two are the same."""
        return distinct_names(self.strategies)

    @property
    def reference(self) -> str:
        """The strategy that all others are compared with."""
        return self.strategies[0]

    @property
    def reference_name(self) -> str:
        """Readable name of the reference."""
        return self.names[self.reference]

    @property
    def metrics(self) -> dict[str, bool]:
        """All metrics, and whether higher is better. Learning curves show the first."""
        return dict(self.meta.get("metrics", METRICS))

    @property
    def metric(self) -> str:
        """The metric that is displayed by default."""
        return str(self.meta.get("metric") or next(iter(self.metrics)))

    def higher_is_better(self, metric: str = "") -> bool:
        """The direction of a metric.

        Raises:
            UserError: unknown metric.
        """
        if (metric or self.metric) not in self.metrics:
            raise unknown("metric", metric or self.metric, self.metrics)
        return self.metrics[metric or self.metric]

    @cached_property
    def cells(self) -> list[tuple[str, str]]:
        """The (row, column) pairs that at least one strategy has, in display order."""
        present = set(zip(self.evaluations["row"], self.evaluations["column"]))
        present |= {("worst", column) for row, column in present if row == "own"}
        return [(row, column) for row in ROWS for column in self.meta["columns"] if (row, column) in present]

    def values(self, strategy: str, row: str, column: str, metric: str = "") -> pd.DataFrame:
        """Users x seeds of one cell; empty if the strategy does not have it. ``worst`` uses ``own``."""
        return self._cube(metric).get((strategy, "own" if row == "worst" else row, column), pd.DataFrame())

    @_cached
    def matrix(self, metric: str = "") -> pd.DataFrame:
        """The evaluation matrix: one line per strategy, row and column.

        Returns:
            strategy, row, column, mean; ci_low, ci_high (95 %, users resampled); seed_sd, seed_low,
            seed_high (95 %, over seeds); n_users, n_seeds. A cell that a strategy does not have is NaN with n 0.

        Raises:
            UserError: unknown metric.
        """
        lines = []
        for strategy in self.strategies:
            for row, column in self.cells:
                values = self.values(strategy, row, column, metric).to_numpy()
                result = estimate(_statistic(row, self.higher_is_better(metric)), values) if values.size else Estimate()
                lines.append((strategy, row, column, *_flat(result)))
        return pd.DataFrame(lines, columns=["strategy", "row", "column", "mean", *_INTERVALS])

    @_cached
    def paired(self, metric: str = "") -> pd.DataFrame:
        """Each strategy against the reference, user by user, on the users and seeds they have in common.

        Returns:
            strategy, reference, row, column, difference (strategy minus reference); ci_low, ci_high
            (95 %, users resampled); seed_sd, seed_low, seed_high (95 %, over seeds); n_users, n_seeds;
            p (Wilcoxon signed-rank over users), p_adjusted (Benjamini-Hochberg over this table);
            better, worse (users that gain or lose more than one point); both_low, both_high (95 %, users and seeds
            resampled); detectable (smallest true difference that is found with a probability of 80 % with so many
            users, or seeds if all users share one observation per seed). ``worst`` has no per-user differences,
            hence only intervals.

        Raises:
            UserError: unknown metric.
        """
        lines = []
        for strategy in self.strategies[1:]:
            for row, column in self.cells:
                reference = self.values(self.reference, row, column, metric)
                x, y = common(self.values(strategy, row, column, metric), reference)
                result = contrast(x, y, row, self.higher_is_better(metric))
                line = (strategy, self.reference, row, column, *_flat(result))
                if row == "worst" or not x.size:
                    lines.append((*line, math.nan, pd.NA, pd.NA, math.nan, math.nan, math.nan))
                    continue
                gap = x - y
                by_user = np.nanmean(gap, axis=1)
                gain = by_user if self.higher_is_better(metric) else -by_user
                point = POINT * max(1.0, float(np.nanmean(np.abs(reference.to_numpy()))))
                better, worse = int((gain > point).sum()), int((gain < -point).sum())
                # Repeats of one observation are no sample of users; a difference of exactly 0 is still valid.
                repeated = by_user.any() and uniform(gap)
                p = math.nan if repeated else signed_rank(by_user)
                both = crossed_interval(gap)
                found = detectable(np.nanmean(gap, axis=0) if repeated else by_user)
                lines.append((*line, p, better, worse, *both, found))
        columns = ["strategy", "reference", "row", "column", "difference", *_INTERVALS, "p", "better", "worse"]
        frame = pd.DataFrame(lines, columns=[*columns, "both_low", "both_high", "detectable"]).astype(
            {"p": "float64", "better": "Int64", "worse": "Int64"}
        )
        frame.insert(frame.columns.get_loc("p") + 1, "p_adjusted", adjust(frame["p"]))
        return frame

    @property
    def unlearned(self) -> list[str]:
        """Strategies whose network did not learn: no mean accuracy of theirs reaches ``floor`` of the metadata.

        The floor is the share of the most frequent class, plus a third of the rest. It exists for classification only.
        """
        floor = self.meta.get("floor")
        if floor is None or "accuracy" not in self.metrics:
            return []
        lines = self.evaluations[self.evaluations["column"].isin(self.meta["columns"])]
        users = lines.groupby(["strategy", "row", "column", "user"])["accuracy"].mean()
        best = users.groupby(["strategy", "row", "column"]).mean().groupby("strategy").max()
        return [s for s in self.strategies if best.get(s, math.nan) < floor]

    def differences(self, strategy: str, row: str, column: str, metric: str = "") -> pd.Series:
        """Strategy minus reference by user, mean over common seeds, ascending; empty if there is no such cell."""
        a, b = (self.values(s, row, column, metric) for s in (strategy, self.reference))
        return (a - b).mean(axis=1).dropna().sort_values()

    @_cached
    def clear_best(self, metric: str = "") -> set[tuple[str, str, str]]:
        """The (strategy, row, column) that beat every other strategy, each paired interval excluding 0.

        With fewer than `MIN_USERS` users in common, no strategy is clearly the best.
        """
        sign = 1 if self.higher_is_better(metric) else -1
        clear = set()
        for (row, column), lines in self.matrix(metric).dropna(subset="mean").groupby(["row", "column"]):
            best, *others = lines.sort_values("mean", ascending=sign < 0)["strategy"]
            # The closest strategy first: it decides most cells.
            gaps = (self.contrast(best, other, row, column, metric) for other in others)
            if others and all(
                gap.n_users >= MIN_USERS and gap.users.excludes_zero and sign * gap.value > 0 for gap in gaps
            ):
                clear.add((best, row, column))
        return clear

    def by_domain(self, metric: str = "") -> pd.DataFrame:
        """The matrix by domain if there are 2 to 12 domains; otherwise empty.

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
                names = domain.reindex(frame.index).to_numpy()
                for name in np.unique(names):
                    values = frame.to_numpy()[names == name]
                    # A domain that is unseen in a seed has no own test in it.
                    result = estimate(mean_of_users, values[:, ~np.isnan(values).all(axis=0)])
                    lines.append((strategy, row, column, name, result.value, *result.users, result.n_users))
        return pd.DataFrame(
            lines, columns=["strategy", "row", "column", "domain", "mean", "ci_low", "ci_high", "n_users"]
        )

    @_cached
    def starts(self, metric: str = "") -> pd.DataFrame:
        """Results of unseen users by their initial statistics, before any adaptation.

        Returns:
            strategy, start (a key of `STARTS`), mean, ci_low, ci_high, n_users; only strategies that send statistics.
        """
        lines = []
        for strategy in self.strategies:
            for start in STARTS:
                values = self.values(strategy, "unseen", start, metric).to_numpy()
                if values.size:
                    result = estimate(mean_of_users, values)
                    lines.append((strategy, start, result.value, *result.users, result.n_users))
        return pd.DataFrame(lines, columns=["strategy", "start", "mean", "ci_low", "ci_high", "n_users"])

    def _cube(self, metric: str) -> dict[tuple[str, str, str], pd.DataFrame]:
        """Users x seeds by (strategy, row, column). Computed once per metric; not to be changed."""
        metric = metric or self.metric
        self.higher_is_better(metric)
        if ("cube", metric) not in self._cache:
            self._cache["cube", metric] = _cubes(self.evaluations.dropna(subset=metric), metric)
        return cast("dict[tuple[str, str, str], pd.DataFrame]", self._cache["cube", metric])

    def contrast(self, strategy: str, other: str, row: str, column: str, metric: str = "") -> Estimate:
        """One strategy minus another on the users and seeds they have in common."""
        a, b = (self.values(s, row, column, metric) for s in (strategy, other))
        return contrast(*common(a, b), row, self.higher_is_better(metric))


def _cubes(lines: pd.DataFrame, metric: str) -> dict[tuple[str, str, str], pd.DataFrame]:
    """The table users x seeds of each cell: `pandas.DataFrame.pivot` of each, which takes many times longer."""
    users, seeds = (pd.factorize(lines[name], sort=True) for name in ("user", "seed"))
    values = lines[metric].to_numpy()
    known: dict[tuple[str, bytes], pd.Index] = {}  # cells with the same users share an index, which is fast to compare

    def axis(name: str, codes: np.ndarray, labels: Any) -> tuple[pd.Index, np.ndarray]:
        present, positions = np.unique(codes, return_inverse=True)
        key = name, present.tobytes()
        if key not in known:
            known[key] = pd.Index(labels[present], name=name)
        return known[key], positions

    cubes = {}
    for key, rows in lines.groupby(["strategy", "row", "column"], sort=False).indices.items():
        index, user = axis("user", users[0][rows], users[1])
        columns, seed = axis("seed", seeds[0][rows], seeds[1])
        table = np.full((len(index), len(columns)), np.nan)
        table[user, seed] = values[rows]
        cubes[cast("tuple[str, str, str]", key)] = pd.DataFrame(table, index, columns, copy=False)
    return cubes


def contrast(x: np.ndarray, y: np.ndarray, row: str, higher_is_better: bool = True) -> Estimate:
    """One cell minus another, each ``[users, seeds]`` as `common` returns them."""
    if not x.size:
        return Estimate()
    if row == "worst":
        return estimate(_statistic(row, higher_is_better), x, y)
    result = estimate(mean_of_users, x - y)
    # If no user differs, the interval is known exactly.
    return result._replace(users=Interval(0.0, 0.0)) if not np.nan_to_num(x - y).any() else result


_INTERVALS = ["ci_low", "ci_high", "seed_sd", "seed_low", "seed_high", "n_users", "n_seeds"]


def _flat(result: Estimate) -> tuple[float, ...]:
    """The value, followed by the columns `_INTERVALS`."""
    return (result.value, *result.users, result.seed_sd, *result.seeds, result.n_users, result.n_seeds)


def _statistic(row: str, higher_is_better: bool) -> Statistic:
    """The statistic of a row; where lower is better, the worst users are those with the highest values."""
    if row != "worst":
        return mean_of_users
    return worst_of_users if higher_is_better else highest_of_users


def common(a: pd.DataFrame, b: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Values of two cells (`Matrix.values`) on the users and seeds in common, with NaN where one of them misses."""
    if not (a.index.equals(b.index) and a.columns.equals(b.columns)):
        a, b = a.align(b, join="inner")
    x, y = a.to_numpy(float), b.to_numpy(float)
    both = ~(np.isnan(x) | np.isnan(y))
    rows, columns = both.any(axis=1), both.any(axis=0)
    x, y = (np.where(both, values, np.nan)[rows][:, columns] for values in (x, y))
    return x, y
