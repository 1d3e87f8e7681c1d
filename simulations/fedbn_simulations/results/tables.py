"""Tables of a comparison's finished runs, from their ``result.json``."""

from __future__ import annotations

from typing import Any

import pandas as pd


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
