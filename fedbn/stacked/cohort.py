"""Whole rounds of many clients at once: what `fedbn.federation.client.client_round` does, for a stack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from fedbn.data.batching import sizes
from fedbn.federation.client import METHOD_STATE, OPTIMIZER
from fedbn.federation.context import EVERYONE, RunContext
from fedbn.federation.training import shuffle
from fedbn.nn.roles import State
from fedbn.personalization.base import Personalization
from fedbn.seeds import generator
from fedbn.stacked.fit import Descent, Trained, Trainee, fit_stack
from fedbn.stacked.layers import Unstackable
from fedbn.stacked.program import Program, build_program, refuse_hooks
from fedbn.statistics.consensus import Aggregates
from fedbn.strategies.base import NormStrategy, Progress, Update


@dataclass
class Failure:
    """A job that raised."""

    error: Exception


class Assignment(Protocol):
    """What a user is to do, not yet done, and the entries its model is made of."""

    @property
    def ctx(self) -> RunContext: ...
    @property
    def user(self) -> int: ...
    @property
    def received(self) -> State: ...
    @property
    def client_state(self) -> State | None: ...


class Round(Assignment, Protocol):
    """One client's round of training, not yet done: what `client_round` is given."""

    @property
    def progress(self) -> Progress: ...
    @property
    def aggregates(self) -> Aggregates: ...


@dataclass
class Rows:
    """Training data of many users as one tensor, made once for a set of users.

    Attributes:
        x, y: all users' examples, one user after the other.
        first: user -> its first row.
    """

    x: Tensor
    y: Tensor
    first: dict[int, int]

    @staticmethod
    def of(ctx: RunContext, users: Sequence[int]) -> Rows:
        """The rows of some users."""
        parts = [ctx.training_data(u) for u in users]
        if len(parts) == 1:
            return Rows(parts[0].x, parts[0].y, {users[0]: 0})
        first, at = {}, 0
        for user, part in zip(users, parts, strict=True):
            first[user] = at
            at += len(part)
        return Rows(torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]), first)


