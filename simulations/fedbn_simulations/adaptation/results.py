"""Results of an adaptation study: measures per user, summary, learning curves, files."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedbn.data.sensors import sensor_notices
from fedbn.federation.run import Run, task_of
from fedbn.federation.setup import build_context
from fedbn.files import write_atomically, write_json
from fedbn.online.prequential_metrics import cost, fading_mean, harmed, regret, scores, windows_to_close, worst_decile
from fedbn.online.traces import Trace
from fedbn_simulations.adaptation.cells import BOUNDS, SOURCE, Cell
from fedbn_simulations.adaptation.check import AUGMENTED, Decision
from fedbn_simulations.adaptation.metric import StudyMetric
from fedbn_simulations.adaptation.study import Results, Study
from fedbn_simulations.results.inference import adjust, estimate, mean_of_users, signed_rank
from fedbn_simulations.storage.provenance import NUMERICS, code_digest, versions

PARTS = (0.5, 0.8, 0.9)
"""Shares of the gap to the oracle; the windows needed to close them are reported.

It is the class-balanced oracle, or that of the whole stream for tasks without classes.
"""

KEYS = ("strategy", "seed", "stream", "start", "rule", "label", "user", "n")
"""Columns of a `users_frame` that are not measures."""


def label(cell: Cell) -> str:
    """Label of a cell in tables.

    >>> from fedbn.federation.run import Run
    >>> label(Cell(Run("hapt", "fedbn"), "unseen", "iid", "recording", "source"))
    'source, from recording'
    """
    return cell.rule if cell.start == "cold" else f"{cell.rule}, from {cell.start}"


def users_frame(results: Results) -> pd.DataFrame:
    """One row per user, strategy, seed, stream and rule: all measures of one trace."""
    lines = [
        {"strategy": c.run.strategy, "seed": c.run.seed, "stream": c.stream, "start": c.start, "rule": c.rule}
        | {"label": label(c), "user": t.user}
        | scores(t, task_of(c.run))
        for c, (traces, _) in results.items()
        for t in traces
    ]
    return pd.DataFrame(lines)


def metric_of(study: Study) -> StudyMetric:
    """The metric of a study's tables."""
    return StudyMetric.of(task_of(study), study.metric)


def summary(results: Results, users: pd.DataFrame, metric: StudyMetric) -> pd.DataFrame:
    """One row per strategy, stream and rule: means with intervals over users, harm, regret, tests, cost.

    A gain is positive where the metric is better than the source's.

    Args:
        results: results of a study.
        users: their `users_frame`.
        metric: the metric of intervals, harm, gains and tests.
    """
    lines: list[dict[str, Any]] = []
    shown, sign = metric.name, 1 if metric.higher_is_better else -1
    others = [c for c in users.columns if c not in (*KEYS, shown)]
    for (strategy, stream, name), part in users.groupby(["strategy", "stream", "label"], sort=False):
        base = users[(users["strategy"] == strategy) & (users["stream"] == stream) & (users["label"] == SOURCE)]
        table, baseline = (f.pivot_table(index="user", columns="seed", values=shown) for f in (part, base))
        baseline = baseline.reindex(index=table.index, columns=table.columns)
        found = estimate(mean_of_users, table.to_numpy())
        gains = sign * (table - baseline).to_numpy()
        gain = estimate(mean_of_users, gains)
        own = {c: r for c, r in results.items() if (c.run.strategy, c.stream, label(c)) == (strategy, stream, name)}
        facts = [f for _, f in own.values()]
        pairs = [(part[part["seed"] == s], base[base["seed"] == s]) for s in table.columns]
        adapted, source = (pd.concat([pair[i][shown] for pair in pairs]).tolist() for i in (0, 1))
        sizes = [f["bytes_per_user"] for f in facts if f["bytes_per_user"] is not None]
        spent = cost([t for traces, _ in own.values() for t in traces], max(sizes, default=math.nan))
        lines.append(
            {
                "strategy": strategy,
                "stream": stream,
                "rule": name,
                shown: found.value,
                "low": found.users.low,
                "high": found.users.high,
                **{c: _mean_of_users(part, c) for c in others},
                "worst_decile": float(
                    np.mean([worst_decile(list(a[shown].dropna()), metric.higher_is_better) for a, _ in pairs])
                ),
                "worst": float(sign * (sign * table).min(axis=None)),
                "harmed": harmed(adapted, source, metric.higher_is_better, metric.is_share),
                "gain": gain.value,
                "gain_low": gain.users.low,
                "gain_high": gain.users.high,
                "p": math.nan if name == SOURCE or name in BOUNDS else signed_rank(np.nanmean(gains, axis=1)),
                **_against_bounds(results, own),
                **_drift(facts),
                "questions": _mean([n for f in facts for n in f.get("questions", {}).values()]),
                "forgotten": _mean([f["forgotten"] for f in facts]),
                "reset_exact": all(f["reset_exact"] in (None, True) for f in facts),
                "includes_current": any(f["includes_current"] for f in facts),
                **asdict(spent),
                "users": found.n_users,
                "seeds": found.n_seeds,
            }
        )
    frame = pd.DataFrame(lines)
    # Corrected over all tests of all streams.
    frame["p_adjusted"] = adjust(frame["p"])
    return frame


def _mean_of_users(part: pd.DataFrame, column: str) -> float:
    """NaN if the measure is undefined for all users."""
    table = part.pivot_table(column, "user", "seed").to_numpy()
    return mean_of_users(table).item() if table.size else math.nan


