"""Execute runs that differ only in seed or learning rate together, so that one stack trains their clients.

Each run is a greenlet with its own server loop. It is suspended where its clients would train. When all runs are
suspended, the stacks of the lowest round are joined (`fedbn.stacked.joint`), and each run continues with its results.
So the runs train round by round, and which runs train together does not depend on timing. A run that ends, trains its
clients one by one, or fails in a joined stack does not hold up the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from fedbn.federation.context import RunContext
from fedbn.federation.failures import client_log
from fedbn.federation.setup import MAX_CONTEXTS
from fedbn.stacked.executors import stack_limit
from fedbn.stacked.joint import JoinedStackError, JoinedStacks, PendingStack, trainer
from fedbn_simulations.flower.compat import task_identity
from fedbn_simulations.server.clock import Clock, run_clock

MAX_RUNS = MAX_CONTEXTS
"""Maximum number of runs that train together: a step of more runs gains little, and other cores have less to do."""

MAX_ELEMENTS = 2**20
"""Maximum number of activations and weights in a step of a run, above which arithmetic takes most of the time."""


@dataclass(frozen=True)
class Meeting:
    """A run waits until the others have come to their next meeting or round, and receives the lowest number.

    Attributes:
        number: number of rounds that the run has completed.
    """

    number: int


class _Member(greenlet):  # type: ignore[misc]
    """A run in a group, with its clock and the log of its clients."""

    def __init__(self, function: Callable[[], None], log: Path) -> None:
        super().__init__(self._start)
        self.function, self.log, self.clock = function, log, Clock()
        self._suspended: tuple[float, float] | None = None

    def _start(self) -> None:
        run_clock.set(self.clock)
        trainer.set(_train)
        self.function()

    def resume(self, value: Any = None) -> PendingStack | Meeting | None:
        """Continue until the run waits again, and return for what; None if it has ended.

        A value that is an exception is raised in the run.
        """
        if self._suspended is not None:
            self.clock.cpu += time.process_time() - self._suspended[0]
            self.clock.wall += time.perf_counter() - self._suspended[1]
        with client_log(self.log):
            if self._suspended is None:
                waits_for = self.switch()
            else:
                waits_for = self.throw(value) if isinstance(value, Exception) else self.switch(value)
        self._suspended = time.process_time(), time.perf_counter()
        return None if self.dead else cast(PendingStack | Meeting, waits_for)


def _train(stack: PendingStack) -> list[float]:
    """Train a stack with those of the other runs, if they match."""
    losses = _wait(stack)
    return stack.fit() if losses is None else cast(list[float], losses)


def _wait(waits_for: Any) -> Any:
    """Suspend the current run; returns what the group answers."""
    return getcurrent().parent.switch(waits_for)


def meet(number: int) -> int:
    """Wait until the other runs of the group, if any, have completed as many rounds as they can without this run.

    Args:
        number: number of rounds that this run has completed.

    Returns:
        The lowest number of all runs that meet.
    """
    return cast(int, _wait(Meeting(number))) if isinstance(getcurrent(), _Member) else number


def runs_together(ctx: RunContext, engine: str) -> int:
    """Number of runs like this one that train together: 1 if a step takes too long, or if the engine does not stack.

    The number depends neither on timing nor on the number of cores, because the rounding can depend on it.
    """
    if engine != "grid:stacked" or ctx.population.remote:
        return 1
    plan, clients = ctx.run.plan, len(ctx.population.seen)
    clients = min(clients, plan.clients_per_round or clients)
    weights = sum(value.numel() for value in ctx.initial.values())
    elements = clients * (plan.batch_size * _activations(ctx) + weights)
    return max(1, min(MAX_RUNS, stack_limit(ctx) // clients)) if elements <= MAX_ELEMENTS else 1


def _activations(ctx: RunContext) -> int:
    """Number of outputs of all layers for one example, in a pass like that of `check_context`."""
    model, count = ctx.load(ctx.initial).eval(), 0
    x = ctx.training_data(ctx.trainers[0]).x[: min(ctx.run.plan.batch_size, 4)]

    def add(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal count
        count += output.numel() if isinstance(output, Tensor) else 0

    hooks = [m.register_forward_hook(add) for m in model.modules() if not list(m.children())]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return count // len(x)


def run_together(runs: Sequence[tuple[Callable[[], None], Path]]) -> None:
    """Call functions that execute one run each, with the path of the log of its clients.

    The first exception ends all runs and is raised.
    """
    members, stacks = [_Member(*run) for run in runs], JoinedStacks()
    with task_identity(1):  # restored last: members that end here restore the identity that they have found
        try:
            waiting = {m: waits_for for m in members if (waits_for := m.resume()) is not None}
            while waiting:
                for member, answer in _answers(waiting, stacks).items():
                    del waiting[member]
                    if (waits_for := member.resume(answer)) is not None:
                        waiting[member] = waits_for
        finally:
            for member in members:
                if not member.dead:
                    member.throw()


def _answers(waiting: dict[_Member, PendingStack | Meeting], stacks: JoinedStacks) -> dict[_Member, Any]:
    """What the members that continue now have waited for."""
    meetings = {m: w.number for m, w in waiting.items() if isinstance(w, Meeting)}
    pending = {m: w for m, w in waiting.items() if isinstance(w, PendingStack)}
    if meetings:
        return dict.fromkeys(meetings, min(meetings.values()))
    lowest = min(stack.progress.round for stack in pending.values())
    ready = {m: s for m, s in pending.items() if s.progress.round == lowest}
    answers: dict[_Member, Any] = {}
    while ready:
        first = next(iter(ready.values()))
        joined = {m: s for m, s in ready.items() if s is first or first.matches(s)}
        answers |= _fit(joined, stacks) if len(joined) > 1 else dict.fromkeys(joined)
        ready = {m: s for m, s in ready.items() if m not in joined}
    return answers


def _fit(joined: dict[_Member, PendingStack], stacks: JoinedStacks) -> dict[_Member, Any]:
    """Train joined stacks, and divide the time among the runs by their numbers of steps."""
    start = time.process_time(), time.perf_counter()
    try:
        losses: Sequence[Any] = stacks.fit(list(joined.values()))
    except JoinedStackError as error:
        losses = [error] * len(joined)
    spent = time.process_time() - start[0], time.perf_counter() - start[1]
    steps = sum(stack.steps for stack in joined.values())
    for member, stack in joined.items():
        member.clock.cpu -= spent[0] * stack.steps / steps
        member.clock.wall -= spent[1] * stack.steps / steps
    return dict(zip(joined, losses, strict=True))
