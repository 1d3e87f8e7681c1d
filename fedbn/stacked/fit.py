"""Train a stack of clients, with the same steps as `fedbn.federation.training.fit`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedbn.augment.base import Augmentation
from fedbn.config import Precision
from fedbn.federation.training import autocast_forward
from fedbn.nn.roles import State
from fedbn.stacked.program import Program
from fedbn.stacked.steps import STEP, SGDStep, StackedStep, clip_gradients
from fedbn.tasks import Task


@dataclass
class StackedClient:
    """One client of a stack.

    Attributes:
        state: the state of its model; not modified.
        order: row indices of all steps in order, relative to the client's first row.
        sizes: batch size of each step.
        noise: generator of the dropout masks; None without dropout.
        optimizer_state: state of its optimizer after its last round (`fedbn.optim.base.read_state`).
        first: index of its first row in the data of the stack.
        draws: generators for the augmentation of its batches, step by step.
    """

    state: State
    order: Tensor
    sizes: Sequence[int]
    noise: torch.Generator | None
    optimizer_state: State = field(default_factory=dict)
    first: int = 0
    draws: Iterator[torch.Generator] = field(default_factory=lambda: iter(()))


@dataclass(frozen=True)
class FitConfig:
    """Options shared by all clients of a stack.

    Attributes:
        step: step of the optimizer.
        mu: weight of the proximal term, half the squared distance to the initial values (FedProx).
        proximal: names of the parameters with a proximal term.
        precision: precision of matrix products and convolutions.
        max_grad_norm: largest norm of a client's gradient; None for no clipping.
        augment: augmentation of each client's batches.
    """

    step: StackedStep
    mu: float = 0.0
    proximal: frozenset[str] = frozenset()
    precision: Precision = "float32"
    max_grad_norm: float | None = None
    augment: Augmentation | None = None

    @property
    def fused_lr(self) -> float | None:
        """Learning rate if the step is plain gradient descent, which `_FusedLinearStep` can take; else None."""
        if not isinstance(self.step, SGDStep) or self.step.momentum or self.step.weight_decay:
            return None
        changed = self.mu or self.precision != "float32" or self.max_grad_norm is not None
        return None if changed else self.step.lr


@dataclass
class TrainResult:
    """One client after training: its state, the sum of the losses of its examples, the state of its optimizer."""

    state: State
    loss: float
    optimizer_state: State


MIN_FUSED_SIZE = 2**18
"""Number of weights above which a fused step of a linear layer is faster: they no longer fit into the cache."""


def step_schedule(sizes: Sequence[Sequence[int]]) -> Iterator[list[tuple[int, int]]]:
    """Group the steps of all clients so that as many as possible are taken at once.

    Only batches of equal size can be grouped. The steps of each client stay in order. The next group consists of the
    clients whose next batch has the most frequent size.

    Args:
        sizes: batch sizes of each client.

    Yields:
        Groups of (client, step) pairs.

    >>> list(step_schedule([[4, 4, 1], [4, 4, 3], [4, 1]]))
    [[(0, 0), (1, 0), (2, 0)], [(0, 1), (1, 1)], [(0, 2), (2, 1)], [(1, 2)]]
    """
    if all(s == sizes[0] for s in sizes):
        yield from ([(i, step) for i in range(len(sizes))] for step in range(len(sizes[0])))
        return
    step = [0] * len(sizes)
    while unfinished := [i for i, s in enumerate(sizes) if step[i] < len(s)]:
        size, _ = Counter(sizes[i][step[i]] for i in unfinished).most_common(1)[0]
        group = [i for i in unfinished if sizes[i][step[i]] == size]
        yield [(i, step[i]) for i in group]
        for i in group:
            step[i] += 1


@dataclass(frozen=True)
class StepGroup:
    """Clients of a stack that take a step at the same time.

    Attributes:
        members: indices into the stack.
        rows: the same indices as a slice if they are contiguous, else as a tensor.
        leaves: trainable parameters by name, in the layout of the program.
        optimizer_state: state of the optimizer in the same layout, by ``ENTRY/PARAMETER``.
        forward: forward pass of the members.
        entries: all entries of the members, in the layout of the program.
        batch_last: whether examples are on the last axis (`fedbn.stacked.program.Program.supports_batch_last`).
    """

    members: tuple[int, ...]
    rows: slice | Tensor
    leaves: State
    optimizer_state: State
    forward: Callable[[Tensor], Tensor]
    entries: State
    batch_last: bool


class Stack:
    """States of K clients as tensors ``[K, *shape]``."""

    def __init__(self, program: Program, clients: Sequence[StackedClient], config: FitConfig, axes: int) -> None:
        self.program = program
        self.device = next(iter(clients[0].state.values())).device
        self.batch_last = program.supports_batch_last(axes)
        self.lr = config.fused_lr
        self.noise = [t.noise for t in clients]
        self.tensors = {n: _stack([t.state[n] for t in clients]) for n in clients[0].state}
        steps = torch.zeros(len(clients), device=self.device)
        self.optimizer_state = {
            f"{entry}/{n}": steps.clone() if entry == STEP else torch.zeros_like(self.tensors[n])
            for entry in config.step.entries
            for n in program.trained
        }
        for i, client in enumerate(clients):
            for name, value in client.optimizer_state.items():
                self.optimizer_state[name][i] = value
        self._groups: dict[tuple[int, ...], StepGroup] = {}

    def group(self, members: tuple[int, ...]) -> StepGroup:
        """The group of ``members``, which are in the order of the stack."""
        if members in self._groups:
            return self._groups[members]
        first, last = members[0], members[-1]
        contiguous = last - first + 1 == len(members)
        rows = slice(first, last + 1) if contiguous else torch.tensor(members, device=self.device)
        entries = {n: self.program.lay_out(n, t[rows]).detach() for n, t in self.tensors.items()}
        optimizer_state = {
            key: self.program.lay_out(key.partition("/")[2], t[rows]) for key, t in self.optimizer_state.items()
        }
        k, noise = len(members), [self.noise[i] for i in members]
        fusable = self.program.fusable_weights if self.lr is not None and k == 1 else ()
        fused = {n for n in fusable if entries[n].numel() >= MIN_FUSED_SIZE}
        leaves = {n: entries[n].requires_grad_() for n in self.program.trained if n not in fused}
        batch_last = self.batch_last and k > 1
        forward = self.program.bind(entries, k, noise, batch_last=batch_last, fused_weights=fused, lr=self.lr)
        group = StepGroup(members, rows, leaves, optimizer_state, forward, entries, batch_last)
        if contiguous:
            self._groups[members] = group
        return group

    def write_back(self, group: StepGroup) -> None:
        """Copy the tensors of a group into the stack, unless they share its memory."""
        if isinstance(group.rows, slice):
            return
        for stacked, parts in ((self.tensors, group.entries), (self.optimizer_state, group.optimizer_state)):
            for name, tensor in stacked.items():
                tensor[group.rows] = parts[name].detach().reshape(len(group.members), *tensor.shape[1:])


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    if all(t is first for t in tensors):
        return first.unsqueeze(0).repeat(len(tensors), *[1] * first.dim())
    return torch.stack(list(tensors)).contiguous()


def fit_stack(
    program: Program, clients: Sequence[StackedClient], x: Tensor, y: Tensor, config: FitConfig, task: Task
) -> list[TrainResult]:
    """Train all clients.

    Args:
        program: the stacked program of their model.
        clients: clients; groups are cheapest if clients with more batches come first.
        x: rows ``[n, C, *positions]`` of all clients.
        y: targets ``[n, ...]``.
        config: options of training.
        task: the task, which defines the loss.
    """
    stack = Stack(program, clients, config, x.dim())
    initial = {n: stack.tensors[n].clone() for n in program.trained if config.mu and n in config.proximal}
    total = torch.zeros(len(clients), device=x.device)
    orders = pad_sequence([t.order for t in clients], batch_first=True)
    orders = (orders + torch.tensor([[t.first] for t in clients])).to(x.device)
    offset = [0] * len(clients)
    for steps in step_schedule([t.sizes for t in clients]):
        group = stack.group(tuple(i for i, _ in steps))
        size = clients[steps[0][0]].sizes[steps[0][1]]
        starts = [offset[i] for i in group.members]
        if starts.count(starts[0]) == len(starts):
            rows = orders[group.rows, starts[0] : starts[0] + size]
        else:
            columns = torch.tensor(starts)[:, None] + torch.arange(size)
            rows = orders[group.rows].gather(1, columns.to(x.device))
        inputs, targets = x, y
        if config.augment is not None:
            inputs, targets, rows = _augmented(config.augment, [clients[i].draws for i in group.members], x, y, rows)
        losses = _losses(task, group, inputs, targets, rows, config.precision)
        gradients = torch.autograd.grad(losses.sum(), list(group.leaves.values()), allow_unused=True)
        with torch.no_grad():
            total[group.rows] += losses.detach() * size
            proximal = {n: program.lay_out(n, v[group.rows]) for n, v in initial.items()}
            _step(config, group, gradients, proximal)
        stack.write_back(group)
        for i in group.members:
            offset[i] += size
    states = {n: t.unbind() for n, t in stack.tensors.items()}
    optimizer_states = {n: t.unbind() for n, t in stack.optimizer_state.items()}
    return [
        TrainResult({n: t[i] for n, t in states.items()}, loss, {n: t[i] for n, t in optimizer_states.items()})
        for i, loss in enumerate(total.tolist())
    ]


def _losses(task: Task, group: StepGroup, x: Tensor, y: Tensor, rows: Tensor, precision: Precision) -> Tensor:
    """Mean loss ``[K]`` of each client's batch, for row indices ``[K, B]``."""
    k, batch = rows.shape
    if group.batch_last:
        inputs = x.index_select(0, rows.flatten()).view(k, batch, -1).mT
        outputs = autocast_forward(group.forward, inputs, precision)
    else:
        inputs = x.index_select(0, rows.T.flatten()).view(batch, k * x.shape[1], *x.shape[2:])
        outputs = autocast_forward(group.forward, inputs, precision)
        outputs = outputs.view(batch, k, -1, *outputs.shape[2:]).movedim(0, 2).contiguous()
    return task.stacked_losses(outputs, y[rows]).mean(1)


def _augmented(
    augment: Augmentation, draws: Sequence[Iterator[torch.Generator]], x: Tensor, y: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Augmented examples of a step, client by client, and their row indices ``[K, B]``."""
    parts = [augment(x[own], y[own], next(draw)) for own, draw in zip(rows, draws, strict=True)]
    inputs, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return inputs, targets, torch.arange(rows.numel(), device=x.device).view(rows.shape)


def _step(config: FitConfig, group: StepGroup, gradients: Sequence[Tensor | None], proximal: State) -> None:
    """One in-place step of the optimizer on all parameters that have a gradient."""
    used = [(n, p, g) for (n, p), g in zip(group.leaves.items(), gradients, strict=True) if g is not None]
    directions = [g.add(p - proximal[n], alpha=config.mu) if n in proximal else g for n, p, g in used]
    if config.max_grad_norm is not None:
        directions = clip_gradients(directions, len(group.members), config.max_grad_norm)
    state = {entry: [group.optimizer_state[f"{entry}/{n}"] for n, _, _ in used] for entry in config.step.entries}
    config.step([p for _, p, _ in used], directions, state, len(group.members))
