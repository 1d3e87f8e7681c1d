"""Train a stack of clients by SGD, each with the steps that `fedbn.federation.training.fit` would take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from fedbn.config import Precision
from fedbn.federation.training import computed
from fedbn.nn.roles import State
from fedbn.stacked.program import Program


@dataclass
class Trainee:
    """One client of a stack.

    Attributes:
        state: its model's state; not written to.
        order: the rows of its steps, one step after the other, counted from its first.
        sizes: how many rows each step takes.
        noise: draws its dropout masks; None where there are none.
        momentum: buffers from its last round, by parameter name.
        first: its first row in the stack's data.
    """

    state: State
    order: Tensor
    sizes: Sequence[int]
    noise: torch.Generator | None
    momentum: State = field(default_factory=dict)
    first: int = 0


@dataclass(frozen=True)
class Descent:
    """How every client of a stack steps.

    Attributes:
        lr, momentum, weight_decay: of SGD.
        mu: weight of half the squared distance to the values before the first step (FedProx).
        pulled: names of the parameters that it counts for.
        precision: of products and convolutions.
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    mu: float = 0.0
    pulled: frozenset[str] = frozenset()
    precision: Precision = "float32"


@dataclass
class Trained:
    """One client after training: its state, the sum of its examples' losses, its momentum buffers."""

    state: State
    loss: float
    momentum: State


HEAVY = 2**18
"""Weights of a linear layer from which on it pays to step in the backward pass: they no longer fit the cache."""


def agenda(sizes: Sequence[Sequence[int]]) -> Iterator[list[tuple[int, int]]]:
    """The steps of all clients in an order in which as many as possible are taken together.

    Only batches of one size can be. Every client's own steps stay in their order; whose next batch has the most
    frequent size steps next.

    Args:
        sizes: for each client, the sizes of its batches.

    Yields:
        Pairs of client and step.

    >>> list(agenda([[4, 4, 1], [4, 4, 3], [4, 1]]))
    [[(0, 0), (1, 0), (2, 0)], [(0, 1), (1, 1)], [(0, 2), (2, 1)], [(1, 2)]]
    """
    if all(own == sizes[0] for own in sizes):
        yield from ([(i, step) for i in range(len(sizes))] for step in range(len(sizes[0])))
        return
    at = [0] * len(sizes)
    while waiting := [i for i, own in enumerate(sizes) if at[i] < len(own)]:
        size, _ = Counter(sizes[i][at[i]] for i in waiting).most_common(1)[0]
        together = [i for i in waiting if sizes[i][at[i]] == size]
        yield [(i, at[i]) for i in together]
        for i in together:
            at[i] += 1


@dataclass(frozen=True)
class Group:
    """Clients of a stack that step together.

    Attributes:
        members: which, as indices into the stack.
        rows: the same as a slice, where they are neighbors, or as a tensor.
        leaves: their parameters, by name, laid out for the program.
        momentum: their buffers, likewise; empty without momentum.
        forward: the program on their tensors.
        entries: all their entries, laid out.
        across: whether examples lie on the last axis (`fedbn.stacked.program.Program.across`).
    """

    members: tuple[int, ...]
    rows: slice | Tensor
    leaves: State
    momentum: State
    forward: Callable[[Tensor], Tensor]
    entries: State
    across: bool


class Stack:
    """States of K clients as tensors ``[K, *shape]``."""

    def __init__(self, program: Program, trainees: Sequence[Trainee], how: Descent, axes: int) -> None:
        self.program = program
        self.device = next(iter(trainees[0].state.values())).device
        self.across = program.across(axes)
        plain = not (how.momentum or how.weight_decay or how.mu) and how.precision == "float32"
        self.lr = how.lr if plain else None
        self.noise = [t.noise for t in trainees]
        self.tensors = {n: _stack([t.state[n] for t in trainees]) for n in trainees[0].state}
        self.momentum: State = {}
        if how.momentum:
            self.momentum = {n: torch.zeros_like(self.tensors[n]) for n in program.trained}
            for i, trainee in enumerate(trainees):
                for name, buffer in trainee.momentum.items():
                    self.momentum[name][i] = buffer
        self._views: dict[tuple[int, ...], Group] = {}

    def group(self, members: tuple[int, ...]) -> Group:
        """Some of the clients, in the order of the stack."""
        if members in self._views:
            return self._views[members]
        first, last = members[0], members[-1]
        views = last - first + 1 == len(members)
        rows = slice(first, last + 1) if views else torch.tensor(members, device=self.device)
        entries = {n: self.program.laid(n, t[rows]).detach() for n, t in self.tensors.items()}
        momentum = {n: self.program.laid(n, t[rows]).detach() for n, t in self.momentum.items()}
        alone = self.lr is not None and len(members) == 1
        stepping = {n for n in self.program.heavy if entries[n].numel() >= HEAVY} if alone else set()
        leaves = {n: entries[n].requires_grad_() for n in self.program.trained if n not in stepping}
        noise = [self.noise[i] for i in members]
        across = self.across and len(members) > 1
        forward = self.program.bind(entries, len(members), noise, across=across, stepping=stepping, lr=self.lr)
        made = Group(members, rows, leaves, momentum, forward, entries, across)
        if views:
            self._views[members] = made
        return made

    def put_back(self, group: Group) -> None:
        """Write what a group has learnt into the stack, unless it shares the stack's memory."""
        if isinstance(group.rows, slice):
            return
        for of, parts in ((self.tensors, group.entries), (self.momentum, group.momentum)):
            for name, whole in of.items():
                whole[group.rows] = parts[name].detach().reshape(len(group.members), *whole.shape[1:])


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    if all(t is first for t in tensors):
        return first.unsqueeze(0).repeat(len(tensors), *[1] * first.dim())
    return torch.stack(list(tensors)).contiguous()


