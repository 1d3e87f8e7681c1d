"""Local training over shuffled batches, with all random draws keyed by (seed, round, user)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from fedbn.augment.base import augmentation
from fedbn.config import Plan, Precision
from fedbn.data.batching import batches, user_batches
from fedbn.data.population import Examples
from fedbn.nn.roles import State, statistics_layers
from fedbn.optim.base import load_state, optimizer, read_state
from fedbn.optim.schedules import rate
from fedbn.seeds import generator, seeded
from fedbn.tasks import Task


def autocast_forward(model: Callable[[Tensor], Tensor], x: Tensor, precision: Precision) -> Tensor:
    """Forward pass of a training step, optionally under ``torch.autocast``.

    Batch statistics and losses are float32 in either precision: PyTorch's normalization layers sum half-precision
    inputs in float32.

    >>> autocast_forward(nn.Linear(2, 3), torch.zeros(4, 2), "bfloat16").dtype
    torch.float32
    """
    if precision == "float32":
        return model(x)
    with torch.autocast(x.device.type, torch.bfloat16):
        return model(x).float()


class _PerUserStatistics:
    """Separate running statistics of several users for one model; all start from the model's."""

    def __init__(self, model: nn.Module, row_users: Tensor) -> None:
        self._row_users = row_users
        self._entries = [b for layer in statistics_layers(model).values() for b in layer.buffers(recurse=False)]
        self._start = [b.clone() for b in self._entries]
        self._values: dict[int, list[Tensor]] = {}

    @contextmanager
    def of_row(self, row: int) -> Iterator[None]:
        """Context in which the model uses the statistics of a row's user."""
        user = int(self._row_users[row])
        self._write(self._values.get(user, self._start))
        yield
        self._values[user] = [b.clone() for b in self._entries]

    def average(self) -> None:
        """Write the unweighted mean over users, and the highest counter, into the model."""
        stacked = [torch.stack(values) for values in zip(*self._values.values(), strict=True)]
        self._write([t.mean(0) if t.is_floating_point() else t.amax(0) for t in stacked])

    def _write(self, values: list[Tensor]) -> None:
        for entry, value in zip(self._entries, values, strict=True):
            entry.copy_(value)


def fit(
    model: nn.Module,
    data: Examples,
    plan: Plan,
    *,
    task: Task,
    seed: int,
    round: int,
    user: int,
    pull: tuple[float, State] = (0.0, {}),
    only: Container[str] | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    on_before_optimizer_step: Callable[[nn.Module], None] | None = None,
    optimizer_state: State | None = None,
    purpose: str = "",
    row_users: Tensor | None = None,
) -> tuple[float, State]:
    """Train ``model`` in place for one round.

    Args:
        model: the model, in the training mode set by the strategy.
        data: the user's training examples, on the model's device.
        plan: settings.
        task: the task, which defines the loss.
        seed: the run's seed.
        round: the round, from 1.
        user: index of the user.
        pull: weight mu and target values by parameter name; adds mu/2 times the squared distance to the loss.
        only: names of the parameters to train; all by default.
        epochs: passes over the data; the plan's by default.
        lr: learning rate; the plan's for this round by default.
        on_before_optimizer_step: called between backward pass and optimizer step.
        optimizer_state: state of the optimizer after the user's last round (`fedbn.optim.base.read_state`).
        purpose: separates the random draws of several trainings within a round.
        row_users: user ``[n]`` of each row. If given, each batch holds rows of one user and updates separate running
            statistics of that user; the model ends with their mean over users.

    Returns:
        Mean loss over the round's examples, and the state of the optimizer (empty unless the plan keeps it).
    """
    epochs = plan.local_epochs if epochs is None else epochs
    parameters = dict(model.named_parameters())
    frozen = [p for n, p in parameters.items() if p.requires_grad and only is not None and n not in only]
    named = {n: p for n, p in parameters.items() if p.requires_grad and (only is None or n in only)}
    lr = rate(plan, round) if lr is None else lr
    stepper = optimizer(plan.optimizer).build(list(named.values()), plan, lr)
    load_state(stepper, named, optimizer_state or {})
    augment, draws = augmentation(plan.augment), augmentation_draws(seed, round, user, purpose)
    weight, anchor = pull[0], {n: v.detach() for n, v in pull[1].items() if n in named}
    per_user = None if row_users is None else _PerUserStatistics(model, row_users)
    total = torch.zeros((), device=data.x.device)
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with seeded(seed, "noise" + purpose, round, user):  # dropout draws from the global generator
            for epoch in range(epochs):
                for index in epoch_batches(len(data), plan, seed, round, user, epoch, purpose, row_users):
                    statistics = nullcontext() if per_user is None else per_user.of_row(int(index[0]))
                    index = index.to(data.x.device)
                    x, y = data.x[index], data.y[index]
                    if augment is not None:
                        x, y = augment(x, y, next(draws))
                    stepper.zero_grad()
                    with statistics:
                        loss = task.loss(autocast_forward(model, x, plan.precision), y)
                    total += loss.detach() * len(index)
                    if weight and anchor:
                        loss = loss + weight / 2 * sum(((named[n] - to) ** 2).sum() for n, to in anchor.items())
                    loss.backward()
                    if on_before_optimizer_step is not None:
                        on_before_optimizer_step(model)
                    if plan.max_grad_norm is not None:
                        nn.utils.clip_grad_norm_(named.values(), plan.max_grad_norm)
                    stepper.step()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    if per_user is not None:
        per_user.average()
    loss_per_example = float(total) / (len(data) * max(epochs, 1))
    return loss_per_example, read_state(stepper, named) if plan.optimizer_state == "keep" else {}


def epoch_batches(
    n: int, plan: Plan, seed: int, round: int, user: int, epoch: int, purpose: str = "", row_users: Tensor | None = None
) -> Iterator[Tensor]:
    """Row indices of the batches of one epoch of a user's local training."""
    draw = shuffle(seed, round, user, epoch, purpose)
    return batches(n, plan.batch_size, draw) if row_users is None else user_batches(row_users, plan.batch_size, draw)


def shuffle(
    seed: int, round: int, user: int, epoch: int, purpose: str = "", reuse: torch.Generator | None = None
) -> torch.Generator:
    """Generator that shuffles one epoch of a user's local training (`fedbn.seeds.generator`)."""
    return generator(seed, "shuffle" + purpose, round, user, epoch, reuse=reuse)


def augmentation_draws(seed: int, round: int, user: int, purpose: str = "") -> Iterator[torch.Generator]:
    """Generators that augment the batches of a user's local training, step by step."""
    return (generator(seed, "augment" + purpose, round, user, step) for step in itertools.count())
