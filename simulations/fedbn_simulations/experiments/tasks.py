"""Execute the runs of an experiment on worker processes."""

from __future__ import annotations

import json
import multiprocessing
import queue
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedbn.errors import UserError
from fedbn.federation.context import RunContext
from fedbn.federation.convergence import (
    convergence,
    convergence_notices,
    depends_on_rounds,
    has_converged,
    losses,
)
from fedbn.federation.failures import CLIENT_LOG, client_log
from fedbn.federation.mismatch import measure_mismatch, mismatch_notices
from fedbn.federation.run import Run
from fedbn.federation.server import Outcome
from fedbn.federation.setup import build_context
from fedbn.files import DamagedFile, read_json
from fedbn.objects import load_objects, save_objects
from fedbn.stacked.joint import comparable
from fedbn.stacked.memory import collect_garbage_rarely, keep_freed_memory
from fedbn_simulations.engines.execute import Engine, execute
from fedbn_simulations.engines.together import meet, run_together
from fedbn_simulations.flower.processes import kill_worker, prepare_worker
from fedbn_simulations.results.files import write_run
from fedbn_simulations.server.clock import cpu_seconds
from fedbn_simulations.storage.checkpoint import (
    CheckpointWriter,
    UnreadableCheckpoint,
    load_latest,
    load_outcome,
    pack_outcome,
    previous_checkpoint,
)
from fedbn_simulations.storage.provenance import NUMERICS, check_numerics, code_digest

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Task:
    """A run and its results directory.

    Attributes:
        run: the run.
        directory: its results directory.
        extends: numbers of rounds of former versions of the experiment; their last checkpoints are used if possible.
    """

    run: Run
    directory: str
    extends: tuple[int, ...] = ()


@dataclass(frozen=True)
class Event:
    """Progress of a task: ``round`` rounds are done, or the task has ended; with measured values, if any."""

    directory: str
    round: int
    ended: bool = False
    values: dict[str, float] = field(default_factory=dict)


Report = Callable[[Event], None]


def run_result(run: Run, ctx: RunContext, outcome: Outcome) -> dict[str, Any]:
    """A finished run as plain values, the input of tables, plots and reports."""
    users = ctx.population.users
    mismatch = measure_mismatch(ctx, outcome)
    return {
        "run": json.loads(run.to_json()),
        "numerics": NUMERICS,
        "code": code_digest(),
        "sources": ctx.population.sources,
        "strategy": run.strategy,
        "seed": run.seed,
        "lr": run.plan.lr,
        "rounds": len(outcome.curve),
        "seconds": outcome.seconds,
        "cpu_seconds": outcome.cpu_seconds,
        "phases": outcome.phases,
        "newcomer": ctx.strategy.newcomer,
        "convergence": convergence(ctx, outcome),
        "notices": [
            *ctx.notices,
            *outcome.notices(),
            *convergence_notices(ctx, outcome),
            *mismatch_notices(ctx, mismatch),
        ],
        "mismatch": mismatch,
        "execution": outcome.execution,
        "ownership": [*ctx.ownership.rows(), *outcome.traffic.rows()],
        "curve": [asdict(p) for p in outcome.curve],
        "evaluations": [
            {"user": users[i].name, "domain": users[i].domain, **score.as_dict()}
            for i, scores in sorted(outcome.scores.items())
            for score in scores
        ],
    }


def run_task(task: Task, engine: Engine, report: Report) -> None:
    """Execute a task from its last checkpoint; does nothing if it is finished.

    The details of clients' errors are in `CLIENT_LOG` in the directory of the results.

    Raises:
        UserError: the checkpoint or result has other numerics or other data.
        ClientError: a client failed; the message names the log.
    """
    with client_log(Path(task.directory) / CLIENT_LOG):
        _run_task(task, engine, report)


def run_group(tasks: Sequence[Task], engine: Engine, report: Report) -> None:
    """Execute tasks that train together (`fedbn_simulations.engines.together`), as `run_task` does with one.

    A resumed group has the same numbers as one without the interruption. All its runs continue from the same round, and
    none is finished before the others have stored the round that was its last.
    """
    if len(tasks) == 1:
        run_task(tasks[0], engine, report)
    else:
        run_together([(partial(_run_task, t, engine, report), Path(t.directory) / CLIENT_LOG) for t in tasks])


def _run_task(task: Task, engine: Engine, report: Report) -> None:
    directory = Path(task.directory)
    rounds = task.run.plan.rounds
    if is_finished(directory, task.run):
        report(Event(task.directory, rounds, ended=True))
        return
    ctx = build_context(task.run)
    sources = ctx.population.sources
    checkpoint = directory / CHECKPOINT
    resume = load_latest(checkpoint, task.run, sources) or load_shorter(task, ctx)
    completed = 0 if resume is None else len(resume.curve)
    lowest = meet(completed)
    if resume is not None and lowest == completed - 1:
        resume = load_round_before(task, ctx, resume)
    if resume is not None:
        report(Event(task.directory, len(resume.curve)))

    def save(outcome: Outcome, backup: Path | None = None) -> None:
        start = cpu_seconds()
        writer.write(checkpoint, pack_outcome(task.run, outcome, sources), backup)
        spent = cpu_seconds() - start
        outcome.phases["checkpoints"] = outcome.phases.get("checkpoints", 0.0) + spent

    def on_round(number: int, outcome: Outcome) -> None:
        save(outcome, previous_checkpoint(checkpoint))
        measured = {k: v for k, v in asdict(outcome.curve[-1]).items() if isinstance(v, float)}
        report(Event(task.directory, number, values=measured))

    with CheckpointWriter() as writer:
        if resume is not None and resume.scores:  # killed between its last checkpoint and its result, or had converged
            outcome = resume
        else:
            outcome = execute(task.run, engine, resume, on_round, checkpoint)
        save(outcome)
    meet(len(outcome.curve))
    write_run(directory.parent.parent, directory.name, run_result(task.run, ctx, outcome))
    previous_checkpoint(checkpoint).unlink(missing_ok=True)
    report(Event(task.directory, rounds, ended=True, values=_means(outcome, ctx.task.main_metric)))


