"""The result directory of a comparison: what is written, how it is read, and the statistics over it.

A comparison runs every strategy with the same seeds on the same users. The *user* is the unit of
inference: intervals come from resampling users with all their seeds kept together (a cluster
bootstrap), and strategies are compared user by user (paired). Seeds say how much of a mean is luck of
initialisation and sampling; they get their own interval. Nothing is chosen on test data.

::

    comparison.json         title, strategies (the first is the reference), seeds, settings, hashes
    runs/<id>/result.json   one finished run: one strategy with one seed
    shift.json              how far users are apart (optional)
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from scipy import stats

from fedbn.errors import UserError, unknown

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
    "aggregated": ("as aggregated", "normalisation statistics as training left them"),
    "recalibrated": (
        "recalibrated",
        "statistics estimated again under the final weights, without labels, before the test",
    ),
    "online": ("adapted online", "statistics follow the user's unlabelled stream during the test"),
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
LEVEL = 0.95
RESAMPLES = 2000
#: Per-domain results are shown for this many domains; beyond, a domain is as good as a user.
DOMAINS = range(2, 13)

Statistic = Callable[..., np.ndarray]
T = TypeVar("T")


class Interval(NamedTuple):
    """Lower and upper end; NaN where the data admit none."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside; False for an interval that does not exist."""
        return self.low > 0 or self.high < 0


NO_INTERVAL = Interval(math.nan, math.nan)


# ---------------------------------------------------------------- writing


def write_comparison(directory: Path, meta: dict[str, Any]) -> None:
    """Write ``comparison.json``; call it first, so that an interrupted comparison can be read."""
    _write(Path(directory) / "comparison.json", meta)


def write_run(directory: Path, run: str, result: dict[str, Any]) -> None:
    """Write ``runs/<run>/result.json``, whole or not at all: a run with this file is a finished run."""
    _write(Path(directory) / "runs" / run / "result.json", result)


def write_shift(directory: Path, shift: dict[str, Any]) -> None:
    """Write ``shift.json``: the measured distance between users."""
    _write(Path(directory) / "shift.json", shift)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(_finite(value), indent=1, allow_nan=False), encoding="utf-8")
    os.replace(partial, path)


