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
from fedbn.federation.context import Setting
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

Kind = Literal["train", "evaluate", "talk"]

Tier = Literal["exact", "auto", "one", "threads", "lean", "stacked"]

WORTH_A_THREAD = 0.002
"""Seconds a step must take for Python threads to gain: shorter ones wait for each other's interpreter lock."""

WIDEST = 128
CACHED = 2**20
"""Most clients in a stack, and most bytes of one step's inputs: beyond, the activations leave the cache."""

NARROW = 8
"""Users from which on a stack is wide enough to be scored."""


class Work(Protocol):
    """A job of one client, complete in itself; a dataclass.

    Attributes:
        kind: ``train``, a `fedbn.stacked.cohort.Round`; ``evaluate``, a `fedbn.stacked.evaluate.Evaluation`; or
            ``talk``, one exchange about statistics.
    """

    kind: ClassVar[Kind]

    @property
    def here(self) -> Setting: ...

    def run(self) -> Any:
        """Do it alone."""
        ...


def parse_tier(text: str) -> Tier:
    """The tier that a text names.

    Raises:
        UserError: there is none of this name.
    """
    if text not in get_args(Tier):
        raise unknown("tier of the grid", text, get_args(Tier))
    return cast(Tier, text)


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


class Tiers:
    """Does jobs of one run, round after round, in the tier asked for."""

    def __init__(self, tier: Tier = "exact", threads: int | None = None) -> None:
        """Threads: how many cores to use; all by default."""
        self.tier = tier
        self.threads = threads or cores()
        self._told: set[str] = set()
        self._of: Setting | None = None

    def _meet(self, here: Setting) -> None:
        """Forget what was learnt of another run."""
        if here is not self._of:
            self._of, self._cohort = here, Cohort(here)
            self._replicas: list[Setting] = []
            self._chosen: Tier | None = None
            self._step = float("inf")
            self._timed = 0
            self._a_row: float | None = None
            self._quiet: bool | None = None

    def run(self, jobs: Sequence[Work]) -> list[Any]:
        """Results of all jobs, which are of one kind and run, in their order; a `Failure` for one that raised."""
        self._meet(jobs[0].here)
        if self.tier in ("auto", "lean", "stacked"):
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
        if message not in self._told:
            self._told.add(message)
            log.info(message)

    def _exactly(self, jobs: Sequence[Work]) -> list[Any]:
        if self.tier == "one" or self.threads == 1 or len(jobs) == 1 or not self._independent():
            return [_attempt(job.run) for job in jobs]
        done: list[Any] = []
        if self.tier != "threads":
            while jobs[0].kind == "train" and self._timed < 3 and len(done) < len(jobs):
                done.append(self._attempt_timed(jobs[len(done)]))
            if not WORTH_A_THREAD <= self._step < float("inf"):
                return done + [_attempt(job.run) for job in jobs[len(done) :]]
        rest = jobs[len(done) :]
        return done + self._on_threads(rest, lambda job, here: _attempt(replace(cast(Any, job), here=here).run))

    def _attempt_timed(self, job: Work) -> Any:
        began = time.perf_counter()
        result = _attempt(job.run)
        plan = job.here.run.plan
        steps = -(-len(job.here.training_data(cast(Round, job).user)) // plan.batch_size) * plan.local_epochs
        self._step = min(self._step, (time.perf_counter() - began) / steps)
        self._timed += 1
        return result

    def _independent(self) -> bool:
        """Whether clients can be run at the same time: they must not draw from torch's one generator."""
        if self._quiet is None:
            here = cast(Setting, self._of)
            model = here.load(here.initial)
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                before = torch.get_rng_state()
                here.strategy.begin(model, Progress(1, here.run.plan.rounds))
                model(here.training_data(here.trainers[0]).x[:2])
                self._quiet = torch.equal(before, torch.get_rng_state())
            self._quiet &= type(here.strategy).before_step is NormStrategy.before_step
            here.load(here.initial)
        return self._quiet

    def _on_threads(self, parts: Sequence[Any], do: Callable[[Any, Setting], Any]) -> list[Any]:
        """``do(part, replica)`` of all parts, each thread with a replica of the setting: its own scratch model."""
        here = cast(Setting, self._of)
        while len(self._replicas) < self.threads:
            self._replicas.append(replace(here, scratch=copy.deepcopy(here.scratch)))
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
        twin = self._cohort.twin(rounds[0].progress, rounds[0].heard)
        wide = width(rounds[0].here, len(rounds))
        tier = self._fastest(rounds, twin, wide) if self.tier == "auto" else self.tier
        if tier == "threads":
            return self._exactly(cast(Sequence[Work], rounds))
        size = 1 if tier == "lean" else wide
        parts = [rounds[i : i + size] for i in range(0, len(rounds), size)]
        # A few large clients may not divide evenly; those left over get all threads one by one.
        few = tier == "lean" and len(parts) < 4 * self.threads
        left = len(parts) % self.threads if few else len(parts) if self.threads == 1 or len(parts) == 1 else 0
        together = parts[: len(parts) - left]
        done = self._on_threads(together, lambda part, _: self._cohort.train(part, twin)) if together else []
        with _threads(self.threads if few else 1):
            done += [self._cohort.train(part, twin) for part in parts[len(together) :]]
        return [result for part in done for result in part]

    def _evaluated(self, jobs: Sequence[Evaluation]) -> list[Any]:
        here = jobs[0].here
        self._cohort.evaluation_twin()  # raises where there is none
        if any(job.columns != jobs[0].columns for job in jobs):
            raise Unstackable("users are asked for different columns")
        results: dict[int, Any] = {}
        states: dict[int, State] = {}
        for i, job in enumerate(jobs):
            made = _attempt(partial(user_state, here, job.user, job.received, job.kept))
            results[i], states[i] = (made, {}) if isinstance(made, Failure) else ([], made)
        for column in jobs[0].columns:
            if column != "aggregated" and not statistics_layers(here.scratch):
                continue
            able = [i for i, result in results.items() if not isinstance(result, Failure)]
            found = self._column([jobs[i] for i in able], [states[i] for i in able], column) if able else []
            for i, cells_ in zip(able, found, strict=True):
                results[i] = cells_ if isinstance(cells_, Failure) else results[i] + cells_
        for i, job in enumerate(jobs):
            if job.registry and not isinstance(results[i], Failure):
                results[i] += newcomer_cells(here, job.user, states[i], job.registry)
        return [results[i] for i in range(len(jobs))]

    def _column(self, jobs: Sequence[Evaluation], states: Sequence[State], column: Column) -> list[Any]:
        """A column of the matrix for all users, in stacks as wide as what is computed at once allows."""
        here, twin = jobs[0].here, self._cohort.evaluation_twin()
        if not stackable(here, twin, column):
            asked = [(column,) if column in job.globally else () for job in jobs]
            return [
                _attempt(partial(cells, here, job.user, state, (column,), globally, job.registry))
                for job, state, globally in zip(jobs, states, asked, strict=True)
            ]
        people = [here.population.users[job.user] for job in jobs]
        most = max(len(p.train if column == "recalibrated" else p.test) for p in people)
        at_once = BLOCK if column == "online" else CHUNK
        rows = min(at_once, most)
        wide, narrow = (width(here, len(jobs), rows, of=part) for part in (1.0, 0.25))
        size = 1 if self.tier == "lean" else min(wide, max(narrow, NARROW))  # narrower ones are more, for all cores
        parts = [slice(i, i + size) for i in range(0, len(jobs), size)]

        def stack(part: slice, _: Setting) -> list[list[Score]]:
            return evaluate_stack(here, twin, jobs[part], states[part], column)

        done: list[Any] = []
        if self._a_row is None:
            began = time.perf_counter()
            done += stack(parts.pop(0), here)
            self._a_row = (time.perf_counter() - began) / (len(done) * most)
        if self.threads > 1 and len(parts) > 1 and self._a_row * size * rows > WORTH_A_THREAD:
            return done + [cell for part in self._on_threads(parts, stack) for cell in part]
        return done + [cell for part in parts for cell in stack(part, here)]

    def _fastest(self, rounds: Sequence[Round], twin: Program, wide: int) -> Tier:
        """The tier in which a round takes least, from one step of the first clients in each; measured once a run."""
        if self._chosen is None:
            clients = len(rounds)
            steps = {
                "threads": (clients, _seconds(lambda: _step(rounds[0]))),
                "lean": (clients, _seconds(lambda: self._cohort.rehearse(rounds[:1], twin))),
                "stacked": (-(-clients // wide), _seconds(lambda: self._cohort.rehearse(rounds[:wide], twin))),
            }
            cost = {
                tier: seconds * (-(-parts // self.threads) if seconds > WORTH_A_THREAD else parts)
                for tier, (parts, seconds) in steps.items()
            }
            self._chosen = cast(Tier, min(cost, key=cost.__getitem__))
            log.info("a step of %d clients: %s; %s it is", clients, cost, self._chosen)
        return self._chosen


def width(here: Setting, clients: int, rows: int | None = None, of: float = 1.0) -> int:
    """How many clients to put into one stack: about the same number in each, whatever the number of threads.

    Sums come out a little differently in a stack of another width; so it depends on the work alone.

    Args:
        here: the run's setting.
        clients: how many there are.
        rows: how many rows of each are computed at once; a step's by default.
        of: the share of the cache to use.

    >>> from fedbn.config import Plan
    >>> from fedbn.federation.run import Run
    >>> from fedbn.federation.setup import setting
    >>> width(setting(Run("digits8", "fedbn", plan=Plan(), model="mlp")), 300)
    100
    """
    data = here.training_data(here.trainers[0])
    inputs = data.x[0].numel() * data.x.element_size() * (rows or min(here.run.plan.batch_size, len(data)))
    stacks = -(-clients // max(1, min(WIDEST, int(of * CACHED) // inputs)))
    return -(-clients // stacks)


def _step(job: Round) -> None:
    here = job.here
    data = here.training_data(job.user)
    rows = torch.arange(min(here.run.plan.batch_size, len(data)), device=data.y.device)
    model = here.load(here.initial)
    here.strategy.begin(model, job.progress)
    fit(model, data.take(rows), here.run.plan, seed=0, round=1, user=0, epochs=1)


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
