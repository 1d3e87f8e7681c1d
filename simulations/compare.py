"""Conduct an experiment: tune if asked, run every strategy with every seed, measure the shift, write it all down.

Runs are independent, so they go to worker processes, one torch thread each. Every run keeps a checkpoint in its
own directory; what is finished is never run again, and an interrupted experiment is resumed to the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fedbn.data.skew import measure, statistics_distance
from fedbn.errors import UserError
from fedbn.evaluation import COLUMNS
from fedbn.federation import Outcome
from fedbn.recalibration import all_moments
from fedbn.roles import statistics_layers
from fedbn.run import Run
from fedbn.setting import Setting, setting
from fedbn.stacked.memory import collect_garbage_rarely, keep_freed_memory
from simulations.engines import Engine, execute, parse_engine
from simulations.experiment import Experiment
from simulations.result_files import write_comparison, write_run, write_shift
from simulations.results import Comparison
from simulations.store import (
    NUMERICS,
    before,
    check_numerics,
    code_digest,
    load_latest,
    load_outcome,
    save_outcome,
    versions,
)

CHECKPOINT = "checkpoint.safetensors"

LEFT_OUT = "Left out:"
"""Begins the notice about a strategy that cannot work on an experiment's users or model."""


@dataclass(frozen=True)
class Task:
    """A run and the directory that it writes to."""

    run: Run
    directory: str


@dataclass(frozen=True)
class Event:
    """Progress of a task: ``round`` rounds are done, or the task ended; with what was measured, if anything was."""

    directory: str
    round: int
    ended: bool = False
    values: dict[str, float] = field(default_factory=dict)


Report = Callable[[Event], None]


def result_of(run: Run, here: Setting, outcome: Outcome) -> dict[str, Any]:
    """A finished run as plain values: what tables, plots and reports are made of."""
    users = here.population.users
    return {
        "run": asdict(run),
        "numerics": NUMERICS,
        "code": code_digest(),
        "sources": here.population.sources,
        "strategy": run.strategy,
        "seed": run.seed,
        "lr": run.plan.lr,
        "rounds": len(outcome.curve),
        "seconds": outcome.seconds,
        "newcomer": here.strategy.newcomer,
        "notices": [*here.notices, *outcome.notices()],
        "ownership": [*here.ownership.rows(), *outcome.traffic.rows()],
        "curve": [asdict(p) for p in outcome.curve],
        "evaluations": [
            {"user": users[i].name, "domain": users[i].domain, **asdict(score)}
            for i, scores in sorted(outcome.scores.items())
            for score in scores
        ],
    }


def perform(task: Task, engine: Engine, report: Report) -> None:
    """Execute one task from wherever it stands; does nothing if it is finished.

    Raises:
        UserError: the checkpoint or result has other numerics or other data.
    """
    directory = Path(task.directory)
    finished = directory / "result.json"
    rounds = task.run.plan.rounds
    if finished.exists():
        check_result(finished, task.run)
        report(Event(task.directory, rounds, ended=True))
        return
    here = setting(task.run)
    sources = here.population.sources
    checkpoint = directory / CHECKPOINT
    resume = load_latest(checkpoint, task.run, sources)
    if resume is not None:
        report(Event(task.directory, len(resume.curve)))

    def on_round(number: int, outcome: Outcome) -> None:
        save_outcome(checkpoint, task.run, outcome, sources, before(checkpoint))
        measured = {k: v for k, v in asdict(outcome.curve[-1]).items() if k != "round" and v is not None}
        report(Event(task.directory, number, values=measured))

    if resume is not None and resume.scores:  # killed between its last checkpoint and its result
        outcome = resume
    else:
        outcome = execute(task.run, engine, resume, on_round, checkpoint)
        save_outcome(checkpoint, task.run, outcome, sources)
    write_run(directory.parent.parent, directory.name, result_of(task.run, here, outcome))
    before(checkpoint).unlink(missing_ok=True)
    report(Event(task.directory, rounds, ended=True, values=_means(outcome)))


def _means(outcome: Outcome) -> dict[str, float]:
    """Mean accuracy over users by row and column of the matrix."""
    found: dict[str, list[float]] = {}
    for scores in outcome.scores.values():
        for score in scores:
            found.setdefault(f"{score.row}/{score.column}", []).append(score.accuracy)
    return {name: sum(values) / len(values) for name, values in found.items()}


