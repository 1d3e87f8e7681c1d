"""Train a stack of clients, with the same steps as `fedbn.federation.training.fit`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fedbn.augment.base import Augmentation
from fedbn.config import Precision
from fedbn.federation.training import autocast_forward
from fedbn.nn.roles import State
from fedbn.stacked.chain import Chain, find_chain
from fedbn.stacked.hooks import Hook, ModelWithParameters, before_step, share_memory
from fedbn.stacked.program import Program
from fedbn.stacked.steps import STEP, SGDStep, StackedStep, clip_gradients, step_of
from fedbn.tasks import Task


@dataclass
class StackedClients:
    """The clients of a stack.

    Groups of steps are cheapest if clients with more batches come first.

    Attributes:
        tensors: entries of their models ``[K, *shape]``; trained in place.
        optimizer_state: state of their optimizers ``[K, *shape]`` by ``ENTRY/PARAMETER``; updated in place.
        orders: row indices ``[K, N]`` of all steps in order, in the data of the stack; shorter rows are padded.
        sizes: batch size of each step of each client.
        noise: generator of each client's dropout masks; None without dropout.
        draws: generators for the augmentation of each client's batches, step by step; empty without augmentation.
        models: model of each client for hooks; empty without hooks.
    """

    tensors: State
    optimizer_state: State
    orders: Tensor
    sizes: Sequence[Sequence[int]]
    noise: Sequence[torch.Generator | None]
    draws: Sequence[Iterator[torch.Generator]]
    models: Sequence[nn.Module] = ()


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
        model: its model, if its strategy has hooks.
    """

    state: State
    order: Tensor
    sizes: Sequence[int]
    noise: torch.Generator | None
    optimizer_state: State = field(default_factory=dict)
    first: int = 0
    draws: Iterator[torch.Generator] = field(default_factory=lambda: iter(()))
    model: nn.Module | None = None


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
        hook: called with each client's model between the backward pass and the step.
    """

    step: StackedStep
    mu: float = 0.0
    proximal: frozenset[str] = frozenset()
    precision: Precision = "float32"
    max_grad_norm: float | None = None
    augment: Augmentation | None = None
    hook: Hook | None = None

    @property
    def fused_lr(self) -> float | None:
        """Learning rate if the step is plain gradient descent, which `_FusedLinearStep` can take; else None."""
        step = self.step
        if not isinstance(step, SGDStep) or isinstance(step.lr, Tensor) or step.momentum or step.weight_decay:
            return None
        changed = self.mu or self.max_grad_norm is not None or self.hook is not None
        return None if changed else step.lr


@dataclass
class TrainResult:
    """One client after training: its state, the sum of the losses of its examples, the state of its optimizer."""

    state: State
    loss: float
    optimizer_state: State


MIN_FUSED_SIZE = 2**18
"""Number of weights above which a fused step of a linear layer is faster: they no longer fit into the cache."""


def step_schedule(sizes: Sequence[Sequence[int]]) -> Iterator[tuple[tuple[int, ...], list[int], int]]:
    """Group the steps of all clients so that as many as possible are taken at once.

    Only batches of equal size can be grouped. The steps of each client stay in order. The next group consists of the
    clients whose next batch has the most frequent size.

    Args:
        sizes: batch sizes of each client.

    Yields:
        The clients of a group, the number of examples that each has seen before, and the batch size.

    >>> list(step_schedule([[4, 4, 1], [4, 1]]))
    [((0, 1), [0, 0], 4), ((0,), [4], 4), ((0, 1), [8, 4], 1)]
    """
    if all(s == sizes[0] for s in sizes):
        everyone, seen = tuple(range(len(sizes))), 0
        for size in sizes[0]:
            yield everyone, [seen] * len(everyone), size
            seen += size
        return
    step, starts = [0] * len(sizes), [0] * len(sizes)
    while unfinished := [i for i, s in enumerate(sizes) if step[i] < len(s)]:
        size, _ = Counter(sizes[i][step[i]] for i in unfinished).most_common(1)[0]
        group = tuple(i for i in unfinished if sizes[i][step[i]] == size)
        yield group, [starts[i] for i in group], size
        for i in group:
            step[i] += 1
            starts[i] += size


@dataclass(frozen=True)
class StepGroup:
    """Clients of a stack that take a step at the same time.

    Attributes:
        members: indices into the stack.
        rows: the same indices as a slice if they are contiguous, else as a tensor.
        leaves: trainable parameters by name, in the layout of the program.
        optimizer_state: state of the optimizer in the same layout, by ``ENTRY/PARAMETER``.
        forward: forward pass of the members, or their steps in closed form.
        entries: all entries of the members, in the layout of the program.
        batch_last: whether examples are on the last axis (`fedbn.stacked.program.Program.supports_batch_last`).
        models: models of the members for hooks, if there are any, and their parameters; all are views of ``entries``.
    """

    members: tuple[int, ...]
    rows: slice | Tensor
    leaves: State
    optimizer_state: State
    forward: Callable[[Tensor], Tensor] | Chain
    entries: State
    batch_last: bool
    models: list[ModelWithParameters]


class Stack:
    """The clients of a stack, in groups that take a step at the same time."""

    def __init__(self, program: Program, clients: StackedClients, config: FitConfig, axes: int) -> None:
        self.program = program
        self.device = clients.orders.device
        self.batch_last = program.supports_batch_last(axes)
        self.lr = config.fused_lr
        self.calls = find_chain(program) if self.batch_last and config.precision == "float32" else None
        self.noise = clients.noise
        self.models = clients.models
        self.tensors = clients.tensors
        self.optimizer_state = clients.optimizer_state
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
        batch_last = self.batch_last and k > 1
        forward: Callable[[Tensor], Tensor] | Chain
        if self.calls is not None and batch_last:
            forward = Chain(self.calls, entries, self.program.trained, noise, k, self.lr)
            leaves = {n: entries[n] for n in self.program.trained if self.lr is None}
        else:
            leaves = {n: entries[n].requires_grad_() for n in self.program.trained if n not in fused}
            forward = self.program.bind(entries, k, noise, batch_last=batch_last, fused_weights=fused, lr=self.lr)
        models = [self.models[i] for i in members] if self.models else []
        share_memory(models, entries)
        named = [(model, dict(model.named_parameters())) for model in models]
        group = StepGroup(members, rows, leaves, optimizer_state, forward, entries, batch_last, named)
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
        for i, (model, _) in zip(group.members, group.models, strict=False):
            share_memory([model], {n: t[i] for n, t in self.tensors.items()})


def stack_values(values: Sequence[Tensor]) -> Tensor:
    """Stack the tensors of all clients, which are often one and the same."""
    if all(t is values[0] for t in values):
        return repeat(values[0], len(values))
    return torch.stack(list(values)).contiguous()


def repeat(value: Tensor, k: int) -> Tensor:
    """The same tensor for K clients."""
    return value.new_empty((k, *value.shape)).copy_(value)


def stack_orders(orders: Sequence[Tensor], first: Sequence[int], device: torch.device) -> Tensor:
    """Row indices ``[K, N]`` in the data of a stack, from each client's order and the index of its first row."""
    equal = len({order.numel() for order in orders}) == 1
    padded = torch.stack(list(orders)) if equal else pad_sequence(list(orders), batch_first=True)
    return (padded + torch.tensor(first)[:, None]).to(device)