@dataclass
class Cohort:
    """What stays the same between the rounds of a run: the model's twin and the users' rows.

    >>> from fedbn.config import Plan
    >>> from fedbn.federation.run import Run
    >>> from fedbn.federation.setup import build_context
    >>> Cohort(build_context(Run("digits8", "fedbn", plan=Plan(), model="mlp"))).program(Progress(1, 2)).trained[:1]
    ('hidden.0.weight',)
    """

    ctx: RunContext
    programs: dict[tuple[tuple[int, bool], ...], Program] = field(default_factory=dict)

    @cached_property
    def rows(self) -> Rows:
        """The training data of all who train."""
        return Rows.of(self.ctx, self.ctx.trainers)

    def program(self, progress: Progress, aggregates: Aggregates = ()) -> Program:
        """The stacked twin of the run's model in the mode of a round; to be used before the mode changes.

        Raises:
            Unstackable: clients do more than plain steps, or the model has unknown parts.
        """
        ctx, kind = self.ctx, type(self.ctx.strategy)
        if aggregates:
            raise Unstackable(f"{ctx.strategy.name} consults before training")
        for hook in ("on_before_optimizer_step", "before_local_training", "after_local_training"):
            if getattr(kind, hook) is not getattr(NormStrategy, hook):
                raise Unstackable(f"{ctx.strategy.name} has its own {hook}")
        if ctx.owners_of_rows(ctx.trainers[0]) is not None:
            raise Unstackable("batches are of one user each")
        if type(ctx.personal).train is not Personalization.train:
            raise Unstackable(f"{ctx.personal.name} trains in its own way")
        model = ctx.load(ctx.initial)
        ctx.strategy.set_training_mode(model, progress, aggregates)
        state = model.state_dict()
        if any(not torch.equal(state[n], v) for n, v in ctx.initial.items()):
            raise Unstackable(f"{ctx.strategy.name} changes the model before training")
        return self._read(model)

    def evaluation_program(self) -> Program:
        """The stacked twin of the run's model in evaluation; to be used before the mode changes.

        Raises:
            Unstackable: the model has unknown parts, or users are served models that are made in another way.
        """
        ctx = self.ctx
        if ctx.treatment.personalizes:
            raise Unstackable(f"{ctx.personal.name} serves models of its own")
        model = ctx.scratch.eval()
        watched = (program := self._read(model)).watched
        if any(model.get_submodule(path).running_mean is None for path in watched):
            raise Unstackable("examples of a batch are normalized together in evaluation too")
        return program

    def _read(self, model: nn.Module) -> Program:
        refuse_hooks(model)
        mode = tuple((id(m), m.training) for m in model.modules())
        if mode not in self.programs:
            self.programs[mode] = build_program(model)
        return self.programs[mode]

    def train(self, rounds: Sequence[Round], program: Program) -> list[tuple[Update, State] | Failure]:
        """Do the rounds of several clients side by side; results in their order.

        A client that cannot begin (entries are missing, say) is left out, and its result is the `Failure`.
        """
        ctx, plan = self.ctx, self.ctx.run.plan
        rows = self.rows if len(rounds) > 1 else Rows.of(ctx, [rounds[0].user])
        results: dict[int, tuple[Update, State] | Failure] = {}
        trainees: dict[int, Trainee] = {}
        for i, job in enumerate(rounds):
            try:
                trainees[i] = self._trainee(job, rows, program)
            except Exception as error:
                results[i] = Failure(error)
        order = sorted(trainees, key=lambda i: -len(trainees[i].order))
        if order:
            rate, travels = plan.rate(rounds[0].progress.round), frozenset(ctx.ownership.travels)
            how = Descent(rate, plan.momentum, plan.weight_decay, plan.proximal, travels, plan.precision)
            trained = fit_stack(program, [trainees[i] for i in order], rows.x, rows.y, how)
            results |= {i: self._result(rounds[i], done) for i, done in zip(order, trained, strict=True)}
        return [results[i] for i in range(len(rounds))]

    def rehearse(self, rounds: Sequence[Round], program: Program) -> None:
        """One step of each client on its first rows, to see how long it takes; nothing is kept."""
        ctx, plan = self.ctx, self.ctx.run.plan
        size = min(plan.batch_size, min(len(ctx.training_data(r.user)) for r in rounds))
        parts = [ctx.training_data(r.user).take(torch.arange(size)) for r in rounds]
        x, y = torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts])
        trainees = [
            Trainee(ctx.initial, torch.arange(size), [size], torch.Generator(), first=i * size)
            for i in range(len(parts))
        ]
        fit_stack(program, trainees, x, y, Descent(plan.lr, plan.momentum, precision=plan.precision))

    def _trainee(self, job: Round, rows: Rows, program: Program) -> Trainee:
        ctx, plan, client_state = self.ctx, self.ctx.run.plan, job.client_state or {}
        # As in `client_round`: one place that holds everyone's data draws as its first user would.
        drawn = ctx.population.seen[0] if job.user == EVERYONE else job.user
        seed, number = ctx.run.seed, job.progress.round
        n = len(ctx.training_data(job.user))
        orders = [torch.randperm(n, generator=shuffle(seed, number, drawn, e)) for e in range(plan.local_epochs)]
        return Trainee(
            ctx.assemble(job.received, client_state),
            torch.cat(orders) if len(orders) > 1 else orders[0],
            sizes(n, plan.batch_size) * plan.local_epochs,
            generator(seed, "noise", number, drawn) if program.draws else None,
            {k.removeprefix(OPTIMIZER): v for k, v in client_state.items() if k.startswith(OPTIMIZER)},
            rows.first[job.user],
        )

    def _result(self, job: Round, done: Trained) -> tuple[Update, State]:
        ctx, plan = self.ctx, self.ctx.run.plan
        examples = len(ctx.training_data(job.user))
        loss = done.loss / (examples * max(plan.local_epochs, 1))
        stays = {k: done.state[k] for k in ctx.ownership.retained}
        if plan.optimizer_state == "keep" and plan.momentum:
            stays |= {OPTIMIZER + k: v for k, v in done.momentum.items()}
        stays |= {k: v for k, v in (job.client_state or {}).items() if k.startswith(METHOD_STATE)}
        return Update(job.user, {k: done.state[k] for k in ctx.ownership.travels}, examples, loss), stays
