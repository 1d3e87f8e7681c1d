"""Whole rounds of many clients at once: what `fedbn.federation.client.client_round` does, for a stack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from fedbn.data.batching import sizes
from fedbn.federation.client import ASIDE, OPTIMIZER
from fedbn.federation.context import EVERYONE, Setting
from fedbn.federation.training import shuffle
from fedbn.nn.roles import State
from fedbn.personalization.base import Personalization
from fedbn.seeds import generator
from fedbn.stacked.fit import Descent, Trained, Trainee, fit_stack
from fedbn.stacked.layers import Unstackable
from fedbn.stacked.program import Program, program, refuse_hooks
from fedbn.statistics.consensus import Heard
from fedbn.strategies.base import NormStrategy, Progress, Update


@dataclass
class Failure:
    """A job that raised."""

    error: Exception


class Assignment(Protocol):
    """What a user is to do, not yet done, and the entries its model is made of."""

    @property
    def here(self) -> Setting: ...
    @property
    def user(self) -> int: ...
    @property
    def received(self) -> State: ...
    @property
    def kept(self) -> State | None: ...


class Round(Assignment, Protocol):
    """One client's round of training, not yet done: what `client_round` is given."""

    @property
    def progress(self) -> Progress: ...
    @property
    def heard(self) -> Heard: ...


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
    def of(here: Setting, users: Sequence[int]) -> Rows:
        """The rows of some users."""
        parts = [here.training_data(u) for u in users]
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
    >>> from fedbn.federation.setup import setting
    >>> Cohort(setting(Run("digits8", "fedbn", plan=Plan(), model="mlp"))).twin(Progress(1, 2)).trained[:1]
    ('hidden.0.weight',)
    """

    here: Setting
    twins: dict[tuple[tuple[int, bool], ...], Program] = field(default_factory=dict)

    @cached_property
    def rows(self) -> Rows:
        """The training data of all who train."""
        return Rows.of(self.here, self.here.trainers)

    def twin(self, progress: Progress, heard: Heard = ()) -> Program:
        """The stacked twin of the run's model in the mode of a round; to be used before the mode changes.

        Raises:
            Unstackable: clients do more than plain steps, or the model has unknown parts.
        """
        here, kind = self.here, type(self.here.strategy)
        if heard:
            raise Unstackable(f"{here.strategy.name} consults before training")
        for hook in ("before_step", "measure", "report"):
            if getattr(kind, hook) is not getattr(NormStrategy, hook):
                raise Unstackable(f"{here.strategy.name} has its own {hook}")
        if here.owners_of_rows(here.trainers[0]) is not None:
            raise Unstackable("batches are of one user each")
        if type(here.personal).train is not Personalization.train:
            raise Unstackable(f"{here.personal.name} trains in its own way")
        model = here.load(here.initial)
        here.strategy.begin(model, progress, heard)
        state = model.state_dict()
        if any(not torch.equal(state[n], v) for n, v in here.initial.items()):
            raise Unstackable(f"{here.strategy.name} changes the model before training")
        return self._read(model)

    def evaluation_twin(self) -> Program:
        """The stacked twin of the run's model in evaluation; to be used before the mode changes.

        Raises:
            Unstackable: the model has unknown parts, or users are served models that are made in another way.
        """
        here = self.here
        if here.treatment.personalizes:
            raise Unstackable(f"{here.personal.name} serves models of its own")
        model = here.scratch.eval()
        watched = (twin := self._read(model)).watched
        if any(model.get_submodule(path).running_mean is None for path in watched):
            raise Unstackable("examples of a batch are normalized together in evaluation too")
        return twin

    def _read(self, model: nn.Module) -> Program:
        refuse_hooks(model)
        mode = tuple((id(m), m.training) for m in model.modules())
        if mode not in self.twins:
            self.twins[mode] = program(model)
        return self.twins[mode]

    def train(self, rounds: Sequence[Round], twin: Program) -> list[tuple[Update, State] | Failure]:
        """Do the rounds of several clients side by side; results in their order.

        A client that cannot begin (entries are missing, say) is left out, and its result is the `Failure`.
        """
        here, plan = self.here, self.here.run.plan
        rows = self.rows if len(rounds) > 1 else Rows.of(here, [rounds[0].user])
        results: dict[int, tuple[Update, State] | Failure] = {}
        trainees: dict[int, Trainee] = {}
        for i, job in enumerate(rounds):
            try:
                trainees[i] = self._trainee(job, rows, twin)
            except Exception as error:
                results[i] = Failure(error)
        order = sorted(trainees, key=lambda i: -len(trainees[i].order))
        if order:
            rate, travels = plan.rate(rounds[0].progress.round), frozenset(here.ownership.travels)
            how = Descent(rate, plan.momentum, plan.weight_decay, plan.proximal, travels, plan.precision)
            trained = fit_stack(twin, [trainees[i] for i in order], rows.x, rows.y, how)
            results |= {i: self._result(rounds[i], done) for i, done in zip(order, trained, strict=True)}
        return [results[i] for i in range(len(rounds))]

    def rehearse(self, rounds: Sequence[Round], twin: Program) -> None:
        """One step of each client on its first rows, to see how long it takes; nothing is kept."""
        here, plan = self.here, self.here.run.plan
        size = min(plan.batch_size, min(len(here.training_data(r.user)) for r in rounds))
        parts = [here.training_data(r.user).take(torch.arange(size)) for r in rounds]
        x, y = torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts])
        trainees = [
            Trainee(here.initial, torch.arange(size), [size], torch.Generator(), first=i * size)
            for i in range(len(parts))
        ]
        fit_stack(twin, trainees, x, y, Descent(plan.lr, plan.momentum, precision=plan.precision))

    def _trainee(self, job: Round, rows: Rows, twin: Program) -> Trainee:
        here, plan, kept = self.here, self.here.run.plan, job.kept or {}
        # As in `client_round`: one place that holds everyone's data draws as its first user would.
        drawn = here.population.seen[0] if job.user == EVERYONE else job.user
        seed, number = here.run.seed, job.progress.round
        n = len(here.training_data(job.user))
        orders = [torch.randperm(n, generator=shuffle(seed, number, drawn, e)) for e in range(plan.local_epochs)]
        return Trainee(
            here.assemble(job.received, kept),
            torch.cat(orders) if len(orders) > 1 else orders[0],
            sizes(n, plan.batch_size) * plan.local_epochs,
            generator(seed, "noise", number, drawn) if twin.draws else None,
            {k.removeprefix(OPTIMIZER): v for k, v in kept.items() if k.startswith(OPTIMIZER)},
            rows.first[job.user],
        )

    def _result(self, job: Round, done: Trained) -> tuple[Update, State]:
        here, plan = self.here, self.here.run.plan
        examples = len(here.training_data(job.user))
        loss = done.loss / (examples * max(plan.local_epochs, 1))
        stays = {k: done.state[k] for k in here.ownership.kept}
        if plan.optimizer_state == "keep" and plan.momentum:
            stays |= {OPTIMIZER + k: v for k, v in done.momentum.items()}
        stays |= {k: v for k, v in (job.kept or {}).items() if k.startswith(ASIDE)}
        return Update(job.user, {k: done.state[k] for k in here.ownership.travels}, examples, loss), stays