def empty_optimizer_state(program: Program, step: StackedStep, tensors: State, k: int) -> State:
    """State ``[K, *shape]`` of the optimizers of K clients before their first step."""
    steps = torch.zeros(k, device=next(iter(tensors.values())).device)
    return {
        f"{entry}/{n}": steps.clone() if entry == STEP else torch.zeros_like(tensors[n])
        for entry in step.entries
        for n in program.trained
    }


def fit_clients(
    program: Program,
    clients: Sequence[StackedClient],
    x: Tensor,
    y: Tensor,
    config: FitConfig,
    task: Task,
    fit: Callable[[StackedClients], list[float]] | None = None,
) -> list[TrainResult]:
    """Train clients that are given one by one; arguments as in `fit_stack`, which ``fit`` replaces if given."""
    tensors = {n: stack_values([t.state[n] for t in clients]) for n in clients[0].state}
    optimizer_state = empty_optimizer_state(program, config.step, tensors, len(clients))
    for i, client in enumerate(clients):
        for name, value in client.optimizer_state.items():
            optimizer_state[name][i] = value
    stacked = StackedClients(
        tensors,
        optimizer_state,
        stack_orders([t.order for t in clients], [t.first for t in clients], x.device),
        [t.sizes for t in clients],
        [t.noise for t in clients],
        [t.draws for t in clients],
        [t.model for t in clients if t.model is not None],
    )
    losses = fit(stacked) if fit else fit_stack(program, stacked, x, y, config, task)
    states, optimizer_states = (
        {n: t.unbind() for n, t in entries.items()} for entries in (stacked.tensors, stacked.optimizer_state)
    )
    return [
        TrainResult({n: t[i] for n, t in states.items()}, loss, {n: t[i] for n, t in optimizer_states.items()})
        for i, loss in enumerate(losses)
    ]