def check_result(path: Path, run: Run) -> None:
    """Raise unless a finished result is of this run and of the current numerics."""
    result = json.loads(path.read_text(encoding="utf-8"))
    check_numerics(path, result.get("numerics"))
    if result["run"] != json.loads(run.to_json()):
        raise UserError(f"{path} belongs to another run; choose another --out")


_events: Any = None


def _start_worker(events: Any) -> None:
    global _events
    _events = events
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    torch.set_num_threads(1)
    keep_freed_memory()
    collect_garbage_rarely()


def _work(task: Task, engine: Engine) -> None:
    perform(task, engine, _events.put)


def perform_all(tasks: Sequence[Task], engine: Engine, workers: int, report: Report) -> None:
    """Execute tasks on worker processes (in this process if ``workers`` is 1); the first error stops all."""
    if workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            perform(task, engine, report)
        return
    context = multiprocessing.get_context("spawn")
    events: Any = context.Queue()
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)), mp_context=context, initializer=_start_worker, initargs=(events,)
    )
    futures: list[Future[None]] = []
    try:
        futures = [pool.submit(_work, task, engine) for task in tasks]
        while not all(f.done() for f in futures):
            for event in _drain(events, 0.2):
                report(event)
            for future in futures:
                if future.done() and future.exception():
                    future.result()
        for future in futures:
            future.result()
        for event in _drain(events, 0.2):
            report(event)
    finally:
        for future in futures:
            future.cancel()
        for process in list((pool._processes or {}).values()):
            if not all(f.done() for f in futures):
                process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def _drain(events: Any, wait: float) -> Iterator[Event]:
    try:
        yield events.get(timeout=wait)
        while True:
            yield events.get_nowait()
    except queue.Empty:
        return


def tasks_of(experiment: Experiment, out: Path, rates: dict[str, float]) -> list[Task]:
    """Every strategy with every seed; seeds outermost, so that a stopped experiment holds whole comparisons."""
    runs = [
        experiment.run(strategy, seed, lr=rates.get(strategy))
        for seed in range(experiment.seeds)
        for strategy in experiment.strategies
    ]
    return [Task(run, str(out / "runs" / run.id)) for run in runs]


def tuning_tasks(experiment: Experiment, out: Path) -> list[Task]:
    """Every strategy with every learning rate, on seed 0, tested on held-out training data of seen users."""
    runs = [
        experiment.run(strategy, 0, lr=lr, validation=True)
        for strategy in experiment.strategies
        for lr in experiment.tune
    ]
    return [Task(run, str(out / "tuning" / "runs" / run.id)) for run in runs]


