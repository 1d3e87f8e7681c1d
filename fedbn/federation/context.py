"""Everything of a run that is fixed before its first round: data, model, who owns what. Checked here, once.

A setting is made once a process and run (`build_context`) and handed to the functions of a round; simulated
clients share its scratch model, whose whole state is loaded before each use.
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

EVERYONE = -1
"""Index of the one client that holds all seen users' data when a strategy gathers them."""


@dataclass(frozen=True)
class RunContext:
    """A run made concrete.

    Attributes:
        run: the value it was made from.
        population: users with their data, partitioned and shifted.
        treatment: strategy and personalization.
        ownership: who owns each entry of the model.
        initial: the model's state before training, the same for every client.
        scratch: one model for all to compute with.
        notices: what the user should know and did not ask for.
    """

    run: Run
    population: Population
    treatment: Treatment
    ownership: Ownership
    initial: State
    scratch: nn.Module
    notices: tuple[str, ...]

    @property
    def strategy(self) -> NormStrategy:
        """How normalization is treated."""
        return self.treatment.norm

    @property
    def personal(self) -> Personalization:
        """How clients personalize."""
        return self.treatment.personal

    @cached_property
    def privacy(self) -> Privacy | None:
        """How clients' messages are protected; None: not at all."""
        return parse_privacy(self.run.privacy)

    @property
    def asks_population(self) -> bool:
        """Whether the rule of the online column starts users from what clients' statistics are."""
        return bool(self.run.rule) and client_rule(self.run.rule).wants == "n0"

    def receives_client_statistics(self, user: int) -> bool:
        """Whether a user is told every client's statistics for the last evaluation."""
        return user in self.population.unseen or self.asks_population

    def group_of(self, user: int) -> str:
        """Name of the view of the server's state that a user gets."""
        return "" if user == EVERYONE else self.strategy.group_of(user, self.population.users[user])

    @cached_property
    def everyone(self) -> Examples:
        """The pooled test rows of the matrix's global row."""
        return pooled_test(
            [self.population.users[i].test for i in self.population.seen],
            self.run.plan.global_test,
            generator(self.run.seed, "pooled test"),
        ).to(self.run.device)

    @cached_property
    def gathered(self) -> Examples:
        """All seen users' training examples."""
        return Examples.concat([self.population.users[i].train for i in self.population.seen])

    @property
    def trainers(self) -> tuple[int, ...]:
        """Who trains: the seen users, or the one place where their data are."""
        return (EVERYONE,) if self.strategy.is_centralized else self.population.seen

    def training_data(self, user: int) -> Examples:
        """Training examples of one trainer."""
        return self.gathered if user == EVERYONE else self.population.users[user].train

    def owners_of_rows(self, user: int) -> Tensor | None:
        """``[n]`` whose each row of a trainer's data is, where batches are to be of one user; else None."""
        if user != EVERYONE or not self.run.plan.user_batches:
            return None
        lengths = torch.tensor([len(self.population.users[i].train) for i in self.population.seen])
        return torch.arange(len(lengths)).repeat_interleave(lengths)

    def sampled(self, round: int) -> list[int]:
        """Who trains in a round, in order; drawn by (seed, round) alone."""
        trainers = self.trainers
        count = self.run.plan.clients_per_round
        if count is None or count >= len(trainers):
            return list(trainers)
        draw = numpy_generator(self.run.seed, "clients", round)
        return sorted(trainers[i] for i in draw.choice(len(trainers), count, replace=False).tolist())

    def weight(self, examples: int) -> float:
        """A client's weight in the mean."""
        return float(examples) if self.run.plan.weighting == "samples" else 1.0

    def start(self) -> State:
        """The server's state before the first round: the travelling entries."""
        return clone(split(self.initial, set(self.ownership.travels))[0])

    def assemble(self, received: State, client_state: State | None) -> State:
        """A user's whole model: the server's entries, its own where it has them, initial ones otherwise."""
        if missing := [k for k in self.ownership.travels if k not in received]:
            raise KeyError(f"missing {missing}")
        own = client_state or {}
        mine = {k: own[k] for k in self.ownership.retained if k in own}
        server = {k: received[k] for k in self.ownership.travels}
        return self.initial | server | mine

    def load(self, state: State) -> nn.Module:
        """The scratch model with exactly ``state``."""
        self.scratch.load_state_dict(state, strict=True)
        return self.scratch
