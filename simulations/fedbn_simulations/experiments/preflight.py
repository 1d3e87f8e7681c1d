"""Checks of an experiment before work starts, and its default results directory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedbn.errors import UserError
from fedbn.federation.setup import build_context
from fedbn.files import read_json
from fedbn_simulations.experiments.experiment import Experiment

LEFT_OUT = "Left out:"
"""Prefix of the notice about a strategy that does not support an experiment's users or model."""


def default_directory(experiment: Experiment) -> Path:
    """Default results directory. The same settings always map to the same directory.

    ``results/SCENARIO``, with a digest of the settings appended if that directory has another comparison.
    """
    directory = Path("results") / experiment.scenario.partition(":")[0]
    if not (directory / "comparison.json").exists() or _stored_experiment(directory) == experiment.to_dict():
        return directory
    digest = hashlib.sha256(json.dumps(experiment.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
    return directory.with_name(f"{directory.name}-{digest}")


def _stored_experiment(directory: Path) -> Any:
    remedy = "delete it and run the same comparison; finished runs are used"
    return read_json(directory / "comparison.json", remedy).get("experiment")


def _check(experiment: Experiment, strategy: str, is_first: bool) -> list[str]:
    """Check a strategy's first run, and its first tuning run, which has fewer users and fewer rows per user.

    The first strategy also tries the other candidates, because they do not depend on the strategy.
    """
    seed = experiment.seed_numbers[0]
    candidates = experiment.candidates()
    tried = candidates if is_first else candidates[:1]
    tuning = [experiment.run(strategy, seed, tuned=candidate, validation=True) for candidate in tried]
    return [notice for run in (experiment.run(strategy, seed), *tuning) for notice in build_context(run).notices]


def preflight(
    experiment: Experiment, out: Path, extends: Sequence[int] = (), checked: Sequence[str] | None = None
) -> list[str]:
    """Check the experiment before any run and return notices.

    Args:
        experiment: what to compare.
        out: results directory.
        extends: numbers of rounds of former versions of the experiment, which may be stored in ``out``.
        checked: notices of the runs, if they have been checked (`drop_unsupported`).

    Raises:
        UserError: a run would fail, or ``out`` cannot be used.
    """
    if checked is None:
        checked = [n for i, strategy in enumerate(experiment.strategies) for n in _check(experiment, strategy, i == 0)]
    notices = list(dict.fromkeys([*experiment.deviations(), *checked]))
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another --out") from None
    if (out / "comparison.json").exists():
        _check_stored(_stored_experiment(out), experiment, out, extends)
    return notices


def _check_stored(stored: Any, experiment: Experiment, out: Path, extends: Sequence[int]) -> None:
    """Raise an error unless ``out`` has this experiment, perhaps with fewer seeds or with rounds that it extends."""
    new = experiment.to_dict()
    if stored and set(Experiment.from_dict(stored).seed_numbers) <= set(experiment.seed_numbers):
        stored = {**stored, "seeds": new["seeds"]}
    if stored == new:
        return
    advice, rounds = "choose another --out, or delete it", experiment.plan.rounds
    if stored and {**stored, "plan": {**stored["plan"], "rounds": rounds}} == new:
        if stored["plan"]["rounds"] in extends:
            return
        if stored["plan"]["rounds"] < rounds:
            advice = f"extend it with `fedbn resume {out} --rounds {rounds}`"
    raise UserError(f"{out} has another comparison; {advice}")


def drop_unsupported(experiment: Experiment) -> tuple[Experiment, list[str]]:
    """Drop strategies that do not support the experiment's users or model.

    Returns:
        The experiment, and a notice for each dropped strategy, followed by those of the runs of the others.

    Raises:
        UserError: no strategy is supported.
    """
    supported: list[str] = []
    notices: list[str] = []
    checked: list[str] = []
    for strategy in experiment.strategies:
        try:
            checked += _check(experiment, strategy, not supported)
            supported.append(strategy)
        except UserError as error:
            notices.append(f"{LEFT_OUT} {strategy}: {error}")
    if not supported:
        raise UserError(f"no strategy supports this experiment: {notices[0]}")
    return replace(experiment, strategies=tuple(supported)), [*notices, *checked]
