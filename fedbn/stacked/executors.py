"""Ways to do the jobs of many clients, and the choice between them.

======== ==================================================== ============================
tier     how                                                  numbers
======== ==================================================== ============================
one      one client after the other, in order                 the definition
threads  the same, on all cores; a copy of the model each     the same bits
lean     each alone in the stacked program, on all cores      equal to rounding
stacked  many side by side in the stacked program             equal to rounding
exact    ``one`` or ``threads``, whichever is faster          the same bits
auto     the fastest of the four, measured                    equal to rounding
======== ==================================================== ============================

What cannot be stacked is done by the exact tiers; a log message says so and why, once.
"""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal, Protocol, cast, get_args

import torch

from fedbn.errors import unknown
from fedbn.federation.client import cells, newcomer_cells, user_state
from fedbn.federation.context import RunContext
from fedbn.federation.metrics import Column, Score
from fedbn.federation.training import fit
from fedbn.nn.roles import State, statistics_layers
from fedbn.online.stream import BLOCK
from fedbn.stacked.cohort import Cohort, Failure, Round
from fedbn.stacked.evaluate import Evaluation, evaluate_stack, stackable
from fedbn.stacked.layers import Unstackable
from fedbn.stacked.program import Program
from fedbn.statistics.recalibration import CHUNK
from fedbn.strategies.base import NormStrategy, Progress

log = logging.getLogger(__name__)

Kind = Literal["train", "evaluate", "consensus"]

Executor = Literal["exact", "auto", "one", "threads", "lean", "stacked"]

WORTH_A_THREAD = 0.002
"""Seconds a step must take for Python threads to gain: shorter ones wait for each other's interpreter lock."""

WIDEST = 128
CACHED = 2**20
"""Most clients in a stack, and most bytes of one step's inputs: beyond, the activations leave the cache."""

NARROW = 8
"""Users from which on a stack is wide enough to be scored."""


class Job(Protocol):
    """A job of one client, complete in itself; a dataclass.

    Attributes:
        kind: ``train``, a `fedbn.stacked.cohort.Round`; ``evaluate``, a `fedbn.stacked.evaluate.Evaluation`; or
            ``steps``, one exchange about statistics.
    """

    kind: ClassVar[Kind]

    @property
    def ctx(self) -> RunContext: ...

    def run(self) -> Any:
        """Do it alone."""
        ...


def parse_executor(text: str) -> Executor:
    """The tier that a text names.

    Raises:
        UserError: there is none of this name.
    """
    if text not in get_args(Executor):
        raise unknown("tier of the grid", text, get_args(Executor))
    return cast(Executor, text)


