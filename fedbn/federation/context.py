"""The fixed context of a run: its data, model and ownership of entries.

`build_context` builds and checks it once per process and run. The functions of a round take it as an argument.
Simulated clients share its scratch model, whose whole state is loaded before each use.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from fedbn.data.population import Examples, Population
from fedbn.data.splits import pooled_test
from fedbn.federation.run import Run
from fedbn.nn.roles import State, clone, split
from fedbn.online.rules.base import client_rule
from fedbn.personalization.base import Personalization
from fedbn.personalization.treatment import Treatment
from fedbn.privacy.mechanism import Privacy, parse_privacy
from fedbn.seeds import generator, numpy_generator
from fedbn.strategies.base import NormStrategy
from fedbn.strategies.ownership import Ownership
from fedbn.tasks import Task

CENTRAL_TRAINER = -1
"""Index of the only client of a centralized strategy, which holds all seen users' training data."""


@dataclass(frozen=True)
class RunContext:
    """A run with its data, model and ownership table.

    Attributes:
        run: the run.
        population: users with their data, partitioned and shifted.
        task: loss, metrics and shape of the outputs.
        treatment: strategy and personalization method.
        ownership: owner of each entry of the model.
        initial: the model's state before training, the same for every client.
        scratch: the model that all clients share for computation.
        notices: notices and warnings for the user.
    """

    run: Run
    population: Population
    task: Task
    treatment: Treatment
    ownership: Ownership
    initial: State
    scratch: nn.Module
    notices: tuple[str, ...]

    @property
    def strategy(self) -> NormStrategy:
        """The normalization strategy."""
        return self.treatment.norm

    @property
    def personal(self) -> Personalization:
        """The personalization method."""
        return self.treatment.personal

    @cached_property
    def privacy(self) -> Privacy | None:
        """Protection of the clients' messages, or None."""
        return parse_privacy(self.run.privacy)

    @cached_property
    def outputs(self) -> int:
        """Number of outputs of the model: classes, labels or numbers."""
        return self.task.output_shape(self.training_data(self.trainers[0]).y, self.population.classes)[0]

    @property
    def uses_population_prior(self) -> bool:
        """Whether the online rule starts users from a prior over the clients' statistics."""
        return bool(self.run.rule) and client_rule(self.run.rule).requires == "n0"

    def group_of(self, user: int) -> str:
        """Name of the user's group; users of one group receive the same state."""
        return "" if user == CENTRAL_TRAINER else self.strategy.group_of(user, self.population.users[user])

    @cached_property
    def pooled_test(self) -> Examples:
        """Pooled test examples of all seen users, for the global row of the matrix."""
        parts = [self.population.users[i].test for i in self.population.seen]
        draw = generator(self.run.seed, "pooled test")
        return pooled_test(parts, self.run.plan.global_test, draw).to(self.run.device)

    @cached_property
    def pooled_training_data(self) -> Examples:
        """Training examples of all seen users."""
        return Examples.concat([self.population.users[i].train for i in self.population.seen])

    @property
    def trainers(self) -> tuple[int, ...]:
        """Indices of the clients that train: the seen users, or the central trainer."""
        return (CENTRAL_TRAINER,) if self.strategy.is_centralized else self.population.seen

    def training_data(self, user: int) -> Examples:
        """Training examples of one client."""
        return self.pooled_training_data if user == CENTRAL_TRAINER else self.population.users[user].train

    def rng_user(self, user: int) -> int:
        """User index that keys the random draws of a client's training.

        The central trainer draws like the first seen user, so that with one user it trains exactly like that user.
        """
        return self.population.seen[0] if user == CENTRAL_TRAINER else user

    def row_users(self, user: int) -> Tensor | None:
        """Position ``[n]`` of each row's user in ``population.seen`` if batches are built per user; else None."""
        if user != CENTRAL_TRAINER or not self.run.plan.user_batches:
            return None
        lengths = torch.tensor([len(self.population.users[i].train) for i in self.population.seen])
        return torch.arange(len(lengths)).repeat_interleave(lengths)

    def sample_clients(self, round: int) -> list[int]:
        """Sorted indices of the clients of a round; depends on (seed, round) only."""
        trainers, count = self.trainers, self.run.plan.clients_per_round
        if count is None or count >= len(trainers):
            return list(trainers)
        draw = numpy_generator(self.run.seed, "clients", round)
        return sorted(trainers[i] for i in draw.choice(len(trainers), count, replace=False).tolist())

    def weight(self, examples: int) -> float:
        """Aggregation weight of a client with this number of examples."""
        return float(examples) if self.run.plan.weighting == "samples" else 1.0

    def initial_server_state(self) -> State:
        """The server's state before the first round: the initial shared entries."""
        return clone(split(self.initial, set(self.ownership.travels))[0])

    def assemble(self, received: State, client_state: State | None) -> State:
        """Complete state of a user's model.

        Retained entries come from the client's own state where it has them, other shared entries from the server, and
        the rest from the initial model.
        """
        if missing := [k for k in self.ownership.travels if k not in received]:
            raise KeyError(f"missing {missing}")
        own = client_state or {}
        server = {k: received[k] for k in self.ownership.travels}
        return self.initial | server | {k: own[k] for k in self.ownership.retained if k in own}

    def load(self, state: State) -> nn.Module:
        """Load ``state`` into the scratch model and return the model."""
        self.scratch.load_state_dict(state, strict=True)
        return self.scratch