def _finite(value: Any) -> Any:
    """NaN and infinity as null: a diverged loss must not make the file unreadable for other tools."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}). Delete it and run the comparison again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (no JSON object). Delete it and run the comparison again")
    return value


# ---------------------------------------------------------------- statistics


def mean_of_users(values: np.ndarray) -> np.ndarray:
    """Mean over users of each user's mean over seeds.

    Args:
        values: ``[..., users, seeds]``, NaN where a user was not evaluated in a seed; no user all NaN.

    >>> float(mean_of_users(np.array([[0.5, 0.7], [0.8, np.nan]])))
    0.7
    """
    return np.nanmean(values, axis=-1).mean(axis=-1)


def worst_of_users(values: np.ndarray) -> np.ndarray:
    """Mean of the lowest tenth of users (rounded down, at least one) of each seed, then over seeds.

    Args:
        values: ``[..., users, seeds]``, NaN where a user was not evaluated in a seed.

    >>> float(worst_of_users(np.array([[0.5, 0.7], [0.8, 0.3]])))
    0.4
    """
    ordered = np.sort(values, axis=-2)  # NaN goes last
    present = (~np.isnan(values)).sum(axis=-2, keepdims=True)
    tenth = np.minimum(np.maximum(1, present // 10), present)
    chosen = np.arange(values.shape[-2])[:, None] < tenth
    total = np.where(chosen, ordered, 0.0).sum(axis=-2)
    size = tenth[..., 0, :]
    return np.nanmean(np.where(size > 0, total / np.maximum(size, 1), np.nan), axis=-1)


def uniform(values: np.ndarray) -> bool:
    """Whether ``[users, seeds]`` hold one observation a seed, repeated for several users.

    So it is where all users hold one model and meet the same test data. Users may be in different seeds,
    and then their means differ although nothing distinguishes the users.

    >>> uniform(np.array([[0.8, 0.7], [0.8, np.nan]])), uniform(np.array([[0.8, np.nan], [np.nan, 0.7]]))
    (True, False)
    """
    present = (~np.isnan(values)).sum(axis=0)
    spread = np.nanmax(values, axis=0) - np.nanmin(values, axis=0)
    return bool((present > 1).any() and (spread < 1e-12).all())


def user_interval(statistic: Statistic, *samples: np.ndarray) -> Interval:
    """Percentile interval of a statistic when users are resampled, their seeds kept together.

    With one user, or where users do not differ at all, resampling says nothing: the interval is NaN.

    Args:
        statistic: maps arrays ``[..., users, seeds]`` to ``[...]``.
        samples: ``[users, seeds]`` each, the same users in the same order.
    """
    users = len(samples[0])
    if users < 2 or all(uniform(values) or np.ptp(np.nanmean(values, axis=1)) < 1e-12 for values in samples):
        return NO_INTERVAL

    def resampled(index: np.ndarray, axis: int) -> np.ndarray:
        del axis  # users are the last axis of the index, and so the last but one of what it takes
        return statistic(*(values[index.astype(int)] for values in samples))

    low, high = stats.bootstrap(
        (np.arange(users),),
        resampled,
        vectorized=True,
        method="percentile",
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        # With thousands of users all resamples at once would not fit into memory.
        batch=max(1, 4_000_000 // samples[0].size),
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(float(low), float(high))


def seed_interval(per_seed: np.ndarray) -> tuple[float, Interval]:
    """Standard deviation over seeds, and Student's t interval of their mean; NaN for one seed."""
    count = len(per_seed)
    if count < 2:
        return math.nan, NO_INTERVAL
    sd = float(np.std(per_seed, ddof=1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * sd / math.sqrt(count)
    centre = float(np.mean(per_seed))
    return sd, Interval(centre - half, centre + half)


class Estimate(NamedTuple):
    """A statistic with its interval over users, and its spread and interval over seeds."""

    value: float = math.nan
    users: Interval = NO_INTERVAL
    seed_sd: float = math.nan
    seeds: Interval = NO_INTERVAL
    n_users: int = 0
    n_seeds: int = 0


def estimate(statistic: Statistic, *samples: np.ndarray) -> Estimate:
    """The statistic of ``[users, seeds]`` samples; all have NaN at the same places, no user is all NaN.

    >>> found = estimate(mean_of_users, np.array([[0.5, 0.7], [0.8, 0.6]]))
    >>> round(found.value, 3), round(found.seed_sd, 3), found.n_users, found.n_seeds
    (0.65, 0.0, 2, 2)
    """
    n_users, n_seeds = samples[0].shape
    present = ~np.isnan(samples[0])
    per_seed = np.array(
        [float(statistic(*(values[present[:, s], s : s + 1] for values in samples))) for s in range(n_seeds)]
    )
    sd, seeds = seed_interval(per_seed)
    return Estimate(float(statistic(*samples)), user_interval(statistic, *samples), sd, seeds, n_users, n_seeds)


def signed_rank(differences: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; 1 if nothing differs, NaN if all differ by the same.

    The same non-zero difference for every user (two shared models on one shared test set) is one
    observation, not many; a p-value that counts it once per user would be made up.

    >>> signed_rank(np.zeros(5)), signed_rank(np.array([0.3])), signed_rank(np.full(30, 0.1))
    (1.0, nan, nan)
    """
    # Rounding makes ties out of differences that only floating point tells apart.
    differences = np.round(differences, 12)
    if not differences.any():
        return 1.0
    if np.ptp(differences) == 0:
        return math.nan
    return float(stats.wilcoxon(differences).pvalue)


def adjust(p: pd.Series) -> pd.Series:
    """Benjamini-Hochberg adjusted p-values over those that exist.

    >>> adjust(pd.Series([0.01, np.nan, 0.04])).tolist()
    [0.02, nan, 0.04]
    """
    adjusted = p.astype(float).copy()
    known = adjusted.notna()
    if known.any():
        adjusted[known] = stats.false_discovery_control(adjusted[known].to_numpy())
    return adjusted


# ---------------------------------------------------------------- reading


def _remembered(method: Callable[[Comparison, str], T]) -> Callable[..., T]:
    """Compute once per metric and hand out copies: answer, tables and figures all ask for the same."""

    @wraps(method)
    def remembered(self: Comparison, metric: str = "accuracy") -> T:
        key = (method.__name__, metric)
        if key not in self._memo:
            self._memo[key] = method(self, metric)
        return copy.copy(self._memo[key])

    return remembered


@dataclass(frozen=True, eq=False)
class Comparison:
    """A comparison as read from its directory.

    Attributes:
        directory: where it was read from.
        meta: ``comparison.json``.
        shift: ``shift.json``, empty if there is none.
        runs: one line per finished run: run, strategy, seed, lr, seconds, rounds, newcomer.
        evaluations: one line per run x user x row x column: n, accuracy, macro_f1, loss.
        curves: one line per run and evaluated round: train_loss, own, unseen.
        ownership: one line per strategy and role: owner, entries, elements, and bytes per client and round.
        missing: number of (strategy, seed) pairs without a finished run.
        notices: what a reader should know, of the comparison and of its runs.
    """

    directory: Path
    meta: dict[str, Any]
    shift: dict[str, Any]
    runs: pd.DataFrame
    evaluations: pd.DataFrame
    curves: pd.DataFrame
    ownership: pd.DataFrame
    missing: int
    notices: tuple[str, ...]
    _memo: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, directory: str | Path) -> Comparison:
        """Read a result directory; unfinished runs are skipped and counted.

        Raises:
            UserError: the directory is no comparison, a file is damaged, or no run is finished.
        """
        directory = Path(directory)
        if not (directory / "comparison.json").is_file():
            raise UserError(
                f"{directory} is no comparison: it has no comparison.json. Give the directory that the comparison wrote"
            )
        meta = _read(directory / "comparison.json")
        runs, foreign = _finished(directory, meta)
        if not runs:
            raise UserError(f"{directory} holds no finished run yet: run the comparison to the end first")
        planned = len(meta["strategies"]) * len(meta["seeds"])
        notices = list(meta.get("notices", []))
        if len(runs) < planned:
            notices.insert(0, f"{planned - len(runs)} of {planned} runs are not finished and left out.")
        if foreign:
            notices.append(f"Runs of no strategy and seed of this comparison, left out: {', '.join(foreign)}.")
        notices += [f"{r['strategy']}, seed {r['seed']}: {n}" for _, r in runs for n in r.get("notices", [])]
        shift = directory / "shift.json"
        return cls(
            directory=directory,
            meta=meta,
            shift=_read(shift) if shift.is_file() else {},
            runs=_runs(runs),
            evaluations=_held_by_all(
                _lines(
                    runs,
                    "evaluations",
                    {"user": "str", "domain": "str", "row": "str", "column": "str", "n": "int64"}
                    | dict.fromkeys(METRICS, "float64"),
                )
            ),
            curves=_lines(
                runs,
                "curve",
                {"round": "int64", "train_loss": "float64", "own": "float64", "unseen": "float64"},
            ),
            ownership=_ownership(runs),
            missing=planned - len(runs),
            notices=tuple(dict.fromkeys(notices)),
        )

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

    def traffic(self) -> pd.DataFrame:
        """Who owns what and what travels: one line per strategy and role, bytes per client and round."""
        return self.ownership.copy()

    def seconds(self) -> pd.DataFrame:
        """Cost by strategy: mean and sd (over seeds) of a run's seconds, seconds per round, lr, rounds."""
        grouped = self.runs.groupby("strategy", sort=False)
        return pd.DataFrame(
            {
                "mean": grouped["seconds"].mean(),
                "sd": grouped["seconds"].std(),
                "per_round": grouped["seconds"].sum() / grouped["rounds"].sum(),
                "rounds": grouped["rounds"].max(),
                "lr": grouped["lr"].agg(lambda rates: ", ".join(f"{r:g}" for r in sorted(set(rates)))),
                "n_seeds": grouped.size(),
            }
        ).reset_index()

    def wide(self, metric: str = "accuracy") -> pd.DataFrame:
        """The matrix as text for a page: statistics and strategy down, rows of the matrix across."""
        text = {
            (line.column, line.strategy, line.row): cell(line.mean, line.ci_low, line.ci_high)
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
                [(COLUMNS[column][0], strategy) for column, strategy in index],
                names=["statistics", "strategy"],
            ),
            columns=[ROWS[row][0] for row in rows],
        )

    def to_csv(self, path: str | Path, metric: str = "accuracy") -> None:
        """Write the long matrix with all its numbers, unrounded."""
        self.matrix(metric).to_csv(path, index=False)

    def to_markdown(self, metric: str = "accuracy") -> str:
        """The wide matrix as a Markdown table: mean and 95 % interval over users."""
        frame = self.wide(metric).reset_index()
        lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
        return "".join("| " + " | ".join(str(v).replace("|", "\\|") for v in line) + " |\n" for line in lines)

    def to_latex(self, metric: str = "accuracy") -> str:
        """The wide matrix as a LaTeX table (packages booktabs and multirow)."""
        return self.wide(metric).to_latex(
            escape=True,
            column_format="ll" + "l" * self.wide(metric).shape[1],
            caption=f"{metric.replace('_', ' ')}: mean over users [95\\% cluster bootstrap interval]",
        )

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
        a, b = a.align(b, join="inner")
        both = a.notna() & b.notna()
        kept = both.any(axis=1), both.any(axis=0)
        if not any(kept[0]):
            return Estimate()
        a, b = (frame.where(both).loc[kept].to_numpy() for frame in (a, b))
        if row == "worst":
            one = _statistic(row, metric)
            return estimate(lambda x, y: one(x) - one(y), a, b)
        found = estimate(mean_of_users, a - b)
        # No user differs at all: that is known exactly, not unknown.
        return found._replace(users=Interval(0.0, 0.0)) if not np.nan_to_num(a - b).any() else found


_SPREAD = ["ci_low", "ci_high", "seed_sd", "seed_low", "seed_high", "n_users", "n_seeds"]


def _flat(found: Estimate) -> tuple[float, ...]:
    """In the order value, then `_SPREAD`."""
    return (found.value, *found.users, found.seed_sd, *found.seeds, found.n_users, found.n_seeds)


def _statistic(row: str, metric: str) -> Statistic:
    """How users make up a row; the worst users of a loss are those with the highest."""
    if row != "worst":
        return mean_of_users
    return worst_of_users if METRICS[metric] else lambda values: -worst_of_users(-values)


def _finished(directory: Path, meta: dict[str, Any]) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """(id, result) of the finished runs in display order, and the ids of runs that do not belong here."""
    found: dict[tuple[str, int], tuple[str, dict[str, Any]]] = {}
    foreign = []
    for path in sorted((directory / "runs").glob("*/result.json")):
        run, result = path.parent.name, _read(path)
        pair = (result["strategy"], result["seed"])
        if pair[0] not in meta["strategies"] or pair[1] not in meta["seeds"]:
            foreign.append(run)
        elif pair in found:
            raise UserError(
                f"{directory} holds two results of strategy {pair[0]!r} with seed {pair[1]}: "
                f"delete runs/{found[pair][0]} or runs/{run}"
            )
        else:
            found[pair] = (run, result)
    planned = [(strategy, seed) for strategy in meta["strategies"] for seed in meta["seeds"]]
    return [found[pair] for pair in planned if pair in found], foreign


def _lines(runs: list[tuple[str, dict[str, Any]]], key: str, types: dict[str, str]) -> pd.DataFrame:
    """The lists ``result[key]`` of all runs under each other, with the run's strategy and seed in front."""
    records = [
        {"strategy": result["strategy"], "seed": result["seed"], **{name: line[name] for name in types}}
        for _, result in runs
        for line in result[key]
    ]
    frame = pd.DataFrame(records, columns=["strategy", "seed", *types])
    return frame.astype({"strategy": "str", "seed": "int64", **types})


def _held_by_all(evaluations: pd.DataFrame) -> pd.DataFrame:
    """Give every seen user the global test of the model that all of them hold.

    A run tests one model on the pooled data once, and writes it down under its first user. Every user holds
    that model; without their lines a strategy with a model for each user could be compared on one user only.
    """
    run = ["strategy", "seed"]
    cell = [*run, "column"]
    single = evaluations[evaluations["row"] == "global"].drop_duplicates(cell, keep=False)
    seen = evaluations.loc[evaluations["row"] == "own", [*run, "user", "domain"]].drop_duplicates()
    everybody = single.drop(columns=["user", "domain"]).merge(seen, on=run)[evaluations.columns]
    return pd.concat([evaluations.drop(single.index), everybody], ignore_index=True)


def _runs(runs: list[tuple[str, dict[str, Any]]]) -> pd.DataFrame:
    keys = ["strategy", "seed", "lr", "seconds", "rounds", "newcomer"]
    return pd.DataFrame([{"run": run, **{key: result[key] for key in keys}} for run, result in runs])


def _ownership(runs: list[tuple[str, dict[str, Any]]]) -> pd.DataFrame:
    """By strategy; it follows from model and strategy, so every seed has the same."""
    first = {result["strategy"]: result["ownership"] for _, result in reversed(runs)}
    keys = ["role", "owner", "entries", "elements", "bytes", "bytes_down", "bytes_up"]
    records = [
        {"strategy": strategy, **{key: line[key] for key in keys}}
        for strategy in dict.fromkeys(result["strategy"] for _, result in runs)
        for line in first[strategy]
    ]
    return pd.DataFrame(records, columns=["strategy", *keys])


# ---------------------------------------------------------------- numbers as text


def number(value: float, digits: int = 3) -> str:
    """A number for a table; an en dash for one that does not exist.

    >>> number(0.8824), number(1.0), number(-0.0312), number(float("nan"))
    ('.882', '1.000', '−.031', '–')
    """
    if not math.isfinite(value):
        return "–"
    text = f"{abs(value):.{digits}f}"
    sign = "−" if value < 0 and float(text) else ""
    return sign + (text[1:] if text.startswith("0.") else text)


def signed(value: float, digits: int = 3) -> str:
    """A difference for a table, always with its sign.

    >>> signed(0.0271), signed(-0.0271), signed(0.0)
    ('+.027', '−.027', '.000')
    """
    text = number(value, digits)
    return f"+{text}" if value > 0 and float(f"{value:.{digits}f}") else text


def bracket(low: float, high: float, style: Callable[[float], str] = number) -> str:
    """An interval for a table; empty for one that does not exist.

    >>> bracket(0.851, 0.913), bracket(float("nan"), float("nan"))
    ('[.851, .913]', '')
    """
    return f"[{style(low)}, {style(high)}]" if math.isfinite(low) and math.isfinite(high) else ""


def cell(value: float, low: float, high: float, style: Callable[[float], str] = number) -> str:
    """A value with its interval.

    >>> cell(0.882, 0.851, 0.913)
    '.882 [.851, .913]'
    """
    return f"{style(value)} {bracket(low, high, style)}".rstrip()