def fit_stack(
    program: Program, clients: StackedClients, x: Tensor, y: Tensor, config: FitConfig, task: Task
) -> list[float]:
    """Train all clients in place.

    Args:
        program: the stacked program of their model.
        clients: the clients.
        x: rows ``[n, C, *positions]`` of all clients.
        y: targets ``[n, ...]``.
        config: options of training.
        task: the task, which defines the loss.

    Returns:
        The sum of the losses of each client's examples.
    """
    stack, orders = Stack(program, clients, config, x.dim()), clients.orders
    initial = {n: stack.tensors[n].clone() for n in program.trained if config.mu and n in config.proximal}
    total = torch.zeros(len(orders), device=x.device)
    for members, starts, size in step_schedule(clients.sizes):
        group = stack.group(members)
        if starts.count(starts[0]) == len(starts):
            rows = orders[group.rows, starts[0] : starts[0] + size]
        else:
            columns = torch.tensor(starts)[:, None] + torch.arange(size)
            rows = orders[group.rows].gather(1, columns.to(x.device))
        inputs, targets = x, y
        if config.augment is not None:
            inputs, targets, rows = _augmented(config.augment, [clients.draws[i] for i in members], x, y, rows)
        losses, gradients = _losses_and_gradients(task, group, inputs, targets, rows, config.precision)
        with torch.no_grad():
            total[group.rows] += losses
            proximal = {n: program.lay_out(n, v[group.rows]) for n, v in initial.items()}
            _step(config, group, gradients, proximal)
        stack.write_back(group)
    return total.tolist()


def _losses_and_gradients(
    task: Task, group: StepGroup, x: Tensor, y: Tensor, rows: Tensor, precision: Precision
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Sum ``[K]`` of the losses of each client's batch, and the gradients of the leaves, for row indices ``[K, B]``."""
    k, batch = rows.shape
    if group.batch_last:
        flat = rows.flatten()
        inputs, targets = x.index_select(0, flat).view(k, batch, -1).mT, y.index_select(0, flat)
        targets = targets.unflatten(0, (k, batch))
        if isinstance(group.forward, Chain):
            return group.forward.step(inputs, targets, task), [group.forward.gradients.get(n) for n in group.leaves]
        outputs = autocast_forward(group.forward, inputs, precision)
    else:
        inputs, targets = x.index_select(0, rows.T.flatten()).view(batch, k * x.shape[1], *x.shape[2:]), y[rows]
        outputs = autocast_forward(cast(Callable[[Tensor], Tensor], group.forward), inputs, precision)
        outputs = outputs.view(batch, k, -1, *outputs.shape[2:]).movedim(0, 2).contiguous()
    losses = task.stacked_losses(outputs, targets)
    gradients = torch.autograd.grad(losses.mean(1).sum(), list(group.leaves.values()), allow_unused=True)
    return losses.detach().sum(1), gradients


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
    if config.hook is not None:
        hooked = before_step(config.hook, group.models, [n for n, _, _ in used], directions)
        used = [entry for entry, g in zip(used, hooked, strict=True) if g is not None]
        directions = [g for g in hooked if g is not None]
    if not used:
        return
    if config.max_grad_norm is not None:
        directions = clip_gradients(directions, len(group.members), config.max_grad_norm)
    state = {entry: [group.optimizer_state[f"{entry}/{n}"] for n, _, _ in used] for entry in config.step.entries}
    step = step_of(config.step, group.rows)
    step([p for _, p, _ in used], directions, state, len(group.members))
