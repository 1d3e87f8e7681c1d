"""Options of an experiment. This module does not import torch, so that the command line starts fast."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from fedbn.config import EvaluatedConditions, option

DEFAULT_STRATEGIES = ("global-naive", "global-pooled", "fedbn", "silobn", "groupnorm", "local", "centralized")

GRID = (0.01, 0.03, 0.1, 0.3)
"""Learning rates tried for every strategy when tuning; a factor of about three apart."""


@dataclass(frozen=True)
class ExperimentOptions(EvaluatedConditions):
    """Options of a `simulations.experiments.experiment.Experiment`."""

    strategies: tuple[str, ...] = option(
        DEFAULT_STRATEGIES,
        "Comma-separated strategies, or all. The first is the reference of paired differences.",
        flags=("--strategies", "--strategy"),
    )
    _: KW_ONLY
    seeds: int = option(3, "Number of paired seeds: 0 to seeds - 1.", low=1)
    tune: tuple[float, ...] = option(
        (), "Choose each strategy's learning rate on validation data from --grid.", panel="Optimization"
    )
    rates: dict[str, float] = option(
        {}, "Learning rates by strategy where they differ from --lr, e.g. local=0.1,fedbn=0.03.", panel="Optimization"
    )
