"""Executors for the jobs of many clients, and the choice between them.

======== ==================================================== ============================
executor method                                               results
======== ==================================================== ============================
one      one client after the other, in order                 reference
threads  like ``one``, on all cores, with one model per core  bit-identical
lean     one client per stacked program, on all cores         equal up to rounding
stacked  many clients per stacked program                     equal up to rounding
exact    ``one`` or ``threads``, whichever is faster          bit-identical
auto     the fastest of the first four, measured              equal up to rounding
======== ==================================================== ============================

Jobs that cannot be stacked use the ``exact`` executor. `ClientExecutor.execution` tells what was used and why.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal, Protocol, cast, get_args

import torch

from fedbn.augment.base import augmentation
from fedbn.errors import UserError, unknown
from fedbn.federation.client import cold_start_scores, user_scores, user_state
from fedbn.federation.context import RunContext
from fedbn.federation.failures import classify
from fedbn.federation.metrics import Column, Score
from fedbn.federation.training import fit
from fedbn.nn.plain import copy_model
from fedbn.nn.roles import State, statistics_layers
from fedbn.nn.threads import torch_threads
from fedbn.online.stream import BLOCK
from fedbn.stacked.cohort import Cohort, CohortResult, CohortRound, Failure, TrainJob
from fedbn.stacked.evaluate import EvaluateJob, evaluate_stack, is_stackable
from fedbn.stacked.fit import step_schedule
from fedbn.stacked.joint import train_part
from fedbn.stacked.layers import Unstackable
from fedbn.stacked.program import Program
from fedbn.statistics.recalibration import CHUNK
from fedbn.strategies.base import NormStrategy, Progress

log = logging.getLogger(__name__)

Kind = Literal["train", "evaluate", "consensus"]

Executor = Literal["exact", "auto", "one", "threads", "lean", "stacked"]

Execution = dict[str, list[str]]
"""How the jobs of a run were executed, by kind of job: `STACKED`, and reasons why they ran one by one."""

STACKED = "stacked"

STACKING = ("auto", "lean", "stacked")
"""Executors that train clients in stacked programs."""

MIN_THREADED_SECONDS = 0.002
"""Minimum seconds of a step for threads to pay off; shorter steps mostly wait for the interpreter lock."""

MAX_STACK_WIDTH = 128
CACHE_BYTES = 2**20
"""Limits of a stack: number of clients, and bytes of one step's inputs, beyond which activations leave the cache."""

MAX_STACK_ENTRIES = 2**20
"""Number of entries of a model beyond which clients train one by one: wider stacks took 1.2 to 2 times as long."""

MIN_EVALUATION_WIDTH = 8
"""Minimum number of users per stack in evaluation."""


class Job(Protocol):
    """A self-contained job of one client; a dataclass.

    Attributes:
        kind: ``train`` for a `fedbn.stacked.cohort.TrainJob`, ``evaluate`` for a
            `fedbn.stacked.evaluate.EvaluateJob`, or ``consensus`` for one exchange of statistics.
    """

    kind: ClassVar[Kind]

    @property
    def ctx(self) -> RunContext: ...

    def run(self) -> Any:
        """Run this job by itself."""
        ...


def parse_executor(text: str) -> Executor:
    """Check the name of an executor.

    Raises:
        UserError: unknown name.
    """
    if text not in get_args(Executor):
        raise unknown("grid executor", text, get_args(Executor))
    return cast(Executor, text)


def cores() -> int:
    """Number of cores for this process; 1 in a worker process, because its siblings use the others.

    >>> cores() >= 1
    True
    """
    return available_cores() if multiprocessing.parent_process() is None else 1


