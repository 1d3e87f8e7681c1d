"""Safeguards of a deployment, where clients and server need not trust each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedbn.errors import UserError
from fedbn.nn.schema import Limits

Scalar = bool | int | float | str

DEPLOYMENT_CONFIG: dict[str, Scalar] = {
    "max_norm": 1e4,
    "max_statistic": 1e6,
    "max_examples": 10_000_000,
    "client_statistics": False,
}
"""Run config of deployments. The limits are far above what clients with usual data and networks send."""

SIMULATION_CONFIG: dict[str, Scalar] = {
    "max_norm": 0.0,
    "max_statistic": 0.0,
    "max_examples": 0,
    "client_statistics": True,
}
"""Run config of simulations, whose clients trust each other: no limits, and all cold starts."""


@dataclass(frozen=True)
class Safeguards:
    """Limits of what clients send, and what clients receive about each other.

    Attributes:
        limits: limits of plausible messages.
        client_statistics: whether unseen users receive the statistics of single clients for their cold starts.
    """

    limits: Limits
    client_statistics: bool

    @staticmethod
    def from_config(config: Mapping[str, Scalar]) -> Safeguards:
        """Safeguards of a run config; `DEPLOYMENT_CONFIG` where it says nothing.

        >>> Safeguards.from_config({"max_norm": 50.0, "max_examples": 0}).limits
        Limits(norm=50.0, statistic=1000000.0, examples=inf)

        Raises:
            UserError: a limit is negative or no number, or ``client_statistics`` is not true or false.
        """
        values = DEPLOYMENT_CONFIG | {k: v for k, v in config.items() if k in DEPLOYMENT_CONFIG}
        shared = values.pop("client_statistics")
        if not isinstance(shared, bool):
            raise UserError(f"client_statistics must be true or false, not {shared!r}")
        for name, value in values.items():
            if isinstance(value, str) or not value >= 0:
                raise UserError(f"{name} must be a number of at least 0 (0: no limit), not {value!r}")
        norm, statistic, examples = (float(values[f"max_{k}"]) or math.inf for k in ("norm", "statistic", "examples"))
        return Safeguards(Limits(norm, statistic, examples), shared)


SIMULATION = Safeguards.from_config(SIMULATION_CONFIG)
