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
from typing import Any, ClassVar, Literal, Protocol, cast, get_args

import torch

from fedbn.errors import unknown
from fedbn.setting import Setting
from fedbn.stacked.cohort import Cohort, Failure, Round
from fedbn.stacked.program import Program
from fedbn.stacked.twins import Unstackable
from fedbn.strategy import NormStrategy, Progress
from fedbn.training import fit

log = logging.getLogger(__name__)

Tier = Literal["exact", "auto", "one", "threads", "lean", "stacked"]

WORTH_A_THREAD = 0.002
"""Seconds a step must take for Python threads to gain: shorter ones wait for each other's interpreter lock."""

WIDEST = 128
CACHED = 2**20
"""Most clients in a stack, and most bytes of one step's inputs: beyond, the activations leave the cache."""


class Work(Protocol):
    """A job of one client, complete in itself; a dataclass.

    Attributes:
        trains: whether it is a `fedbn.stacked.cohort.Round` of training.
    """

    trains: ClassVar[bool]

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
            self._quiet: bool | None = None

    def run(self, jobs: Sequence[Work]) -> list[Any]:
        """Results of all jobs, which are of one kind and run, in their order; a `Failure` for one that raised."""
        self._meet(jobs[0].here)
        if jobs[0].trains and self.tier in ("auto", "lean", "stacked"):
            try:
                return self._stacked(cast(Sequence[Round], jobs))
            except Unstackable as reason:
                self._tell(f"training client by client: {reason}")
        return self._exactly(jobs)

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            log.info(message)

    def _exactly(self, jobs: Sequence[Work]) -> list[Any]:
        if self.tier == "one" or self.threads == 1 or len(jobs) == 1 or not self._independent():
            return [_attempt(job) for job in jobs]
        done: list[Any] = []
        if self.tier != "threads":
            while jobs[0].trains and self._timed < 3 and len(done) < len(jobs):
                done.append(self._attempt_timed(jobs[len(done)]))
            if not WORTH_A_THREAD <= self._step < float("inf"):
                return done + [_attempt(job) for job in jobs[len(done) :]]
        rest = jobs[len(done) :]
        return done + self._on_threads(rest, lambda job, here: _attempt(replace(cast(Any, job), here=here)))

    def _attempt_timed(self, job: Work) -> Any:
        began = time.perf_counter()
        result = _attempt(job)
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


def width(here: Setting, clients: int) -> int:
    """How many clients to put into one stack: about the same number in each, whatever the number of threads.

    Sums come out a little differently in a stack of another width; so it depends on the work alone.

    >>> from fedbn.run import Plan, Run
    >>> from fedbn.setting import setting
    >>> width(setting(Run("digits8", "fedbn", plan=Plan(), model="mlp")), 300)
    100
    """
    data = here.training_data(here.trainers[0])
    inputs = data.x[0].numel() * data.x.element_size() * min(here.run.plan.batch_size, len(data))
    stacks = -(-clients // max(1, min(WIDEST, CACHED // inputs)))
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


def _attempt(job: Work) -> Any:
    try:
        return job.run()
    except Exception as error:
        return Failure(error)
