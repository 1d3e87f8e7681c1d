"""One stack for the clients of several runs that differ only in their seed or learning rate.

A step of a tiny network spends more time on the calls of its operations than on arithmetic. A stack of the clients of
three runs needs the calls of one run. The engine that executes the runs decides when their stacks are joined
(`trainer`); each run prepares its stack and reads its results as if it trained alone. Random numbers are keyed by
seed, round and user, so the results are those of separate runs up to rounding, which can depend on a stack's width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pad_sequence

from fedbn.federation.context import RunContext
from fedbn.federation.run import Run
from fedbn.nn.roles import State
from fedbn.stacked.fit import FitConfig, StackedClients, fit_stack
from fedbn.stacked.program import Program
from fedbn.stacked.steps import with_rates
from fedbn.strategies.base import Progress

Part = TypeVar("Part")
Result = TypeVar("Result")


class JoinedStackError(Exception):
    """Training of a joined stack failed."""


@dataclass(frozen=True)
class PendingStack:
    """The clients of one run and round that wait for training: the arguments of `fit_stack`."""

    ctx: RunContext
    progress: Progress
    program: Program
    clients: StackedClients
    x: Tensor
    y: Tensor
    config: FitConfig

    @property
    def steps(self) -> int:
        """Number of steps of all clients."""
        return sum(map(len, self.clients.sizes))

    def fit(self) -> list[float]:
        """Train the clients in place; see `fit_stack`."""
        return fit_stack(self.program, self.clients, self.x, self.y, self.config, self.ctx.task)

    def matches(self, other: PendingStack) -> bool:
        """Whether the clients of both can be trained as one stack: they differ at most in seed and learning rate."""
        return (
            comparable(self.ctx.run) == comparable(other.ctx.run)
            and self.progress == other.progress
            and self.ctx.task == other.ctx.task
            and self._layout == other._layout
            and same_modules(self.ctx.scratch, other.ctx.scratch)
        )

    @property
    def _layout(self) -> Any:
        states = (self.clients.tensors, self.clients.optimizer_state)
        shapes = [{n: (t.shape[1:], t.dtype) for n, t in state.items()} for state in states]
        return shapes, [(t.shape[1:], t.dtype) for t in (self.x, self.y)]


trainer: ContextVar[Callable[[PendingStack], list[float]]] = ContextVar("trainer", default=PendingStack.fit)
"""Trains a stack. An engine sets it in the context of a run whose stacks can be joined with those of other runs."""


def train_part(train: Callable[[Part], Result], part: Part) -> Result:
    """Call ``train(part)``; if it was joined with other runs and this failed, again and without them from now on."""
    try:
        return train(part)
    except JoinedStackError:
        trainer.set(PendingStack.fit)
        return train(part)


def comparable(run: Run) -> Run:
    """The run without the seed and the learning rate.

    >>> from fedbn.config import Plan
    >>> one = comparable(Run("digits8", "fedbn", seed=1, plan=Plan(lr=0.1)))
    >>> [one == comparable(Run("digits8", name, plan=Plan(lr=1))) for name in ("fedbn", "silobn")]
    [True, False]
    """
    return replace(run, seed=0, plan=replace(run.plan, lr=1.0))


class JoinedStacks:
    """Trains stacks of several runs as one; the training data are joined once."""

    def __init__(self) -> None:
        """Create without data."""
        self._sources: list[Tensor] = []
        self._data: list[Tensor] = []

    def fit(self, stacks: Sequence[PendingStack]) -> list[list[float]]:
        """Train the clients of stacks that match, in place.

        Returns:
            The sum of the losses of each client's examples, by stack.

        Raises:
            JoinedStackError: an exception was raised. No tensor of the stacks has changed.
        """
        try:
            return self._fit(stacks)
        except Exception as error:
            raise JoinedStackError from error

    def _fit(self, stacks: Sequence[PendingStack]) -> list[list[float]]:
        sources = [t for s in stacks for t in (s.x, s.y)]
        if len(sources) != len(self._sources) or any(a is not b for a, b in zip(sources, self._sources)):
            self._sources, self._data = sources, [torch.cat(sources[i::2]) for i in (0, 1)]
        x, y = self._data
        parts = [s.clients for s in stacks]
        counts, first = [len(p.sizes) for p in parts], accumulate((len(s.x) for s in stacks), initial=0)
        orders = pad_sequence([row + start for p, start in zip(parts, first) for row in p.orders], batch_first=True)
        sizes = [own for p in parts for own in p.sizes]
        positions = sorted(range(len(sizes)), key=lambda i: -sum(sizes[i]))  # as in a stack of one run
        index = torch.tensor(positions, device=x.device)

        def joined(values: Sequence[Sequence[Part]]) -> list[Part]:
            flat = [value for own in values for value in own]
            return [flat[i] for i in positions] if flat else []

        def joined_state(states: Sequence[State]) -> State:
            return {n: torch.cat([state[n] for state in states])[index] for n in states[0]}

        clients = StackedClients(
            joined_state([p.tensors for p in parts]),
            joined_state([p.optimizer_state for p in parts]),
            orders[index],
            [sizes[i] for i in positions],
            joined([p.noise for p in parts]),
            joined([p.draws for p in parts]),
            joined([p.models for p in parts]),
        )
        losses = fit_stack(stacks[0].program, clients, x, y, _config(stacks, counts, index), stacks[0].ctx.task)
        place = torch.argsort(index)
        for trained, states in (
            (clients.tensors, [p.tensors for p in parts]),
            (clients.optimizer_state, [p.optimizer_state for p in parts]),
        ):
            for name, tensor in trained.items():
                for state, own in zip(states, tensor.detach()[place].split(counts), strict=True):
                    state[name].copy_(own)
        found = torch.tensor(losses, dtype=torch.float64)[place.cpu()].split(counts)
        return [own.tolist() for own in found]


def _config(stacks: Sequence[PendingStack], counts: Sequence[int], index: Tensor) -> FitConfig:
    """The options of the stacks, with a learning rate per client if the rates differ."""
    config, rates = stacks[0].config, [s.config.step.lr for s in stacks]
    if len(set(rates)) == 1:
        return config
    lr = torch.tensor(rates, dtype=torch.float64, device=index.device)
    by_client = lr.repeat_interleave(torch.tensor(counts, device=index.device))[index]
    return replace(config, step=with_rates(config.step, by_client))


def same_modules(a: nn.Module, b: nn.Module, *, modes: bool = True) -> bool:
    """Whether two models have the same layers and options; parameters and stored buffers can differ.

    What cannot be compared counts as different.

    Args:
        a: a model.
        b: another model.
        modes: also compare whether layers are in training mode.

    >>> same_modules(nn.Linear(2, 3), nn.Linear(2, 3)), same_modules(nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval())
    (True, False)
    """
    first, second = dict(a.named_modules()), dict(b.named_modules())
    return list(first) == list(second) and all(
        _kind(m) == _kind(second[name]) and _equal(_constants(m, modes), _constants(second[name], modes))
        for name, m in first.items()
    )


def _kind(module: nn.Module) -> Any:
    """The class; a parametrized layer has a class of its own, derived from that of the layer."""
    return type(module).__bases__ if parametrize.is_parametrized(module) else type(module)


def _constants(module: nn.Module, modes: bool) -> dict[str, Any]:
    """Attributes of a module besides its state and the hooks that read or write it, and buffers that are not stored."""
    skipped = ("_parameters", "_buffers", "_modules", *(() if modes else ("training",)))
    attributes = {n: v for n, v in vars(module).items() if n not in skipped and "state_dict" not in n}
    return attributes | {n: module._buffers[n] for n in module._non_persistent_buffers_set}


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(v, b[k]) for k, v in a.items())
    try:
        return bool(a == b)
    except Exception:  # objects of users
        return False
