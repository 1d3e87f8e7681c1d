"""Files of a comparison's results directory. Writes are atomic, and every file has a checksum.

::

    comparison.json         title, strategies (the first is the reference), seeds, settings, hashes
    runs/<id>/result.json   one finished run: one strategy with one seed
    shift.json              measured differences between users (optional)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fedbn.errors import UserError
from fedbn.files import read_json, write_json
from fedbn_simulations.results.labels import distinct_names

MAX_NAMES = 3
"""Number of strategies that a notice lists by name."""


def write_comparison(directory: Path, meta: dict[str, Any]) -> None:
    """Write ``comparison.json``; call this first, so that an interrupted comparison can be read."""
    write_json(Path(directory) / "comparison.json", _finite(meta))


def write_run(directory: Path, run: str, result: dict[str, Any]) -> None:
    """Write ``runs/<run>/result.json`` atomically: a run with this file is finished."""
    write_json(Path(directory) / "runs" / run / "result.json", _finite(result))


def write_shift(directory: Path, shift: dict[str, Any]) -> None:
    """Write ``shift.json``: the measured differences between users."""
    write_json(Path(directory) / "shift.json", _finite(shift))


def _finite(value: Any) -> Any:
    """Replace NaN and infinity by null, so that other tools can read the file even if a loss diverged."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summarize_convergence(runs: pd.DataFrame) -> list[str]:
    """One notice on the rounds after which training converged; none if no run did.

    >>> runs = pd.DataFrame({"strategy": ["fedbn", "fedbn", "silobn"], "rounds": [30, 40, 50]})
    >>> summarize_convergence(runs.assign(convergence=["converged", "converged", "not converged"]))
    ['training converged, and stopped, after these rounds (--patience): fedbn 30 to 40']
    """
    stopped = runs[runs["convergence"] == "converged"].groupby("strategy", sort=False)["rounds"]
    spans = [(name, min(rounds), max(rounds)) for name, rounds in stopped]
    texts = [f"{name} {low}" + (f" to {high}" if high > low else "") for name, low, high in spans]
    return [f"training converged, and stopped, after these rounds (--patience): {', '.join(texts)}"] if texts else []


def summarize_notices(runs: Sequence[dict[str, Any]], known: Sequence[str] = ()) -> list[str]:
    """The notices of runs without duplicates, each with the strategies and seeds it applies to.

    >>> runs = [{"strategy": name, "seed": 0, "notices": ["few rows"]} for name in ("fedbn", "silobn")]
    >>> summarize_notices(runs), summarize_notices(runs[:1]), summarize_notices(runs, known=["few rows"])
    (['FedBN, SiloBN, seed 0: few rows'], ['FedBN, seed 0: few rows'], [])
    """
    by_notice: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for notice in run.get("notices", []):
            if notice not in known:
                by_notice.setdefault(notice, []).append(run)
    lines = []
    known_names = distinct_names(run["strategy"] for run in runs)
    for notice, affected in by_notice.items():
        names = list(dict.fromkeys(known_names[run["strategy"]] for run in affected))
        seeds = sorted({run["seed"] for run in affected})
        lines.append(f"{format_names(names)}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}: {notice}")
    return lines


def recompute(directory: Path) -> str:
    """The remedy for a damaged result."""
    return f"`fedbn resume {directory}` computes it again"


def format_names(names: Sequence[str]) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def finished_runs(directory: Path, meta: dict[str, Any]) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """(id, result) of the finished runs in display order, and the ids of runs that belong to no strategy and seed."""
    found: dict[tuple[str, int], tuple[str, dict[str, Any]]] = {}
    foreign = []
    for path in sorted((directory / "runs").glob("*/result.json")):
        run, result = path.parent.name, read_json(path, recompute(directory))
        pair = (result["strategy"], result["seed"])
        if result["rounds"] in meta.get("extends", ()):
            continue  # a run of fewer rounds, which is being extended
        if pair[0] not in meta["strategies"] or pair[1] not in meta["seeds"]:
            foreign.append(run)
        elif pair in found:
            raise UserError(
                f"{directory} has two results of strategy {pair[0]!r} with seed {pair[1]}: "
                f"delete runs/{found[pair][0]} or runs/{run}"
            )
        else:
            found[pair] = (run, result)
    planned = [(strategy, seed) for strategy in meta["strategies"] for seed in meta["seeds"]]
    return [found[pair] for pair in planned if pair in found], foreign


def lines_table(runs: list[tuple[str, dict[str, Any]]], key: str, types: dict[str, str]) -> pd.DataFrame:
    """Concatenate the lists ``result[key]`` of all runs, with the strategy and seed of each run in front."""
    records = [
        {"strategy": result["strategy"], "seed": result["seed"], **{name: line.get(name) for name in types}}
        for _, result in runs
        for line in result[key]
    ]
    frame = pd.DataFrame(records, columns=["strategy", "seed", *types])
    return frame.astype({"strategy": "str", "seed": "int64", **types})


def expand_shared_models(evaluations: pd.DataFrame) -> pd.DataFrame:
    """Copy the global test of a shared model to every seen user.

    A run tests a shared model on the pooled data once and records the result for its first user. Without a line for
    every user, it could be compared with a strategy that has one model per user on a single user only.
    """
    run = ["strategy", "seed"]
    cell = [*run, "column"]
    single = evaluations[evaluations["row"] == "global"].drop_duplicates(cell, keep=False)
    seen = evaluations.loc[evaluations["row"] == "own", [*run, "user", "domain"]].drop_duplicates()
    expanded = single.drop(columns=["user", "domain"]).merge(seen, on=run)[evaluations.columns]
    return pd.concat([evaluations.drop(single.index), expanded], ignore_index=True)


def runs_table(runs: list[tuple[str, dict[str, Any]]]) -> pd.DataFrame:
    """One line per run: its identity and cost."""
    keys = ["strategy", "seed", "lr", "seconds", "rounds", "newcomer"]
    # An app has neither an lr, CPU seconds nor a rule of convergence.
    frame = pd.DataFrame(
        [
            {"run": run, **{key: result[key] for key in keys}}
            | {key: result.get(key) for key in ("cpu_seconds", "convergence")}
            for run, result in runs
        ]
    )
    return frame.astype({"lr": "float64", "cpu_seconds": "float64"})


def ownership_table(runs: list[tuple[str, dict[str, Any]]]) -> pd.DataFrame:
    """Ownership by strategy; it follows from model and strategy and is the same for every seed."""
    first = {result["strategy"]: result["ownership"] for _, result in reversed(runs)}
    keys = ["role", "owner", "entries", "elements", "bytes", "bytes_down", "bytes_up"]
    records = [
        {"strategy": strategy, **{key: line[key] for key in keys}}
        for strategy in dict.fromkeys(result["strategy"] for _, result in runs)
        for line in first[strategy]
    ]
    return pd.DataFrame(records, columns=["strategy", *keys])