def available_cores() -> int:
    """Number of cores that the operating system assigns to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ClientExecutor:
    """Runs the jobs of a run, round after round, with the selected executor.

    Attributes:
        executor: the selected executor.
        threads: number of cores.
        execution: how the jobs of the last run were executed, by kind of job.
    """

    def __init__(self, executor: Executor = "exact", threads: int | None = None) -> None:
        """Create an executor that uses ``threads`` cores; all cores by default."""
        self.executor = executor
        self.threads = threads or cores()
        self.execution: Execution = {}
        self._ctx: RunContext | None = None

    def _start_run(self, ctx: RunContext) -> None:
        """Reset the measurements when a new run starts."""
        if ctx is not self._ctx:
            self.execution = {}
            self._failed: dict[Kind, str] = {}
            self._cohorts_failed = False
            self._ctx, self._cohort = ctx, Cohort(ctx)
            self._replicas: list[RunContext] = []
            self._fastest: Executor | None = None
            self._step_seconds = float("inf")
            self._num_timed = 0
            self._row_seconds: float | None = None
            self._thread_safe: bool | None = None

    def run(self, jobs: Sequence[Job]) -> list[Any]:
        """Results of jobs of one kind and run, in order; the result of a job that raised is a `Failure`.

        If stacked execution fails in any way, the jobs run again with the ``exact`` executor. They have the same
        results as in the first place, because they do not change their inputs and draw keyed random numbers.
        """
        self._start_run(jobs[0].ctx)
        kind = jobs[0].kind
        if self.executor in STACKING and kind in ("train", "evaluate"):
            try:
                if kind in self._failed:
                    raise Unstackable(self._failed[kind])
                if kind == "train":
                    return self._train_stacked(cast(Sequence[TrainJob], jobs))
                return self._evaluate_stacked(cast(Sequence[EvaluateJob], jobs))
            except UserError:
                pass  # raised again by the exact executor, for the job that causes it
            except Unstackable as reason:
                self._record(kind, str(reason))
            except Exception as error:
                self._failed[kind] = f"the stacked engine failed with {classify(error).name}"
                log.info(self._failed[kind], exc_info=True)
                self._record(kind, self._failed[kind])
        return self._run_exact(jobs)

    def _record(self, kind: Kind, how: str) -> None:
        """Record how jobs were executed: `STACKED`, or the reason why they were not."""
        if how not in (known := self.execution.setdefault(kind, [])):
            known.append(how)

    def _run_exact(self, jobs: Sequence[Job]) -> list[Any]:
        if self.executor == "one" or self.threads == 1 or len(jobs) == 1 or not self._is_thread_safe():
            return [_attempt(job.run) for job in jobs]
        results: list[Any] = []
        if self.executor != "threads":
            while jobs[0].kind == "train" and self._num_timed < 3 and len(results) < len(jobs):
                results.append(self._attempt_timed(jobs[len(results)]))
            if not MIN_THREADED_SECONDS <= self._step_seconds < float("inf"):
                return results + [_attempt(job.run) for job in jobs[len(results) :]]
        rest = jobs[len(results) :]
        return results + self._on_threads(rest, lambda job, ctx: _attempt(replace(cast(Any, job), ctx=ctx).run))

    def _attempt_timed(self, job: Job) -> Any:
        start = time.perf_counter()
        result = _attempt(job.run)
        plan = job.ctx.run.plan
        steps = -(-len(job.ctx.training_data(cast(TrainJob, job).user)) // plan.batch_size) * plan.local_epochs
        self._step_seconds = min(self._step_seconds, (time.perf_counter() - start) / steps)
        self._num_timed += 1
        return result

    def _is_thread_safe(self) -> bool:
        """Whether clients can run concurrently, which requires that they do not use torch's global generator."""
        if self._thread_safe is None:
            ctx = cast(RunContext, self._ctx)
            model = ctx.load(ctx.initial)
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                before = torch.get_rng_state()
                ctx.strategy.set_training_mode(model, Progress(1, ctx.run.plan.rounds))
                model(ctx.training_data(ctx.trainers[0]).x[:2])
                self._thread_safe = torch.equal(before, torch.get_rng_state())
            augment = augmentation(ctx.run.plan.augment)
            self._thread_safe &= augment is None or not augment.draws_globally
            self._thread_safe &= type(ctx.strategy).on_before_optimizer_step is NormStrategy.on_before_optimizer_step
            ctx.load(ctx.initial)
        return self._thread_safe

    def _on_threads(self, parts: Sequence[Any], function: Callable[[Any, RunContext], Any]) -> list[Any]:
        """Call ``function(part, replica)`` for all parts; each thread has its own copy of the scratch model."""
        ctx = cast(RunContext, self._ctx)
        while len(self._replicas) < self.threads:
            self._replicas.append(replace(ctx, scratch=copy_model(ctx.scratch)))
        free = list(self._replicas)

        def with_replica(part: Any) -> Any:
            replica = free.pop()
            try:
                return function(part, replica)
            finally:
                free.append(replica)

        state = torch.get_rng_state()
        try:
            with ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                return list(pool.map(with_replica, parts))
        finally:
            torch.set_rng_state(state)

    def train_cohort(self, ctx: RunContext, cohort: CohortRound, max_state_bytes: float) -> CohortResult | None:
        """Train many clients whose states are stacked already, as `run` does with one job per client.

        Args:
            ctx: the run's context.
            cohort: the round and its clients.
            max_state_bytes: largest client state that may be kept in memory.

        Returns:
            The result; None if the clients need jobs of their own: their states are too large, the executor does not
            stack them, their strategy has hooks, they cannot be stacked, for which `run` then records the reason, or a
            cohort of this run has failed.
        """
        self._start_run(ctx)
        if self.executor not in STACKING or "train" in self._failed or self._cohorts_failed:
            return None
        try:
            program = self._cohort.program(cohort.progress)
            if self._cohort.runs_hooks or self._select_executor(cohort.users, cohort.progress, program) != "stacked":
                return None
            trained = self._cohort.empty_entries(program, len(cohort.users))
            if self._cohort.state_bytes(trained) > max_state_bytes * len(cohort.users):
                return None
            # Not on the threads: each of these short draws would wait for the interpreter lock of the others.
            shuffled = self._cohort.shuffled_rows(cohort.users, cohort.progress.round)
            train = partial(self._cohort.train_part, cohort, program=program, shuffled=shuffled, trained=trained)
            parts = self._train_parts(cohort.users, cohort.progress, program, train)
            return self._cohort.result(cohort, trained, [loss for part in parts for loss in part])
        except (UserError, Unstackable):
            return None  # raised again by the jobs
        except Exception as error:
            self._cohorts_failed = True
            log.info("training of all clients in one call failed", exc_info=True)
            log.warning(
                f"training of all clients in one call failed with {classify(error).name}: from now on, each client "
                "receives messages, with the same results in more time"
            )
            return None

    def _train_stacked(self, rounds: Sequence[TrainJob]) -> list[Any]:
        program = self._cohort.program(rounds[0].progress, rounds[0].aggregates)
        users = [job.user for job in rounds]
        train = self._cohort.train
        parts = self._train_parts(users, rounds[0].progress, program, lambda part: train(rounds[part], program))
        return [result for part in parts for result in part]

    def _train_parts(
        self, users: Sequence[int], progress: Progress, program: Program, train: Callable[[slice], list[Any]]
    ) -> list[list[Any]]:
        """Call ``train`` with parts of the clients, in the stacks and on the threads of the executor."""
        clients, ctx = len(users), cast(RunContext, self._ctx)
        width = training_width(ctx, clients)
        executor = self._select_executor(users, progress, program)
        if executor == "threads":
            raise Unstackable("one by one is faster on this machine")
        size = 1 if executor == "lean" else width
        parts = [slice(i, min(i + size, clients)) for i in range(0, clients, size)]
        # A small number of parts may not divide evenly by the threads; the remainder runs one by one with all threads.
        few = executor == "lean" and len(parts) < 4 * self.threads
        rest = len(parts) % self.threads if few else len(parts) if self.threads == 1 or len(parts) == 1 else 0
        parallel = parts[: len(parts) - rest]
        results = self._on_threads(parallel, lambda part, _: train(part)) if parallel else []
        with torch_threads(self.threads if few else 1):
            results += [train_part(train, part) for part in parts[len(parallel) :]]
        self._record("train", STACKED)
        return results

    def _evaluate_stacked(self, jobs: Sequence[EvaluateJob]) -> list[Any]:
        ctx = jobs[0].ctx
        self._cohort.evaluation_program()  # raises if there is none
        if any((job.columns, job.final) != (jobs[0].columns, jobs[0].final) for job in jobs):
            raise Unstackable("users have different columns")
        results: dict[int, Any] = {}
        states: dict[int, State] = {}
        for i, job in enumerate(jobs):
            state = _attempt(partial(user_state, ctx, job.user, job.received, job.client_state))
            results[i], states[i] = (state, {}) if isinstance(state, Failure) else ([], state)
        for column in jobs[0].columns:
            if column != "aggregated" and not statistics_layers(ctx.scratch):
                continue
            valid = [i for i, result in results.items() if not isinstance(result, Failure)]
            valid_jobs, valid_states = [jobs[i] for i in valid], [states[i] for i in valid]
            column_results = self._evaluate_column(valid_jobs, valid_states, column) if valid else []
            for i, cells in zip(valid, column_results, strict=True):
                results[i] = cells if isinstance(cells, Failure) else results[i] + cells
        for i, job in enumerate(jobs):
            if job.client_statistics and not isinstance(results[i], Failure):
                results[i] += cold_start_scores(ctx, job.user, states[i], job.client_statistics)
        self._record("evaluate", STACKED)
        return [results[i] for i in range(len(jobs))]

    def _evaluate_column(self, jobs: Sequence[EvaluateJob], states: Sequence[State], column: Column) -> list[Any]:
        """One column of the evaluation matrix for all users, in stacks whose inputs fit into the cache."""
        ctx, program = jobs[0].ctx, self._cohort.evaluation_program()
        if not is_stackable(ctx, program, column):
            global_columns = [(column,) if column in job.globally else () for job in jobs]
            score = partial(user_scores, ctx, final=jobs[0].final)
            return [
                _attempt(partial(score, job.user, state, (column,), globally, job.client_statistics))
                for job, state, globally in zip(jobs, states, global_columns, strict=True)
            ]
        users = [ctx.population.users[job.user] for job in jobs]
        longest = max(len(p.train if column == "recalibrated" else p.test) for p in users)
        rows = min(BLOCK if column == "online" else CHUNK, longest)
        widest, narrow = (stack_width(ctx, len(jobs), rows, cache_share=share) for share in (1.0, 0.25))
        # Narrower stacks are more numerous and keep all cores busy.
        size = 1 if self.executor == "lean" else min(widest, max(narrow, MIN_EVALUATION_WIDTH))
        parts = [slice(i, i + size) for i in range(0, len(jobs), size)]

        def stack(part: slice, _: RunContext) -> list[list[Score]]:
            return evaluate_stack(ctx, program, jobs[part], states[part], column)

        results: list[Any] = []
        if self._row_seconds is None:
            start = time.perf_counter()
            results += stack(parts.pop(0), ctx)
            self._row_seconds = (time.perf_counter() - start) / (len(results) * longest)
        if self.threads > 1 and len(parts) > 1 and self._row_seconds * size * rows > MIN_THREADED_SECONDS:
            return results + [cell for part in self._on_threads(parts, stack) for cell in part]
        return results + [cell for part in parts for cell in stack(part, ctx)]

    def _select_executor(self, users: Sequence[int], progress: Progress, program: Program) -> Executor:
        """The selected executor; for ``auto`` the fastest, measured once per run with a step of the first clients."""
        if self.executor != "auto":
            return self.executor
        if self._fastest is None:
            ctx = cast(RunContext, self._ctx)
            width, sizes = training_width(ctx, len(users)), [self._cohort.batch_sizes[user] for user in users]
            (size, _), *_ = Counter(s for own in sizes for s in own).most_common(1) or [(1, 0)]
            lean, stacked = (partial(self._cohort.trial_step, users[:k], program, size) for k in (1, width))
            seconds = {
                "threads": _fastest_seconds(lambda: _single_step(ctx, users[0], progress, size)),
                "lean": _fastest_seconds(lean),
                "stacked": _fastest_seconds(stacked),
            }
            cost = round_seconds(sizes, width, self.threads, seconds)
            self._fastest = cast(Executor, min(cost, key=cost.__getitem__))
            log.info("seconds of a round of %d clients: %s; using %s", len(users), cost, self._fastest)
        return self._fastest


