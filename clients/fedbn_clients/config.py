"""A run as Flower's flat run-config (``flwr run . -c 'strategy="silobn" plan="rounds=5"'``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import lru_cache

from fedbn.config import parts
from fedbn.errors import UserError
from fedbn.federation.run import Run, plan_for
from fedbn.plugins import table

Scalar = bool | int | float | str


@lru_cache(maxsize=8)
def _parsed(text: str) -> Run:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"run is not valid JSON: {error}; give it as written by a run, or leave it out") from None
    return Run.from_dict(table(values, "run"))


def run_from_config(config: Mapping[str, Scalar]) -> Run:
    """The run that a run-config describes.

    ``run`` holds a whole run as JSON and wins. Otherwise each key names a field of `Run`; ``plan`` is written
    ``rounds=5,lr=0.1`` and changes the scenario's own plan.

    >>> run_from_config({"scenario": "digits8", "strategy": "silobn", "plan": "rounds=3"}).plan.rounds
    3

    Raises:
        UserError: unknown names or values.
    """
    if text := str(config.get("run", "")):
        return _parsed(text)
    settings: dict[str, str] = {}
    for part in parts(str(config.get("plan", ""))):
        name, sep, value = part.partition("=")
        if not sep:
            raise UserError(f"plan: write settings as rounds=5,lr=0.1, not {part!r}")
        settings[name.replace("-", "_")] = value
    rest = {f.name: config[f.name] for f in fields(Run) if f.name != "plan" and config.get(f.name, "") != ""}
    run = Run.from_dict(dict(rest))
    return replace(run, plan=plan_for(run.scenario, **settings)).resolved()
