"""Run an experiment: tune if requested, run every strategy with every seed, measure the shift, write the results.

Runs are independent and are distributed over worker processes, with one torch thread each. Runs of tiny networks that
differ only in seed or learning rate train together in one process. Every run has a checkpoint in its own directory.
Finished runs are not repeated, and a resumed experiment gives the same numbers.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fedbn.errors import UserError
from fedbn.federation.context import RunContext
from fedbn.federation.metrics import COLUMNS
from fedbn.federation.run import plan_values
from fedbn.federation.setup import build_context
from fedbn.files import locked, read_json, write_atomically
from fedbn.scenarios.base import scenario
from fedbn_simulations.engines.execute import Engine, check_engine, parse_engine
from fedbn_simulations.engines.together import runs_together
from fedbn_simulations.experiments.experiment import Experiment, render_options
from fedbn_simulations.experiments.preflight import LEFT_OUT, preflight
from fedbn_simulations.experiments.shift import measure_shift
from fedbn_simulations.experiments.tasks import Report, Task, run_tasks
from fedbn_simulations.results.files import write_comparison, write_shift
from fedbn_simulations.results.labels import data_name
from fedbn_simulations.storage.provenance import NUMERICS, check_numerics, code_digest, versions


def comparison_tasks(
    experiment: Experiment, out: Path, tuned: Mapping[str, Mapping[str, Any]], extends: Sequence[int] = ()
) -> list[Task]:
    """Every strategy with every seed; seeds are outermost, so that an interrupted experiment has complete seeds.

    If runs train together, all seeds of a strategy are executed before the next strategy.
    """
    runs = [
        experiment.run(strategy, seed, tuned=tuned.get(strategy))
        for seed in experiment.seed_numbers
        for strategy in experiment.strategies
    ]
    return [Task(run, str(out / "runs" / run.id), tuple(extends)) for run in runs]


def tuning_rounds(experiment: Experiment) -> list[int]:
    """Rounds of each stage of tuning: with two halvings, a quarter of the rounds, then half of them, then all.

    A later stage has twice the rounds and half the candidates, so all stages cost about the same. The budget of all
    strategies is the same.
    """
    rounds = experiment.plan.rounds
    first = -(-rounds // 2**experiment.halvings)
    return sorted({min(rounds, first * 2**i) for i in range(experiment.halvings)} | {rounds})


def tuning_tasks(
    experiment: Experiment,
    out: Path,
    candidates: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    rounds: int | None = None,
) -> list[Task]:
    """Every strategy with its candidates, on the first seed, tested on held-out training data of seen users.

    Args:
        experiment: what to compare.
        out: results directory.
        candidates: candidates by strategy; None for all.
        rounds: rounds of this stage (`tuning_rounds`); None for the plan's.
    """
    stages = tuning_rounds(experiment)
    rounds = rounds or stages[-1]
    tasks = []
    for strategy in experiment.strategies:
        for candidate in experiment.candidates() if candidates is None else candidates[strategy]:
            run = experiment.run(strategy, experiment.seed_numbers[0], tuned=candidate, validation=True)
            # Stages have the same interval between evaluations, so that a stage continues from the one before.
            run = replace(run, plan=replace(run.plan, rounds=rounds, eval_every=stages[0]))
            shorter = tuple(r for r in stages if r < rounds)
            tasks.append(Task(run, str(out / "tuning" / "runs" / run.id), shorter))
    return tasks


def rank_candidates(
    experiment: Experiment, tasks: Sequence[Task], metric: str, higher_is_better: bool
) -> dict[str, list[dict[str, Any]]]:
    """Candidates by strategy, the one with the best mean of a metric on validation data first (ties: in order)."""
    values: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for task in tasks:
        result = read_json(Path(task.directory) / "result.json")
        cells = [e for e in result["evaluations"] if (e["row"], e["column"]) == ("own", "aggregated")]
        own = [e[metric] if higher_is_better else -e[metric] for e in cells if e.get(metric) is not None]
        value = sum(own) / len(own) if own else -math.inf
        candidate = {name: getattr(task.run.plan, name) for name in experiment.tune}
        values.setdefault(task.run.strategy, []).append((value if math.isfinite(value) else -math.inf, candidate))
    return {s: [c for _, c in sorted(found, key=lambda pair: -pair[0])] for s, found in values.items()}


def accuracy_floor(ctx: RunContext) -> float | None:
    """Accuracy below which a network did not learn: the share of the most frequent class, plus a third of the rest.

    The shares are those of the test rows of all seen users. None for tasks without accuracy.
    """
    users = [ctx.population.users[i].test for i in ctx.population.seen]
    if ctx.task.main_metric != "accuracy" or ctx.population.remote or not users[0].has_classes:
        return None
    counts = torch.cat([test.groups for test in users]).bincount()
    share = float(counts.max() / counts.sum())
    return share + (1 - share) / 3


def compare(
    experiment: Experiment,
    out: Path,
    *,
    engine: Engine = "grid",
    workers: int | None = None,
    report: Report = lambda event: None,
    started: Callable[[str, Sequence[Task]], None] = lambda title, tasks: None,
    command: str = "",
    notices: Sequence[str] = (),
    checked: Sequence[str] | None = None,
    extends: Sequence[int] = (),
) -> Path:
    """Run an experiment, or the rest of it, and write the results to ``out``.

    Args:
        experiment: what to compare.
        out: results directory; finished runs in it are kept.
        engine: how runs are executed.
        workers: number of processes; None for one per core.
        report: called after each round.
        started: called before each batch of tasks.
        command: command that reproduces the experiment, for the record.
        notices: additional notices for the report.
        checked: notices of the runs, if they have been checked (`fedbn_simulations.experiments.preflight`).
        extends: numbers of rounds of former versions of the experiment, which this one extends.

    Returns:
        The results directory.

    Raises:
        UserError: invalid settings; checked before anything runs.
    """
    parse_engine(engine)
    experiment = experiment.resolved()
    check_engine(engine, [experiment.run(strategy, 0) for strategy in experiment.strategies])
    notices = [*notices, *preflight(experiment, out, extends, checked)]
    workers = workers or os.cpu_count() or 1
    if engine.startswith("ray") or experiment.device != "cpu":
        workers = 1
    ctx = build_context(experiment.run(experiment.strategies[0], experiment.seed_numbers[0]))
    meta: dict[str, Any] = {
        "title": f"{data_name(experiment.scenario)}: {len(experiment.strategies)} normalization strategies",
        "scenario": experiment.scenario,
        "strategies": list(experiment.strategies),
        "seeds": list(experiment.seed_numbers),
        "columns": list(COLUMNS),
        "metrics": ctx.task.directions,
        "metric": experiment.metric or ctx.task.main_metric,
        "settings": {**plan_values(experiment.plan), **_settings(experiment), "engine": engine},
        "versions": versions(),
        "numerics": NUMERICS,
        "code": code_digest(),
        "sources": ctx.population.sources,
        "command": command,
        "classes": list(ctx.population.classes),
        "skew": ctx.population.skew,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "notices": notices,
        "experiment": experiment.to_dict(),
        "engine": engine,
        "extends": list(extends),
    }
    if (floor := accuracy_floor(ctx)) is not None:
        meta["floor"] = floor
    with locked(out):
        _run(experiment, out, meta, engine, workers, runs_together(ctx, engine), report, started, extends)
    return out


def _run(
    experiment: Experiment,
    out: Path,
    meta: dict[str, Any],
    engine: Engine,
    workers: int,
    together: int,
    report: Report,
    started: Callable[[str, Sequence[Task]], None],
    extends: Sequence[int],
) -> None:
    """Tune if requested, execute all runs, and write the results."""
    write_comparison(out, meta)
    tuned: dict[str, dict[str, Any]] = {}
    if experiment.tune:
        ranked: dict[str, list[dict[str, Any]]] = {s: experiment.candidates() for s in experiment.strategies}
        for stage, rounds in enumerate(tuning_rounds(experiment)):
            left = {s: found[: -(-len(found) // 2)] if stage else found for s, found in ranked.items()}
            tuning = tuning_tasks(experiment, out, left, rounds)
            started("tuning", tuning)
            run_tasks(tuning, engine, workers, report, together)
            ranked = rank_candidates(experiment, tuning, meta["metric"], meta["metrics"][meta["metric"]])
        tuned = {strategy: found[0] for strategy, found in ranked.items()}
        chosen = ", ".join(f"{s} {render_options(c)}" for s, c in tuned.items())
        meta["settings"] |= dict.fromkeys(experiment.tune, "tuned") | {"tuned": chosen}
        write_comparison(out, meta)
    tasks = comparison_tasks(experiment, out, tuned, extends)
    started("comparing", tasks)
    run_tasks(tasks, engine, workers, report, together)
    if extends:
        _remove_shorter_runs(out, extends)
    write_shift(out, measure_shift(experiment, tasks))
    # Imported after the runs: it imports scipy.stats, which takes longer than a short run.
    from fedbn_simulations.results.comparison import Comparison

    evaluations = Comparison.load(out).evaluations.to_parquet(index=False)
    write_atomically(out / "evaluations.parquet", evaluations)


def _settings(experiment: Experiment) -> dict[str, Any]:
    return {
        "model": experiment.model,
        "task": experiment.task or scenario(experiment.scenario).task,
        "partition": experiment.partition,
        "shift": experiment.shift or "none",
        "privacy": experiment.privacy or "none",
        "device": experiment.device,
        "head": experiment.head or "found from the computation",
        "private layers": experiment.private or "none",
        "learning rates by strategy": ", ".join(
            f"{s} {experiment.rates[s]:g}" for s in experiment.strategies if s in experiment.rates
        )
        or "none",
        "tuned over": " ".join(f"{n}={','.join(values)}" for n, values in experiment.tune.items()) or "not tuned",
        **({"halvings": experiment.halvings} if experiment.halvings else {}),
    }


def _remove_shorter_runs(out: Path, extends: Sequence[int]) -> None:
    for path in (out / "runs").glob("*/result.json"):
        if read_json(path)["run"]["plan"]["rounds"] in extends:
            shutil.rmtree(path.parent)


def resume(out: Path, rounds: int | None = None, seeds: int | None = None, **options: Any) -> Path:
    """Resume an interrupted comparison, or extend it by more rounds or seeds.

    The numbers equal those of a comparison that had these numbers of rounds and seeds from the start, for additional
    seeds up to the rounding of runs that train together. A run whose training depends on the total number of rounds
    (a schedule, FixBN) starts again.

    Args:
        out: results directory of the comparison.
        rounds: new number of rounds; None: unchanged.
        seeds: new number of seeds; None: unchanged.
        options: options of `compare`.

    Raises:
        UserError: there is no comparison, numerics or data have changed, or it already has more rounds or other seeds.
    """
    stored = out / "comparison.json"
    if not stored.exists():
        raise UserError(f"{out} has no comparison (no comparison.json): start one with `fedbn compare`")
    meta = read_json(stored)
    if "app" in meta:
        raise UserError(f"{out} compares strategies in an app: run its command again, finished runs are used")
    check_numerics(out, meta.get("numerics"))
    experiment = Experiment.from_dict(meta["experiment"])
    if not experiment.tune:  # stored apart from the experiment, as it changes no number
        experiment = replace(experiment, metric=meta.get("metric", ""))
    extends = list(meta.get("extends", ()))
    command = meta["command"]
    if rounds is not None and rounds != experiment.plan.rounds:
        if rounds < experiment.plan.rounds:
            raise UserError(f"{out} already has {experiment.plan.rounds} rounds: give --rounds a larger number")
        extends.append(experiment.plan.rounds)
        if command:  # empty without a command line
            command = re.sub(r" --(num-)?rounds[ =]\S+", "", command) + f" --rounds {rounds}"
        experiment = replace(experiment, plan=replace(experiment.plan, rounds=rounds))
    if seeds is not None and seeds != experiment.seeds:
        if not set(experiment.seed_numbers) <= set(range(seeds)):
            has = f"{len(experiment.seed_numbers)} seeds up to {max(experiment.seed_numbers)}"
            raise UserError(f"{out} already has {has}: give --seeds a number above {max(experiment.seed_numbers)}")
        if command:
            command = re.sub(r" --seeds[ =]\S+", "", command) + f" --seeds {seeds}"
        experiment = replace(experiment, seeds=seeds)
    notices = [n for n in meta["notices"] if n.startswith(LEFT_OUT)]
    return compare(
        experiment,
        out,
        engine=meta["engine"],
        command=command,
        notices=notices,
        extends=extends,
        **options,
    )