def stack_width(ctx: RunContext, clients: int, rows: int | None = None, cache_share: float = 1.0) -> int:
    """Number of clients per stack, so that all stacks have about the same width.

    Sums are rounded differently in stacks of another width, so the width does not depend on the number of threads.

    Args:
        ctx: the run's context.
        clients: total number of clients.
        rows: rows per client and forward pass; the batch size by default.
        cache_share: fraction of `CACHE_BYTES` to use.

    >>> from fedbn.config import Plan
    >>> from fedbn.federation.run import Run
    >>> from fedbn.federation.setup import build_context
    >>> stack_width(build_context(Run("digits8", "fedbn", plan=Plan(), model="mlp")), 300)
    100
    """
    stacks = -(-clients // stack_limit(ctx, rows, cache_share))
    return -(-clients // stacks)


def training_width(ctx: RunContext, clients: int) -> int:
    """Number of clients per stack in training: 1 for large models, which leave the cache in every layer of a stack.

    >>> from fedbn.config import Plan
    >>> from fedbn.federation.run import Run
    >>> from fedbn.federation.setup import build_context
    >>> training_width(build_context(Run("digits", "fedbn", plan=Plan(), model="digit-cnn")), 5)
    1
    """
    entries = sum(value.numel() for value in ctx.initial.values())
    return 1 if entries > MAX_STACK_ENTRIES else stack_width(ctx, clients)


def stack_limit(ctx: RunContext, rows: int | None = None, cache_share: float = 1.0) -> int:
    """Maximum number of clients per stack; arguments as in `stack_width`."""
    data = ctx.training_data(ctx.trainers[0])
    inputs = data.x[0].numel() * data.x.element_size() * (rows or min(ctx.run.plan.batch_size, len(data)))
    return max(1, min(MAX_STACK_WIDTH, int(cache_share * CACHE_BYTES) // inputs))


def round_seconds(
    sizes: Sequence[Sequence[int]], width: int, threads: int, seconds: Mapping[str, float]
) -> dict[str, float]:
    """Estimated seconds of a round by executor.

    When clients have different numbers of batches, the last steps of a stack have few clients and cost relatively more.

    Args:
        sizes: batch sizes of each client.
        width: clients per stack.
        threads: number of cores.
        seconds: seconds of a step of one client (``threads``, ``lean``) and of ``width`` clients (``stacked``).

    >>> seconds = {"threads": 1.0, "lean": 0.5, "stacked": 0.75}
    >>> round_seconds([[8], [8]], 2, 1, seconds), round_seconds([[8] * 9, [8]], 2, 1, seconds)["stacked"]
    ({'threads': 2.0, 'lean': 1.0, 'stacked': 0.75}, 4.75)
    """

    def per_core(executor: str, total: float, parts: int) -> float:
        return total / min(parts, threads) if seconds[executor] > MIN_THREADED_SECONDS else total

    steps = sum(map(len, sizes))
    stacks = [sorted(sizes[i : i + width], key=len, reverse=True) for i in range(0, len(sizes), width)]
    groups = [len(members) for stack in stacks for members, *_ in step_schedule(stack)]
    per_client = (seconds["stacked"] - seconds["lean"]) / max(1, width - 1)
    stacked = sum(seconds["lean"] + per_client * (members - 1) for members in groups)
    cost = {name: per_core(name, steps * seconds[name], len(sizes)) for name in ("threads", "lean")}
    return cost | {"stacked": per_core("stacked", stacked, len(stacks))}


def _single_step(ctx: RunContext, user: int, progress: Progress, size: int) -> None:
    data = ctx.training_data(user)
    rows = torch.arange(size, device=data.y.device) % len(data)
    model = ctx.load(ctx.initial)
    ctx.strategy.set_training_mode(model, progress)
    fit(model, data.take(rows), ctx.run.plan, task=ctx.task, seed=0, round=1, user=0, epochs=1)


def _fastest_seconds(function: Callable[[], None]) -> float:
    """Seconds of the fastest of three calls, after one warm-up call."""
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _attempt(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return Failure(error)
