"""Options of an experiment. This module does not import torch, so that the command line starts fast."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from fedbn.config import EvaluatedConditions, option

DEFAULT_STRATEGIES = ("global-naive", "global-pooled", "fedbn", "silobn", "groupnorm", "local", "centralized")

DEFAULT_APP_STRATEGIES = ("global-naive", "fedbn", "silobn", "groupnorm")
"""Default strategies of a comparison in a Flower app."""


@dataclass(frozen=True)
class ExperimentOptions(EvaluatedConditions):
    """Options of a `fedbn_simulations.experiments.experiment.Experiment`."""

    strategies: tuple[str, ...] = option(
        DEFAULT_STRATEGIES,
        "Comma-separated strategies, or all. The first is the reference of paired differences.",
        flags=("--strategies", "--strategy"),
    )
    _: KW_ONLY
    seeds: int | tuple[int, ...] = option(3, "Number of paired seeds: 0 to seeds - 1.", low=1)
    tune: dict[str, tuple[str, ...]] = option(
        {},
        "Values of options to choose from for each strategy, on validation data of training users. All combinations "
        "are tried, e.g. lr=0.01,0.1 optimizer=sgd,adamw.",
        panel="Optimization",
    )
    metric: str = option(
        "",
        "Metric of tables, intervals, tuning and the worst 10 %, e.g. macro_f1, or package.module:function; empty for "
        "the task's first. The results hold all metrics.",
        panel="Evaluation",
    )
    halvings: int = option(
        0,
        "Stages of tuning after which the worse half of the candidates is dropped; each stage has twice the rounds of "
        "the one before. 0 trains all candidates for all rounds.",
        low=0,
        panel="Optimization",
    )
    protocol: str = option(
        "",
        "Published benchmark that sets scenario, partition, model and plan, e.g. pfllib-dir:join=0.1; other options "
        "override it, and the report says so.",
        panel="Data",
    )
    rates: dict[str, float] = option(
        {}, "Learning rates by strategy where they differ from --lr, e.g. local=0.1,fedbn=0.03.", panel="Optimization"
    )
