"""Federated and domain-adaptive batch normalization: what one needs by name, loaded when it is first used.

The library imports neither Flower nor Ray. `compare`, `adapt`, `federate`, `load` and `run_simulation` belong to the
package of experiments, which is built on this one; they are found by their entry point (group ``fedbn.api``), so
nothing here imports upwards.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

_HOME = {
    "Audit": "fedbn.auditing.audit",
    "Client": "fedbn.integrations.service_client",
    "Moments": "fedbn.statistics.moments",
    "NormStrategy": "fedbn.strategies.base",
    "Outcome": "fedbn.federation",
    "Owner": "fedbn.strategies.ownership",
    "Personalized": "fedbn.online",
    "PersonalizedClassifier": "fedbn.integrations.sklearn",
    "Plan": "fedbn.config",
    "Population": "fedbn.data.population",
    "Role": "fedbn.nn.roles",
    "Rule": "fedbn.online",
    "Run": "fedbn.federation.run",
    "Task": "fedbn.tasks",
    "UserError": "fedbn.errors",
    "audit": "fedbn.auditing.audit",
    "convert": "fedbn.nn.conversion",
    "personalize": "fedbn.online",
    "rule": "fedbn.online",
}
_ABOVE = ("adapt", "compare", "federate", "load", "run_simulation")

__all__ = sorted([*_HOME, *_ABOVE])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _ABOVE:
        found = [e for e in entry_points(group="fedbn.api") if e.name == name]
        if not found:
            raise ImportError(f"fedbn.{name} needs the installed package: pip install fedbn, or pip install -e .")
        value = found[0].load()
    else:
        raise AttributeError(f"module 'fedbn' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
