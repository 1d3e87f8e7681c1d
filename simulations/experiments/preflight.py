"""Checks of an experiment before work starts, and its default results directory."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedbn.errors import UserError
from fedbn.federation.run import Run
from fedbn.federation.setup import build_context
from simulations.experiments.experiment import Experiment

LEFT_OUT = "Left out:"
"""Begins the notice about a strategy that cannot work on an experiment's users or model."""


def default_place(experiment: Experiment) -> Path:
    """Where results go that nobody has named a place for: the same settings always come back to the same place.

    ``results/SCENARIO``, or with a digest of the settings behind it where that holds another comparison already.
    """
    place = Path("results") / experiment.scenario.partition(":")[0]
    if not (place / "comparison.json").exists() or _stored(place) == experiment.to_dict():
        return place
    digest = hashlib.sha256(json.dumps(experiment.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
    return place.with_name(f"{place.name}-{digest}")


def _stored(place: Path) -> Any:
    return json.loads((place / "comparison.json").read_text(encoding="utf-8")).get("experiment")


def _firsts(experiment: Experiment, strategy: str) -> list[Run]:
    """A strategy's first run, and that of its tuning, which has fewer users and fewer rows of each."""
    tuning = [experiment.run(strategy, 0, lr=experiment.tune[0], validation=True)] if experiment.tune else []
    return [experiment.run(strategy, 0), *tuning]


def preflight(experiment: Experiment, out: Path) -> list[str]:
    """Check everything that can be checked before work starts; returns notices.

    Raises:
        UserError: anything that would fail later.
    """
    notices: list[str] = []
    for strategy in experiment.strategies:
        for run in _firsts(experiment, strategy):
            notices += [n for n in build_context(run).notices if n not in notices]
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another --out") from None
    if (out / "comparison.json").exists() and _stored(out) != experiment.to_dict():
        raise UserError(f"{out} holds another comparison; choose another --out, or delete it")
    return notices


def suited(experiment: Experiment) -> tuple[Experiment, list[str]]:
    """The experiment without the strategies that cannot work on its users or model, and why not.

    Raises:
        UserError: none can.
    """
    kept, notices = [], []
    for strategy in experiment.strategies:
        try:
            for run in _firsts(experiment, strategy):
                build_context(run)
            kept.append(strategy)
        except UserError as error:
            notices.append(f"{LEFT_OUT} {strategy}: {error}")
    if not kept:
        raise UserError(f"no strategy can work here: {notices[0]}")
    return replace(experiment, strategies=tuple(kept)), notices