def chosen_rates(tasks: Sequence[Task]) -> dict[str, float]:
    """For each strategy the learning rate with the best mean accuracy on validation data (ties: the smaller)."""
    best: dict[str, tuple[float, float]] = {}
    for task in tasks:
        result = json.loads((Path(task.directory) / "result.json").read_text(encoding="utf-8"))
        own = [e["accuracy"] for e in result["evaluations"] if (e["row"], e["column"]) == ("own", "aggregated")]
        candidate = (sum(own) / len(own), -task.run.plan.lr)
        if task.run.strategy not in best or candidate > best[task.run.strategy]:
            best[task.run.strategy] = candidate
    return {strategy: -negative for strategy, (_, negative) in best.items()}


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
            notices += [n for n in setting(run).notices if n not in notices]
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
                setting(run)
            kept.append(strategy)
        except UserError as error:
            notices.append(f"{LEFT_OUT} {strategy}: {error}")
    if not kept:
        raise UserError(f"no strategy can work here: {notices[0]}")
    return replace(experiment, strategies=tuple(kept)), notices


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
) -> Path:
    """Conduct an experiment, or what is left of it, and write its results below ``out``.

    Args:
        experiment: what to compare.
        out: directory; what is finished there is kept.
        engine: how runs are executed.
        workers: processes; None for one a core.
        report: told of each round done.
        started: told of each batch of tasks before it begins.
        command: how to do it again, for the record.
        notices: what a reader should know besides what is found here.

    Returns:
        The directory.

    Raises:
        UserError: before anything runs, for whatever can be known then.
    """
    parse_engine(engine)
    experiment = experiment.resolved()
    notices = [*notices, *preflight(experiment, out)]
    workers = workers or os.cpu_count() or 1
    if engine.startswith("ray") or experiment.device != "cpu":
        workers = 1
    here = setting(experiment.run(experiment.strategies[0], 0))
    meta: dict[str, Any] = {
        "title": f"{experiment.scenario}: {len(experiment.strategies)} treatments of normalisation",
        "scenario": experiment.scenario,
        "strategies": list(experiment.strategies),
        "seeds": list(range(experiment.seeds)),
        "columns": list(COLUMNS),
        "settings": {**asdict(experiment.plan), **_described(experiment), "engine": engine},
        "versions": versions(),
        "numerics": NUMERICS,
        "code": code_digest(),
        "sources": here.population.sources,
        "command": command,
        "skew": here.population.skew,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "notices": notices,
        "experiment": experiment.to_dict(),
        "engine": engine,
    }
    write_comparison(out, meta)
    rates: dict[str, float] = {}
    if experiment.tune:
        tuning = tuning_tasks(experiment, out)
        started("tuning", tuning)
        perform_all(tuning, engine, workers, report)
        rates = chosen_rates(tuning)
        meta["settings"]["lr"] = "tuned: " + ", ".join(f"{s} {lr:g}" for s, lr in rates.items())
        write_comparison(out, meta)
    tasks = tasks_of(experiment, out, rates)
    started("comparing", tasks)
    perform_all(tasks, engine, workers, report)
    write_shift(out, measured_shift(experiment, tasks))
    Comparison.load(out).evaluations.to_parquet(out / "evaluations.parquet", index=False)
    return out


def _described(experiment: Experiment) -> dict[str, Any]:
    return {
        "model": experiment.model,
        "partition": experiment.partition,
        "shift": experiment.shift or "none",
        "privacy": experiment.privacy or "none",
        "device": experiment.device,
        "rates of their own": ", ".join(
            f"{s} {experiment.rates[s]:g}" for s in experiment.strategies if s in experiment.rates
        )
        or "none",
        "tuned over": ", ".join(map(str, experiment.tune)) or "not tuned",
    }


def measured_shift(experiment: Experiment, tasks: Sequence[Task]) -> dict[str, Any]:
    """How far seen users are apart: in labels, in quantity, in inputs, and in the statistics of each BN layer.

    The layers are those of the first strategy whose final network has statistics and a body for all, seed 0:
    every user's training data pass through that one network.
    """
    first = setting(experiment.run(experiment.strategies[0], 0))
    skew = measure(first.population).as_dict()
    for task in tasks:
        here = setting(task.run)
        if not statistics_layers(here.scratch) or str(here.ownership.owners["body"]) != "shared":  # type: ignore[index]
            continue
        outcome = load_outcome(Path(task.directory) / CHECKPOINT, task.run)
        seen = here.population.seen
        here.load(here.assemble(outcome.server.serving, None))
        moments = [all_moments(here.scratch, here.population.users[i].train.x) for i in seen]
        names = [here.population.users[i].name for i in seen]
        return skew | {
            "layers": [
                {
                    "layer": layer,
                    "users": names,
                    "distance": statistics_distance(
                        [m[layer].mean.numpy() for m in moments],
                        [m[layer].variance().numpy() for m in moments],
                    ).tolist(),
                }
                for layer in moments[0]
            ]
        }
    return skew | {"layers": []}


def resume(out: Path, **options: Any) -> Path:
    """Go on with an interrupted comparison.

    Raises:
        UserError: there is none, or numerics or data have changed since.
    """
    stored = out / "comparison.json"
    if not stored.exists():
        raise UserError(f"{out} holds no comparison (no comparison.json): start one with `fedbn compare`")
    meta = json.loads(stored.read_text(encoding="utf-8"))
    check_numerics(out, meta.get("numerics"))
    experiment = Experiment.from_dict(meta["experiment"])
    notices = [n for n in meta["notices"] if n.startswith(LEFT_OUT)]
    return compare(experiment, out, engine=meta["engine"], command=meta["command"], notices=notices, **options)


def elapsed(since: float) -> str:
    """Time since a `time.perf_counter` reading, in words."""
    seconds = time.perf_counter() - since
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"
