"""Training rounds of many clients at once, equivalent to `fedbn.federation.client.client_round`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor, nn

from fedbn.augment.base import augmentation
from fedbn.data.batching import batch_sizes
from fedbn.federation.client import METHOD_STATE, OPTIMIZER
from fedbn.federation.client_table import ClientTable
from fedbn.federation.context import RunContext
from fedbn.federation.training import augmentation_draws, shuffle
from fedbn.nn.roles import State, with_prefix
from fedbn.optim.schedules import rate
from fedbn.personalization.base import Personalization
from fedbn.seeds import generator
from fedbn.stacked.check import checked_program
from fedbn.stacked.fit import (
    FitConfig,
    StackedClient,
    StackedClients,
    TrainResult,
    empty_optimizer_state,
    fit_clients,
    repeat,
    stack_orders,
    stack_values,
)
from fedbn.stacked.hooks import ClientModel, defines
from fedbn.stacked.joint import PendingStack, trainer
from fedbn.stacked.layers import Unstackable
from fedbn.stacked.modules import entries
from fedbn.stacked.program import Program
from fedbn.stacked.steps import stacked_step
from fedbn.stacked.tracing import check_structure
from fedbn.statistics.consensus import Aggregates
from fedbn.strategies.base import Progress, StackedUpdates, Update


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


@dataclass(frozen=True)
class CohortRound:
    """A training round of many clients, whose states are rows of a table.

    Attributes:
        users: the clients, each once.
        received: shared entries that each client receives; often one object for all.
        client_states: states of the clients after their last round; not modified.
        progress: the current round.
    """

    users: list[int]
    received: Sequence[State]
    client_states: ClientTable
    progress: Progress


@dataclass(frozen=True)
class CohortResult:
    """What a `CohortRound` computes, in the order of its users.

    Attributes:
        updates: updates for the server.
        client_states: new client states ``[N, *shape]``.
    """

    updates: StackedUpdates
    client_states: State


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

    Attributes:
        ctx: the run's context.
        programs: programs, or why there is none, by mode of the model.
        runs_hooks: whether the strategy's hooks run on each client's model in the round of the last `program`.
        unused: copies of the model for hooks, which no client uses.

    >>> from fedbn.config import Plan
    >>> from fedbn.federation.run import Run
    >>> from fedbn.federation.setup import build_context
    >>> Cohort(build_context(Run("digits8", "fedbn", plan=Plan(), model="mlp"))).program(Progress(1, 2)).trained[:1]
    ('hidden.0.weight',)
    """

    ctx: RunContext
    programs: dict[tuple[object, ...], Program | Unstackable] = field(default_factory=dict)
    runs_hooks: bool = False
    unused: list[nn.Module] = field(default_factory=list)

    @cached_property
    def rows(self) -> StackedData:
        """Training data of all trainers."""
        return StackedData.of(self.ctx, self.ctx.trainers)

    @cached_property
    def examples(self) -> dict[int, int]:
        """Number of training examples of each trainer."""
        return {user: len(self.ctx.training_data(user)) for user in self.ctx.trainers}

    @cached_property
    def batch_sizes(self) -> dict[int, list[int]]:
        """Batch sizes of all steps of a round of each trainer."""
        plan = self.ctx.run.plan
        return {user: batch_sizes(n, plan.batch_size) * plan.local_epochs for user, n in self.examples.items()}

    def program(self, progress: Progress, aggregates: Aggregates = ()) -> Program:
        """The stacked model in the training mode of a round; use it before the mode changes.

        Raises:
            Unstackable: clients do more than steps of a built-in optimizer, or the model has unsupported parts.
        """
        ctx = self.ctx
        stacked_step(ctx.run.plan, ctx.run.plan.lr)
        if aggregates:
            raise Unstackable("the strategy synchronizes statistics before training")
        if ctx.row_users(ctx.trainers[0]) is not None:
            raise Unstackable("each batch holds the examples of one user")
        if type(ctx.personal).train is not Personalization.train:
            raise Unstackable("the personalization method has its own training procedure")
        sets_mode = defines(ctx.strategy, "set_training_mode")
        model = ctx.load(ctx.initial) if sets_mode else ctx.scratch
        ctx.strategy.set_training_mode(model, progress, aggregates)
        state = model.state_dict() if sets_mode else ctx.initial
        self.runs_hooks = any(not torch.equal(state[n], v) for n, v in ctx.initial.items() if sets_mode) or defines(
            ctx.strategy, "before_local_training", "on_before_optimizer_step", "after_local_training"
        )
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
        ctx = self.ctx
        rows = self.rows if len(rounds) > 1 else StackedData.of(ctx, [rounds[0].user])
        results: dict[int, tuple[Update, State] | Failure] = {}
        clients: dict[int, StackedClient] = {}
        models: dict[int, ClientModel] = {}
        for i, job in enumerate(rounds):
            try:
                state = ctx.assemble(job.received, job.client_state or {})
                if self.runs_hooks:
                    models[i] = ClientModel.start(ctx, job.user, state, job.progress, self.unused)
                    state = entries(models[i].model)
                clients[i] = self._stacked_client(job, state, rows, program)
                clients[i].model = models[i].model if i in models else None
            except Exception as error:
                results[i] = Failure(error)
        order = sorted(clients, key=lambda i: -len(clients[i].order))
        if order:
            config = self._config(rounds[0].progress)
            fit = partial(self._fit, rounds[0].progress, program, rows, config)
            stacked = [clients[i] for i in order]
            trained = fit_clients(program, stacked, rows.x, rows.y, config, ctx.task, fit)
            for i, result in zip(order, trained, strict=True):
                try:
                    results[i] = self._result(rounds[i], result, models.get(i))
                except Exception as error:
                    results[i] = Failure(error)
        self.unused += [client.model for client in models.values()]
        return [results[i] for i in range(len(rounds))]

    def trial_step(self, users: Sequence[int], program: Program, size: int) -> None:
        """Take one step of each client with ``size`` of its rows, for timing; the result is discarded."""
        ctx, plan = self.ctx, self.ctx.run.plan
        rows, starts = torch.arange(size), range(0, size * len(users), size)
        parts = [ctx.training_data(user).take(rows % len(ctx.training_data(user))) for user in users]
        x, y = torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts])
        state = entries(ctx.scratch) | ctx.initial
        clients = [StackedClient(state, rows, [size], torch.Generator(), first=first) for first in starts]
        config = FitConfig(stacked_step(plan, plan.lr), precision=plan.precision)
        fit_clients(program, clients, x, y, config, ctx.task)

    def empty_entries(self, program: Program, k: int) -> State:
        """Entries ``[K, *shape]`` that K clients have after training, with undefined values."""
        plan = self.ctx.run.plan
        entries = {n: v.new_empty((k, *v.shape)) for n, v in self.ctx.initial.items()}
        if plan.optimizer_state == "keep":
            optimizer = empty_optimizer_state(program, stacked_step(plan, plan.lr), entries, k)
            entries |= {OPTIMIZER + n: v for n, v in optimizer.items()}
        return entries

    def train_part(
        self, cohort: CohortRound, part: slice, program: Program, shuffled: Sequence[Tensor], trained: State
    ) -> list[float]:
        """Train a part of a cohort in one stack.

        Args:
            cohort: the round.
            part: positions in ``cohort.users``.
            program: the stacked model.
            shuffled: row indices of each client of the whole cohort (`shuffled_rows`).
            trained: entries of the whole cohort (`empty_entries`); the rows of this part are written.

        Returns:
            Mean loss of each client.
        """
        ctx, number, users = self.ctx, cohort.progress.round, cohort.users
        rows = self.rows if len(users[part]) > 1 else StackedData.of(ctx, users[part])
        order = sorted(range(part.start, part.stop), key=lambda i: -self.examples[users[i]])
        ordered, config = [users[i] for i in order], self._config(cohort.progress)
        tensors = self._assemble([cohort.received[i] for i in order])
        optimizer_state = empty_optimizer_state(program, config.step, tensors, len(order))
        entries = tensors | {OPTIMIZER + n: v for n, v in optimizer_state.items()}
        cohort.client_states.copy_to(self._retained(entries), ordered)
        clients = StackedClients(
            tensors,
            optimizer_state,
            stack_orders([shuffled[i] for i in order], [rows.first[user] for user in ordered], rows.x.device),
            [self.batch_sizes[user] for user in ordered],
            [self._noise(user, number, program) for user in ordered],
            [augmentation_draws(ctx.run.seed, number, user) for user in ordered] if config.augment else [],
        )
        losses = self._fit(cohort.progress, program, rows, config, clients)
        positions = torch.tensor(order, device=rows.x.device)
        for name in trained:
            trained[name].index_copy_(0, positions, entries[name])
        loss_of = dict(zip(ordered, losses, strict=True))
        return [self._mean_loss(user, loss_of[user]) for user in users[part]]

    def _fit(
        self, progress: Progress, program: Program, rows: StackedData, config: FitConfig, clients: StackedClients
    ) -> list[float]:
        """Train a stack in place, alone or with those of other runs; returns what `fit_stack` returns."""
        return trainer.get()(PendingStack(self.ctx, progress, program, clients, rows.x, rows.y, config))

    def result(self, cohort: CohortRound, trained: State, losses: list[float]) -> CohortResult:
        """The result of a round, from the entries and losses of all parts."""
        ownership = self.ctx.ownership
        examples = [self.examples[user] for user in cohort.users]
        shared = {n: trained[n] for n in ownership.travels}
        return CohortResult(StackedUpdates(cohort.users, shared, examples, losses), self._retained(trained))

    def state_bytes(self, trained: State) -> int:
        """Bytes of the client states in ``trained`` (`empty_entries`)."""
        return sum(v.nbytes for v in self._retained(trained).values())

    def _retained(self, trained: State) -> State:
        return {n: v for n, v in trained.items() if n in self.ctx.ownership.retained or n.startswith(OPTIMIZER)}

    def _assemble(self, received: Sequence[State]) -> State:
        """Models ``[K, *shape]`` of clients without client state, as by `RunContext.assemble`."""
        initial = self.ctx.initial
        if all(r is received[0] for r in received):
            return {n: repeat(received[0].get(n, v), len(received)) for n, v in initial.items()}
        return {n: stack_values([r.get(n, v) for r in received]) for n, v in initial.items()}

    def shuffled_rows(self, users: Sequence[int], number: int) -> list[Tensor]:
        """Row indices of all steps of each client's round, in order."""
        ctx, draw = self.ctx, torch.Generator()
        seed, epochs = ctx.run.seed, range(ctx.run.plan.local_epochs)
        shuffled = []
        for user in users:
            n, random_user = self.examples[user], ctx.rng_user(user)
            orders = [torch.randperm(n, generator=shuffle(seed, number, random_user, e, reuse=draw)) for e in epochs]
            shuffled.append(torch.cat(orders) if len(orders) > 1 else orders[0])
        return shuffled

    def _noise(self, user: int, number: int, program: Program) -> torch.Generator | None:
        """Generator of a client's dropout masks."""
        if not program.draws_noise:
            return None
        return generator(self.ctx.run.seed, "noise", number, self.ctx.rng_user(user))

    def _mean_loss(self, user: int, total: float) -> float:
        return total / (self.examples[user] * max(self.ctx.run.plan.local_epochs, 1))

    def _config(self, progress: Progress) -> FitConfig:
        plan, strategy = self.ctx.run.plan, self.ctx.strategy
        return FitConfig(
            stacked_step(plan, rate(plan, progress.round)),
            plan.proximal,
            frozenset(self.ctx.ownership.travels),
            plan.precision,
            plan.max_grad_norm,
            augmentation(plan.augment),
            strategy.on_before_optimizer_step if defines(strategy, "on_before_optimizer_step") else None,
        )

    def _stacked_client(self, job: TrainJob, state: State, rows: StackedData, program: Program) -> StackedClient:
        ctx, client_state, number = self.ctx, job.client_state or {}, job.progress.round
        return StackedClient(
            state,
            self.shuffled_rows([job.user], number)[0],
            self.batch_sizes[job.user],
            self._noise(job.user, number, program),
            with_prefix(client_state, OPTIMIZER),
            rows.first[job.user],
            augmentation_draws(ctx.run.seed, number, ctx.rng_user(job.user)),
        )

    def _result(self, job: TrainJob, result: TrainResult, model: ClientModel | None) -> tuple[Update, State]:
        ctx = self.ctx
        state = result.state if model is None else model.finish(ctx, result.state)
        client_state = {k: state[k] for k in ctx.ownership.retained}
        if ctx.run.plan.optimizer_state == "keep":
            client_state |= {OPTIMIZER + k: v for k, v in result.optimizer_state.items()}
        client_state |= {k: v for k, v in (job.client_state or {}).items() if k.startswith(METHOD_STATE)}
        examples, loss = self.examples[job.user], self._mean_loss(job.user, result.loss)
        shared, notes = {k: state[k] for k in ctx.ownership.travels}, {} if model is None else model.notes
        return Update(job.user, shared, examples, loss, notes), client_state
