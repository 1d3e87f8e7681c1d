"""The files of a comparison's result directory: written whole or not at all, read with checks.

::

    comparison.json         title, strategies (the first is the reference), seeds, settings, hashes
    runs/<id>/result.json   one finished run: one strategy with one seed
    shift.json              how far users are apart (optional)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fedbn.errors import UserError

NAMED = 3
"""Strategies that a notice names before it counts."""


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


def told(runs: Sequence[dict[str, Any]], known: Sequence[str] = ()) -> list[str]:
    """What runs have to say, each thing once, with the strategies and seeds that it is said of.

    >>> runs = [{"strategy": name, "seed": 0, "notices": ["few rows"]} for name in ("fedbn", "silobn")]
    >>> told(runs), told(runs[:1]), told(runs, known=["few rows"])
    (['fedbn, silobn, seed 0: few rows'], ['fedbn, seed 0: few rows'], [])
    """
    said: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for notice in run.get("notices", []):
            if notice not in known:
                said.setdefault(notice, []).append(run)
    lines = []
    for notice, saying in said.items():
        names = list(dict.fromkeys(run["strategy"] for run in saying))
        who = ", ".join(names) if len(names) <= NAMED else f"{', '.join(names[:NAMED])} and {len(names) - NAMED} more"
        seeds = sorted({run["seed"] for run in saying})
        lines.append(f"{who}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}: {notice}")
    return lines


def read(path: Path) -> dict[str, Any]:
    """One JSON object.

    Raises:
        UserError: the file is damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}). Delete it and run the comparison again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (no JSON object). Delete it and run the comparison again")
    return value


def finished(directory: Path, meta: dict[str, Any]) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """(id, result) of the finished runs in display order, and the ids of runs that do not belong here."""
    found: dict[tuple[str, int], tuple[str, dict[str, Any]]] = {}
    foreign = []
    for path in sorted((directory / "runs").glob("*/result.json")):
        run, result = path.parent.name, read(path)
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


def lines_table(runs: list[tuple[str, dict[str, Any]]], key: str, types: dict[str, str]) -> pd.DataFrame:
    """The lists ``result[key]`` of all runs under each other, with the run's strategy and seed in front."""
    records = [
        {"strategy": result["strategy"], "seed": result["seed"], **{name: line[name] for name in types}}
        for _, result in runs
        for line in result[key]
    ]
    frame = pd.DataFrame(records, columns=["strategy", "seed", *types])
    return frame.astype({"strategy": "str", "seed": "int64", **types})


def held_by_all(evaluations: pd.DataFrame) -> pd.DataFrame:
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


def runs_table(runs: list[tuple[str, dict[str, Any]]]) -> pd.DataFrame:
    """One line a run: what it was and what it cost."""
    keys = ["strategy", "seed", "lr", "seconds", "rounds", "newcomer"]
    return pd.DataFrame([{"run": run, **{key: result[key] for key in keys}} for run, result in runs])


def ownership_table(runs: list[tuple[str, dict[str, Any]]]) -> pd.DataFrame:
    """By strategy; it follows from model and strategy, so every seed has the same."""
    first = {result["strategy"]: result["ownership"] for _, result in reversed(runs)}
    keys = ["role", "owner", "entries", "elements", "bytes", "bytes_down", "bytes_up"]
    records = [
        {"strategy": strategy, **{key: line[key] for key in keys}}
        for strategy in dict.fromkeys(result["strategy"] for _, result in runs)
        for line in first[strategy]
    ]
    return pd.DataFrame(records, columns=["strategy", *keys])