def cores() -> int:
    """Cores that this process may use; one in a worker of a pool, whose siblings use the others.

    >>> cores() >= 1
    True
    """
    if multiprocessing.parent_process() is not None:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads inside torch's own kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ClientExecutor:
    """Does jobs of one run, round after round, in the tier asked for."""

    def __init__(self, executor: Executor = "exact", threads: int | None = None) -> None:
        """Threads: how many cores to use; all by default."""
        self.executor = executor
        self.threads = threads or cores()
        self._logged: set[str] = set()
        self._of: RunContext | None = None

    def _start_run(self, ctx: RunContext) -> None:
        """Forget what was learnt of another run."""
        if ctx is not self._of:
            self._of, self._cohort = ctx, Cohort(ctx)
            self._replicas: list[RunContext] = []
            self._chosen: Executor | None = None
            self._step = float("inf")
            self._timed = 0
            self._a_row: float | None = None
            self._quiet: bool | None = None

    def run(self, jobs: Sequence[Job]) -> list[Any]:
        """Results of all jobs, which are of one kind and run, in their order; a `Failure` for one that raised."""
        self._start_run(jobs[0].ctx)
        if self.executor in ("auto", "lean", "stacked"):
            try:
                if jobs[0].kind == "train":
                    return self._stacked(cast(Sequence[Round], jobs))
                if jobs[0].kind == "evaluate":
                    return self._evaluated(cast(Sequence[Evaluation], jobs))
            except Unstackable as reason:
                words = {"train": "training client by client", "evaluate": "evaluating user by user"}
                self._tell(f"{words[jobs[0].kind]}: {reason}")
        return self._exactly(jobs)

    def _tell(self, message: str) -> None:
        if message not in self._logged:
            self._logged.add(message)
            log.info(message)

    def _exactly(self, jobs: Sequence[Job]) -> list[Any]:
        if self.executor == "one" or self.threads == 1 or len(jobs) == 1 or not self._independent():
            return [_attempt(job.run) for job in jobs]
        done: list[Any] = []
        if self.executor != "threads":
            while jobs[0].kind == "train" and self._timed < 3 and len(done) < len(jobs):
                done.append(self._attempt_timed(jobs[len(done)]))
            if not WORTH_A_THREAD <= self._step < float("inf"):
                return done + [_attempt(job.run) for job in jobs[len(done) :]]
        rest = jobs[len(done) :]
        return done + self._on_threads(rest, lambda job, ctx: _attempt(replace(cast(Any, job), ctx=ctx).run))

    def _attempt_timed(self, job: Job) -> Any:
        began = time.perf_counter()
        result = _attempt(job.run)
        plan = job.ctx.run.plan
        steps = -(-len(job.ctx.training_data(cast(Round, job).user)) // plan.batch_size) * plan.local_epochs
        self._step = min(self._step, (time.perf_counter() - began) / steps)
        self._timed += 1
        return result

    def _independent(self) -> bool:
        """Whether clients can be run at the same time: they must not draw from torch's one generator."""
        if self._quiet is None:
            ctx = cast(RunContext, self._of)
            model = ctx.load(ctx.initial)
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                before = torch.get_rng_state()
                ctx.strategy.set_training_mode(model, Progress(1, ctx.run.plan.rounds))
                model(ctx.training_data(ctx.trainers[0]).x[:2])
                self._quiet = torch.equal(before, torch.get_rng_state())
            self._quiet &= type(ctx.strategy).on_before_optimizer_step is NormStrategy.on_before_optimizer_step
            ctx.load(ctx.initial)
        return self._quiet

    def _on_threads(self, parts: Sequence[Any], do: Callable[[Any, RunContext], Any]) -> list[Any]:
        """``do(part, replica)`` of all parts, each thread with a replica of the setting: its own scratch model."""
        ctx = cast(RunContext, self._of)
        while len(self._replicas) < self.threads:
            self._replicas.append(replace(ctx, scratch=copy.deepcopy(ctx.scratch)))
        free = list(self._replicas)

        def with_replica(part: Any) -> Any:
            mine = free.pop()
            try:
                return do(part, mine)
            finally:
                free.append(mine)

        state = torch.get_rng_state()
        try:
            with ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                return list(pool.map(with_replica, parts))
        finally:
            torch.set_rng_state(state)

    def _stacked(self, rounds: Sequence[Round]) -> list[Any]:
        program = self._cohort.program(rounds[0].progress, rounds[0].aggregates)
        wide = width(rounds[0].ctx, len(rounds))
        executor = self._fastest(rounds, program, wide) if self.executor == "auto" else self.executor
        if executor == "threads":
            return self._exactly(cast(Sequence[Job], rounds))
        size = 1 if executor == "lean" else wide
        parts = [rounds[i : i + size] for i in range(0, len(rounds), size)]
        # A few large clients may not divide evenly; those left over get all threads one by one.
        few = executor == "lean" and len(parts) < 4 * self.threads
        left = len(parts) % self.threads if few else len(parts) if self.threads == 1 or len(parts) == 1 else 0
        together = parts[: len(parts) - left]
        done = self._on_threads(together, lambda part, _: self._cohort.train(part, program)) if together else []
        with _threads(self.threads if few else 1):
            done += [self._cohort.train(part, program) for part in parts[len(together) :]]
        return [result for part in done for result in part]

    def _evaluated(self, jobs: Sequence[Evaluation]) -> list[Any]:
        ctx = jobs[0].ctx
        self._cohort.evaluation_program()  # raises where there is none
        if any(job.columns != jobs[0].columns for job in jobs):
            raise Unstackable("users are asked for different columns")
        results: dict[int, Any] = {}
        states: dict[int, State] = {}
        for i, job in enumerate(jobs):
            made = _attempt(partial(user_state, ctx, job.user, job.received, job.client_state))
            results[i], states[i] = (made, {}) if isinstance(made, Failure) else ([], made)
        for column in jobs[0].columns:
            if column != "aggregated" and not statistics_layers(ctx.scratch):
                continue
            able = [i for i, result in results.items() if not isinstance(result, Failure)]
            found = self._column([jobs[i] for i in able], [states[i] for i in able], column) if able else []
            for i, cells_ in zip(able, found, strict=True):
                results[i] = cells_ if isinstance(cells_, Failure) else results[i] + cells_
        for i, job in enumerate(jobs):
            if job.client_statistics and not isinstance(results[i], Failure):
                results[i] += newcomer_cells(ctx, job.user, states[i], job.client_statistics)
        return [results[i] for i in range(len(jobs))]

    def _column(self, jobs: Sequence[Evaluation], states: Sequence[State], column: Column) -> list[Any]:
        """A column of the matrix for all users, in stacks as wide as what is computed at once allows."""
        ctx, program = jobs[0].ctx, self._cohort.evaluation_program()
        if not stackable(ctx, program, column):
            asked = [(column,) if column in job.globally else () for job in jobs]
            return [
                _attempt(partial(cells, ctx, job.user, state, (column,), globally, job.client_statistics))
                for job, state, globally in zip(jobs, states, asked, strict=True)
            ]
        users = [ctx.population.users[job.user] for job in jobs]
        most = max(len(p.train if column == "recalibrated" else p.test) for p in users)
        at_once = BLOCK if column == "online" else CHUNK
        rows = min(at_once, most)
        wide, narrow = (width(ctx, len(jobs), rows, of=part) for part in (1.0, 0.25))
        size = 1 if self.executor == "lean" else min(wide, max(narrow, NARROW))  # narrower ones are more, for all cores
        parts = [slice(i, i + size) for i in range(0, len(jobs), size)]

        def stack(part: slice, _: RunContext) -> list[list[Score]]:
            return evaluate_stack(ctx, program, jobs[part], states[part], column)

        done: list[Any] = []
        if self._a_row is None:
            began = time.perf_counter()
            done += stack(parts.pop(0), ctx)
            self._a_row = (time.perf_counter() - began) / (len(done) * most)
        if self.threads > 1 and len(parts) > 1 and self._a_row * size * rows > WORTH_A_THREAD:
            return done + [cell for part in self._on_threads(parts, stack) for cell in part]
        return done + [cell for part in parts for cell in stack(part, ctx)]

    def _fastest(self, rounds: Sequence[Round], program: Program, wide: int) -> Executor:
        """The tier in which a round takes least, from one step of the first clients in each; measured once a run."""
        if self._chosen is None:
            clients = len(rounds)
            steps = {
                "threads": (clients, _seconds(lambda: _step(rounds[0]))),
                "lean": (clients, _seconds(lambda: self._cohort.rehearse(rounds[:1], program))),
                "stacked": (-(-clients // wide), _seconds(lambda: self._cohort.rehearse(rounds[:wide], program))),
            }
            cost = {
                executor: seconds * (-(-parts // self.threads) if seconds > WORTH_A_THREAD else parts)
                for executor, (parts, seconds) in steps.items()
            }
            self._chosen = cast(Executor, min(cost, key=cost.__getitem__))
            log.info("a step of %d clients: %s; %s it is", clients, cost, self._chosen)
        return self._chosen


def width(ctx: RunContext, clients: int, rows: int | None = None, of: float = 1.0) -> int:
    """How many clients to put into one stack: about the same number in each, whatever the number of threads.

    Sums come out a little differently in a stack of another width; so it depends on the work alone.

    Args:
        ctx: the run's context.
        clients: how many there are.
        rows: how many rows of each are computed at once; a step's by default.
        of: the share of the cache to use.

    >>> from fedbn.config import Plan
    >>> from fedbn.federation.run import Run
    >>> from fedbn.federation.setup import build_context
    >>> width(build_context(Run("digits8", "fedbn", plan=Plan(), model="mlp")), 300)
    100
    """
    data = ctx.training_data(ctx.trainers[0])
    inputs = data.x[0].numel() * data.x.element_size() * (rows or min(ctx.run.plan.batch_size, len(data)))
    stacks = -(-clients // max(1, min(WIDEST, int(of * CACHED) // inputs)))
    return -(-clients // stacks)


def _step(job: Round) -> None:
    ctx = job.ctx
    data = ctx.training_data(job.user)
    rows = torch.arange(min(ctx.run.plan.batch_size, len(data)), device=data.y.device)
    model = ctx.load(ctx.initial)
    ctx.strategy.set_training_mode(model, job.progress)
    fit(model, data.take(rows), ctx.run.plan, seed=0, round=1, user=0, epochs=1)


def _seconds(do: Callable[[], None]) -> float:
    """Seconds of the fastest of three goes, after one to warm up."""
    spent = []
    for _ in range(4):
        began = time.perf_counter()
        do()
        spent.append(time.perf_counter() - began)
    return min(spent[1:])


def _attempt(do: Callable[[], Any]) -> Any:
    try:
        return do()
    except Exception as error:
        return Failure(error)
