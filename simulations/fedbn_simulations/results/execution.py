"""Sentence on how the clients of a comparison were executed, from the field ``execution`` of ``result.json``.

The field has a list for each kind of job. It contains ``stacked`` if clients ran side by side, and the reasons why they
ran one by one (`fedbn.stacked.executors.ClientExecutor.execution`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedbn_simulations.results.files import format_names
from fedbn_simulations.results.labels import distinct_names

STACKED = "stacked"

VERBS = {"train": "trained", "evaluate": "were scored"}


def summarize_execution(engine: str, runs: Sequence[dict[str, Any]]) -> str:
    """Say how clients ran, by strategy and over all seeds.

    Args:
        engine: name of the engine.
        runs: results of the runs.

    >>> runs = [{"strategy": name, "execution": {"train": ["stacked"], "evaluate": ["stacked"]}} for name in "ab"]
    >>> summarize_execution("grid:stacked", runs)
    'grid:stacked: clients trained and were scored side by side'
    >>> runs[1]["execution"]["train"] = ["layer LSTM is not supported"]
    >>> summarize_execution("grid:stacked", runs)  # doctest: +NORMALIZE_WHITESPACE
    'grid:stacked: a: clients trained and were scored side by side; b: clients trained one by one (layer LSTM is not
    supported) and were scored side by side'
    """
    of_strategy: dict[str, dict[str, dict[str, None]]] = {}  # strategy -> kind -> distinct records, in order
    for run in runs:
        kinds = of_strategy.setdefault(run["strategy"], {})
        for kind, how in run.get("execution", {}).items():
            kinds.setdefault(kind, {}).update(dict.fromkeys(how))
    strategies: dict[str, list[str]] = {}
    names = distinct_names(of_strategy)
    for strategy, kinds in of_strategy.items():
        strategies.setdefault(_describe({kind: list(how) for kind, how in kinds.items()}), []).append(names[strategy])
    parts = [text if len(strategies) == 1 else f"{format_names(of)}: {text}" for text, of in strategies.items() if text]
    return ": ".join([engine, "; ".join(parts)] if parts else [engine])


def summarize_time(runs: Sequence[dict[str, Any]]) -> str:
    """CPU seconds of all runs by phase; empty if the engine did not measure them.

    >>> summarize_time([{"phases": {"training": 1.2, "messages": 0.1}}, {"phases": {"training": 2.0}}])
    'training 3.2, messages 0.1'
    """
    total: dict[str, float] = {}
    for run in runs:
        for phase, seconds in run.get("phases", {}).items():
            total[phase] = total.get(phase, 0.0) + seconds
    return ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in total.items())


def ran_one_by_one(runs: Sequence[dict[str, Any]]) -> bool:
    """Whether clients ran one by one in any run of an engine that usually runs them side by side."""
    return any(how != STACKED for run in runs for kind in run.get("execution", {}).values() for how in kind)


def _describe(execution: dict[str, list[str]]) -> str:
    by_way: dict[str, list[str]] = {}
    for kind, how in execution.items():
        reasons = "; ".join(h for h in how if h != STACKED)
        ways = ["side by side"] * (STACKED in how) + [f"one by one ({reasons})"] * bool(reasons)
        by_way.setdefault(" or ".join(ways), []).append(VERBS[kind])
    text = " and ".join(f"{' and '.join(verbs)} {way}" for way, verbs in by_way.items())
    return text and f"clients {text}"
