"""Training rounds of many clients at once, equivalent to `fedbn.federation.client.client_round`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor, nn

from fedbn.augment.base import augmentation
from fedbn.data.batching import batch_sizes
from fedbn.federation.client import METHOD_STATE, OPTIMIZER
from fedbn.federation.context import RunContext
from fedbn.federation.training import augmentation_draws, shuffle
from fedbn.nn.roles import State, with_prefix
from fedbn.optim.schedules import rate
from fedbn.personalization.base import Personalization
from fedbn.seeds import generator
from fedbn.stacked.check import checked_program
from fedbn.stacked.fit import FitConfig, StackedClient, TrainResult, fit_stack
from fedbn.stacked.layers import Unstackable
from fedbn.stacked.program import Program
from fedbn.stacked.steps import stacked_step
from fedbn.stacked.tracing import check_structure
from fedbn.statistics.consensus import Aggregates
from fedbn.strategies.base import NormStrategy, Progress, Update


@dataclass
class Failure:
    """Result of a job that raised an exception."""

    error: Exception


class ClientJob(Protocol):
    """A pending job of one user, with the entries that make up its model."""

    @property
    def ctx(self) -> RunContext: ...
    @property
    def user(self) -> int: ...
    @property
    def received(self) -> State: ...
    @property
    def client_state(self) -> State | None: ...


class TrainJob(ClientJob, Protocol):
    """A pending training round of one client: the arguments of `client_round`."""

    @property
    def progress(self) -> Progress: ...
    @property
    def aggregates(self) -> Aggregates: ...


@dataclass
class StackedData:
    """Training data of several users, concatenated once.

    Attributes:
        x, y: the examples of all users, ordered by user.
        first: user -> index of its first row.
    """

    x: Tensor
    y: Tensor
    first: dict[int, int]

    @staticmethod
    def of(ctx: RunContext, users: Sequence[int]) -> StackedData:
        """Concatenate the training data of ``users``."""
        parts = [ctx.training_data(u) for u in users]
        if len(parts) == 1:
            return StackedData(parts[0].x, parts[0].y, {users[0]: 0})
        first = dict(zip(users, accumulate((len(p) for p in parts), initial=0)))
        return StackedData(torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]), first)


@dataclass
class Cohort:
    """What the rounds of a run share: the training data, and the stacked programs or why there is none, by mode.

    >>> from fedbn.config import Plan
    >>> from fedbn.federation.run import Run
    >>> from fedbn.federation.setup import build_context
    >>> Cohort(build_context(Run("digits8", "fedbn", plan=Plan(), model="mlp"))).program(Progress(1, 2)).trained[:1]
    ('hidden.0.weight',)
    """

    ctx: RunContext
    programs: dict[tuple[object, ...], Program | Unstackable] = field(default_factory=dict)

    @cached_property
    def rows(self) -> StackedData:
        """Training data of all trainers."""
        return StackedData.of(self.ctx, self.ctx.trainers)

    def program(self, progress: Progress, aggregates: Aggregates = ()) -> Program:
        """The stacked model in the training mode of a round; use it before the mode changes.

        Raises:
            Unstackable: clients do more than steps of a built-in optimizer, or the model has unsupported parts.
        """
        ctx, kind = self.ctx, type(self.ctx.strategy)
        stacked_step(ctx.run.plan, ctx.run.plan.lr)
        if aggregates:
            raise Unstackable("the strategy synchronizes statistics before training")
        for hook in ("on_before_optimizer_step", "before_local_training", "after_local_training"):
            if getattr(kind, hook) is not getattr(NormStrategy, hook):
                raise Unstackable("the strategy has its own training steps")
        if ctx.row_users(ctx.trainers[0]) is not None:
            raise Unstackable("each batch holds the examples of one user")
        if type(ctx.personal).train is not Personalization.train:
            raise Unstackable("the personalization method has its own training procedure")
        model = ctx.load(ctx.initial)
        ctx.strategy.set_training_mode(model, progress, aggregates)
        state = model.state_dict()
        if any(not torch.equal(state[n], v) for n, v in ctx.initial.items()):
            raise Unstackable("the strategy changes the model before training")
        return self._build(model, trains=True)

    def evaluation_program(self) -> Program:
        """The stacked model in evaluation mode; use it before the mode changes.

        Raises:
            Unstackable: the model has unsupported parts, or users are served personalized models.
        """
        ctx = self.ctx
        if ctx.treatment.personalizes:
            raise Unstackable("users have personalized models")
        model = ctx.scratch.eval()
        return self._build(model, trains=False)

    def _build(self, model: nn.Module, *, trains: bool) -> Program:
        check_structure(model)
        mode = (trains, *((id(m), m.training) for m in model.modules()))
        if mode not in self.programs:
            largest = max((self.ctx.training_data(user).x for user in self.ctx.trainers), key=len)
            try:
                self.programs[mode] = checked_program(model, largest, trains=trains)
            except Unstackable as reason:
                self.programs[mode] = reason
        if isinstance(program := self.programs[mode], Unstackable):
            raise program
        return program

    def train(self, rounds: Sequence[TrainJob], program: Program) -> list[tuple[Update, State] | Failure]:
        """Train several clients in one stack; results are in the order of ``rounds``.

        A client that cannot start, for example because entries are missing, is skipped, and its result is a `Failure`.
        """
        ctx, plan = self.ctx, self.ctx.run.plan
        rows = self.rows if len(rounds) > 1 else StackedData.of(ctx, [rounds[0].user])
        results: dict[int, tuple[Update, State] | Failure] = {}
        clients: dict[int, StackedClient] = {}
        for i, job in enumerate(rounds):
            try:
                clients[i] = self._stacked_client(job, rows, program)
            except Exception as error:
                results[i] = Failure(error)
        order = sorted(clients, key=lambda i: -len(clients[i].order))
        if order:
            config = FitConfig(
                stacked_step(plan, rate(plan, rounds[0].progress.round)),
                plan.proximal,
                frozenset(ctx.ownership.travels),
                plan.precision,
                plan.max_grad_norm,
                augmentation(plan.augment),
            )
            trained = fit_stack(program, [clients[i] for i in order], rows.x, rows.y, config, ctx.task)
            results |= {i: self._result(rounds[i], result) for i, result in zip(order, trained, strict=True)}
        return [results[i] for i in range(len(rounds))]

    def trial_step(self, rounds: Sequence[TrainJob], program: Program) -> None:
        """Take one step of each client on its first rows, for timing; the result is discarded."""
        ctx, plan = self.ctx, self.ctx.run.plan
        size = min(plan.batch_size, min(len(ctx.training_data(r.user)) for r in rounds))
        rows, starts = torch.arange(size), range(0, size * len(rounds), size)
        parts = [ctx.training_data(r.user).take(rows) for r in rounds]
        x, y = torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts])
        clients = [StackedClient(ctx.initial, rows, [size], torch.Generator(), first=first) for first in starts]
        config = FitConfig(stacked_step(plan, plan.lr), precision=plan.precision)
        fit_stack(program, clients, x, y, config, ctx.task)

    def _stacked_client(self, job: TrainJob, rows: StackedData, program: Program) -> StackedClient:
        ctx, plan, client_state = self.ctx, self.ctx.run.plan, job.client_state or {}
        seed, number, random_user = ctx.run.seed, job.progress.round, ctx.rng_user(job.user)
        n = len(ctx.training_data(job.user))
        orders = [torch.randperm(n, generator=shuffle(seed, number, random_user, e)) for e in range(plan.local_epochs)]
        return StackedClient(
            ctx.assemble(job.received, client_state),
            torch.cat(orders) if len(orders) > 1 else orders[0],
            batch_sizes(n, plan.batch_size) * plan.local_epochs,
            generator(seed, "noise", number, random_user) if program.draws_noise else None,
            with_prefix(client_state, OPTIMIZER),
            rows.first[job.user],
            augmentation_draws(seed, number, random_user),
        )

    def _result(self, job: TrainJob, result: TrainResult) -> tuple[Update, State]:
        ctx, plan = self.ctx, self.ctx.run.plan
        examples = len(ctx.training_data(job.user))
        loss = result.loss / (examples * max(plan.local_epochs, 1))
        client_state = {k: result.state[k] for k in ctx.ownership.retained}
        if plan.optimizer_state == "keep":
            client_state |= {OPTIMIZER + k: v for k, v in result.optimizer_state.items()}
        client_state |= {k: v for k, v in (job.client_state or {}).items() if k.startswith(METHOD_STATE)}
        return Update(job.user, {k: result.state[k] for k in ctx.ownership.travels}, examples, loss), client_state