def load_shorter(task: Task, ctx: RunContext) -> Outcome | None:
    """The last round of the longest finished run that differs from this run only by a smaller number of rounds.

    None if there is no such run, or if training depends on the total number of rounds.
    """
    plan = task.run.plan
    if depends_on_rounds(ctx):
        return None
    for rounds in sorted((r for r in task.extends if r < plan.rounds), reverse=True):
        run = replace(task.run, plan=replace(plan, rounds=rounds))
        path = Path(task.directory).with_name(run.id) / CHECKPOINT
        # The last round is always evaluated. A longer run evaluates it only if it is a multiple of eval_every.
        if path.exists() and rounds % plan.eval_every == 0:
            outcome = load_outcome(path, run, ctx.population.sources)
            if outcome.scores and has_converged(plan, losses(outcome)):
                return outcome  # more rounds would not be used
            if len(outcome.curve) == rounds:
                outcome.scores = {}
                return outcome
    return None


def load_round_before(task: Task, ctx: RunContext, outcome: Outcome) -> Outcome | None:
    """The outcome without its last round; None if that was the first, and the same outcome if it is not stored."""
    rounds, path = len(outcome.curve) - 1, previous_checkpoint(Path(task.directory) / CHECKPOINT)
    if rounds == 0:
        return None
    try:
        before = load_outcome(path, task.run, ctx.population.sources) if path.exists() else load_shorter(task, ctx)
    except UnreadableCheckpoint:
        return outcome
    return before if before is not None and len(before.curve) == rounds else outcome


def _means(outcome: Outcome, metric: str) -> dict[str, float]:
    """Mean of a metric over users by row and column of the matrix."""
    values: dict[str, list[float]] = {}
    for scores in outcome.scores.values():
        for score in scores:
            if metric in score.metrics:
                values.setdefault(f"{score.row}/{score.column}", []).append(score.metrics[metric])
    return {name: sum(found) / len(found) for name, found in values.items()}


def is_finished(directory: Path, run: Run) -> bool:
    """Whether a directory has the result and the final checkpoint of a run. Damaged ones are computed again.

    Raises:
        UserError: the result belongs to another run or to other numerics.
    """
    path = directory / "result.json"
    if not path.exists():
        return False
    try:
        result = read_json(path)
    except DamagedFile:
        return False
    check_numerics(path, result.get("numerics"))
    if result["run"] != json.loads(run.to_json()):
        raise UserError(f"{path} belongs to another run; choose another --out")
    try:
        load_outcome(directory / CHECKPOINT, run)
    except UnreadableCheckpoint:
        (directory / CHECKPOINT).unlink(missing_ok=True)
        return False
    return True


_events: Any = None


def _start_worker(events: Any, objects: Path) -> None:
    global _events
    _events = events
    load_objects(objects)
    prepare_worker()
    torch.set_num_threads(1)
    keep_freed_memory()
    collect_garbage_rarely()


def _work(tasks: Sequence[Task], engine: Engine) -> None:
    run_group(tasks, engine, _events.put)


def grouped(tasks: Sequence[Task], size: int) -> list[list[Task]]:
    """Groups of at most ``size`` tasks that differ only in seed or learning rate, in the order of their first tasks."""
    similar: dict[Run, list[Task]] = {}
    for task in tasks:
        similar.setdefault(comparable(task.run), []).append(task)
    return [group[i : i + size] for group in similar.values() for i in range(0, len(group), size)]


def run_tasks(tasks: Sequence[Task], engine: Engine, workers: int, report: Report, together: int = 1) -> None:
    """Execute tasks on worker processes, or in this process if ``workers`` is 1; the first error stops all tasks.

    Args:
        tasks: the tasks.
        engine: how runs are executed.
        workers: number of processes.
        report: called after each round.
        together: maximum number of tasks that train together (`run_group`).

    Raises:
        UserError: worker processes cannot import an object that a run names.
    """
    groups = grouped(tasks, together) if together > 1 else [[task] for task in tasks]
    if workers <= 1 or len(groups) <= 1:
        for group in groups:
            run_group(group, engine, report)
        return
    with tempfile.TemporaryDirectory(prefix="fedbn-objects-") as directory:
        objects = Path(directory) / "objects.pt"
        save_objects(objects, [task.run.to_json() for task in tasks])
        _run_on_workers(groups, engine, workers, report, objects)


def _run_on_workers(
    groups: Sequence[Sequence[Task]], engine: Engine, workers: int, report: Report, objects: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    events: Any = context.Queue()
    pool = ProcessPoolExecutor(
        min(workers, len(groups)), mp_context=context, initializer=_start_worker, initargs=(events, objects)
    )
    futures: list[Future[None]] = []
    try:
        futures = [pool.submit(_work, group, engine) for group in groups]
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
                kill_worker(process)
        pool.shutdown(wait=True, cancel_futures=True)


def _drain(events: Any, timeout: float) -> Iterator[Event]:
    try:
        yield events.get(timeout=timeout)
        while True:
            yield events.get_nowait()
    except queue.Empty:
        return