def fit_stack(program: Program, trainees: Sequence[Trainee], x: Tensor, y: Tensor, how: Descent) -> list[Trained]:
    """Train all clients.

    Args:
        program: their model.
        trainees: the clients; those with more batches first make the largest groups cheapest.
        x: rows ``[n, C, *positions]`` of all clients.
        y: labels ``[n]``.
        how: the steps.
    """
    stack = Stack(program, trainees, how, x.dim())
    start = {n: stack.tensors[n].clone() for n in program.trained if how.mu and n in how.pulled}
    total = torch.zeros(len(trainees), device=x.device)
    orders = pad_sequence([t.order for t in trainees], batch_first=True)
    orders = (orders + torch.tensor([[t.first] for t in trainees])).to(x.device)
    taken = [0] * len(trainees)
    for steps in agenda([t.sizes for t in trainees]):
        group = stack.group(tuple(i for i, _ in steps))
        size = trainees[steps[0][0]].sizes[steps[0][1]]
        at = [taken[i] for i in group.members]
        if at.count(at[0]) == len(at):
            rows = orders[group.rows, at[0] : at[0] + size]
        else:
            columns = torch.tensor(at)[:, None] + torch.arange(size)
            rows = orders[group.rows].gather(1, columns.to(x.device))
        losses = _losses(group, x, y, rows, how.precision)
        gradients = torch.autograd.grad(losses.sum(), list(group.leaves.values()), allow_unused=True)
        with torch.no_grad():
            total[group.rows] += losses.detach() * size
            pulled = {n: program.laid(n, v[group.rows]) for n, v in start.items()}
            _descend(how, group, gradients, pulled)
        stack.put_back(group)
        for i in group.members:
            taken[i] += size
    states = {n: t.unbind() for n, t in stack.tensors.items()}
    momentum = {n: m.unbind() for n, m in stack.momentum.items()}
    return [
        Trained({n: t[i] for n, t in states.items()}, loss, {n: m[i] for n, m in momentum.items()})
        for i, loss in enumerate(total.tolist())
    ]


def _losses(group: Group, x: Tensor, y: Tensor, rows: Tensor, precision: Precision) -> Tensor:
    """Mean loss of each client's batch, ``[K]``, given its rows ``[K, B]``."""
    k, batch = rows.shape
    if group.across:
        inputs = x.index_select(0, rows.flatten()).view(k, batch, -1).mT
        return F.cross_entropy(computed(group.forward, inputs, precision), y[rows], reduction="none").mean(1)
    inputs = x.index_select(0, rows.T.flatten()).view(batch, k * x.shape[1], *x.shape[2:])
    # Classes on an outer axis: a softmax over the innermost one, which is short, is several times slower.
    outputs = computed(group.forward, inputs, precision).view(batch, k, -1).permute(1, 2, 0).contiguous()
    return F.cross_entropy(outputs, y[rows], reduction="none").mean(1)


def _descend(how: Descent, group: Group, gradients: Sequence[Tensor | None], pulled: State) -> None:
    """One step of SGD on all parameters that have a gradient, in place, as ``torch.optim.SGD`` takes it."""
    used = [(n, p, g) for (n, p), g in zip(group.leaves.items(), gradients, strict=True) if g is not None]
    parameters = [p for _, p, _ in used]
    directions = [g.add(p - pulled[n], alpha=how.mu) if n in pulled else g for n, p, g in used]
    if how.weight_decay:
        directions = list(torch._foreach_add(directions, parameters, alpha=how.weight_decay))
    if how.momentum:
        buffers = [group.momentum[n] for n, _, _ in used]
        torch._foreach_mul_(buffers, how.momentum)
        torch._foreach_add_(buffers, directions)
        directions = buffers
    torch._foreach_add_(parameters, directions, alpha=-how.lr)