def _against_bounds(results: Results, own: Results) -> dict[str, float | int | None]:
    """Regret against the oracles, and windows to close the gap to the last one, over all seeds."""

    def of(text: str) -> list[Trace]:
        return [t for c in own for t in results[Cell(c.run, c.users, c.stream, "cold", text)][0]]

    traces = [t for found, _ in own.values() for t in found]
    bounds = [bound for bound in BOUNDS if any(c.rule == bound for c in results)]
    out: dict[str, float | int | None] = {
        f"regret_{bound.removeprefix('bound-')}": regret(traces, of(SOURCE), of(bound)) for bound in bounds
    }
    for part in PARTS:
        out[f"windows_to_{part:.0%}"] = windows_to_close(part, traces, of(SOURCE), of(bounds[-1]))
    return out


def _drift(facts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Delays, missed changes and false alarms over all users and seeds; NaN without drift detection."""
    found = [alarms for f in facts for alarms in f.get("alarms", [])]
    return {
        "drift_delay": _mean([d for alarms in found for d in alarms["delays"]]),
        "drift_missed": _mean([alarms["missed"] for alarms in found]),
        "false_alarms_per_1000": _mean([alarms["false_per_1000"] for alarms in found]),
    }


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else math.nan


def metric_curve(results: Results, metric: str, longest: float = 0.9) -> pd.DataFrame:
    """Fading mean of the metric of single windows at each window, mean over users and seeds.

    The band is the normal 95 % interval of the paired difference to the source, drawn about the rule's mean, because
    users differ far more from each other than rules do.

    Args:
        results: results of a study.
        metric: name of the metric (`fedbn.tasks.Task.example_metric`).
        longest: share of the streams that must still be running at a window.
    """
    lines = []
    for kind, cells in group_cells(results).items():
        curves, baseline = [], []
        for cell in cells:
            reference = results[replace(cell, start="cold", rule=SOURCE)][0]
            curves += [fading_mean(t.values) for t in results[cell][0]]
            baseline += [fading_mean(t.values) for t in reference]
        end = int(np.quantile([len(c) for c in curves], 1 - longest))
        rule, base = (np.array([c[:end] for c in side if len(c) >= end]) for side in (curves, baseline))
        # Streams may begin with windows that are not scored.
        scored = np.flatnonzero(~np.isnan(rule).all(axis=0))
        rule, base = rule[:, scored], base[:, scored]
        mean = np.nanmean(rule, axis=0)
        half = 1.96 * np.nanstd(rule - base, axis=0) / math.sqrt(max(1, len(rule) - 1))
        of = dict(zip(("strategy", "stream", "start", "rule"), kind, strict=True))
        lines += [
            of | {"window": t + 1, metric: m, "low": m - h, "high": m + h}
            for t, m, h in zip(scored.tolist(), mean, half, strict=True)
        ]
    return pd.DataFrame(lines)


def group_cells(results: Results) -> dict[tuple[str, str, str, str], list[Cell]]:
    """Cells that differ only in their seed, by strategy, stream, start and rule."""
    out: dict[tuple[str, str, str, str], list[Cell]] = {}
    for cell in results:
        out.setdefault((cell.run.strategy, cell.stream, cell.start, cell.rule), []).append(cell)
    return out


def notices(study: Study) -> list[str]:
    """What was decided when the data of a study were read."""
    population = build_context(study.runs()[0]).population
    return [*population.notices, *sensor_notices(population)]


def write(
    out: Path, study: Study, results: Results, command: str, decisions: Mapping[Run, Decision] | None = None
) -> pd.DataFrame:
    """Write ``users``, ``summary`` and ``METRIC_curve`` as parquet, ``adapt.json``, and two figures.

    The curve is that of the metric of single windows, e.g. ``accuracy_curve`` or ``mae_curve``.

    Returns:
        The summary.
    """
    from fedbn_simulations.adaptation.plots import curve_figure, users_figure
    from fedbn_simulations.report.style import png

    metric = metric_of(study)
    users, curves = users_frame(results), metric_curve(results, metric.of_windows)
    found, curve = summary(results, users, metric), f"{metric.of_windows}_curve"
    tables = {"users": users, "summary": found, curve: curves}
    files = {f"{name}.parquet": frame.to_parquet(index=False) for name, frame in tables.items()}
    for name, content in files.items():
        write_atomically(out / name, content)
    record = {
        "study": asdict(study),
        "metric": metric.name,
        "command": command,
        "numerics": NUMERICS,
        "code": code_digest(),
        "versions": versions(),
        "files": {name: zlib.crc32(content) for name, content in files.items()},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "notices": notices(study),
        "auto": [
            {"strategy": run.strategy, "seed": run.seed} | decision.as_dict()
            for run, decision in (decisions or {}).items()
        ],
        "augmented": {
            f"{c.run.strategy}, seed {c.run.seed}": facts["augment"]
            for c, (_, facts) in results.items()
            if c.rule == AUGMENTED
        },
        "streams": {f"{c.stream}, seed {c.run.seed}": {t.user: t.digest for t in r[0]} for c, r in results.items()},
    }
    text = pd.Series(record | {"summary": found.to_dict(orient="records")}).to_json(indent=1)
    write_json(out / "adapt.json", json.loads(text))
    for name, figure in ((curve, curve_figure(curves, metric)), ("users", users_figure(users, found, metric))):
        write_atomically(out / f"{name}.png", png(figure))
    return found
