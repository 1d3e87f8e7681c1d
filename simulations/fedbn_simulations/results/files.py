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
