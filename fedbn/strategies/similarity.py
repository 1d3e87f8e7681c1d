"""Strategies in which each client's parameters are a mean of all clients', weighted by how alike their data are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedbn.data.population import Examples, Population, User
from fedbn.nn.roles import State
from fedbn.statistics.consensus import flatten, unflatten
from fedbn.statistics.moments import Moments, naive_mean
from fedbn.statistics.recalibration import all_moments
from fedbn.strategies.base import NormStrategy, Progress, Update
from fedbn.strategies.ownership import LOCAL, SHARED, Ownership

SAID = "moments/"


@dataclass(frozen=True)
class SimilarityWeighted(NormStrategy):
    """BN stays local; after a warm-up, clients tell their moments once and get parameters weighted by similarity.

    Attributes:
        warm_up: share of the rounds that are FedBN, to have a model under which moments can be compared.
    """

    affine = LOCAL
    statistics = LOCAL
    warm_up: float = 0.3

    @abstractmethod
    def weights(self, distances: Tensor, me: int) -> Tensor:
        """Weights ``[K]`` of all clients for client ``me``, from its distances ``[K]`` to them."""

    @abstractmethod
    def distance(self, a: dict[str, Moments], b: dict[str, Moments]) -> float:
        """How unlike two clients are, from their moments by layer."""

    def before_local_training(self, model: nn.Module, data: Examples, progress: Progress) -> State:
        # The first model after the warm-up is what a client is compared under.
        if progress.known or progress.round <= self.warm_up * progress.rounds:
            return {}
        return {SAID + k: v for k, v in flatten(all_moments(model, data.x)).items()}

    def is_known_client(self, user: int, known: State) -> bool:
        return any(key.startswith(f"{user}/") for key in known)

    def group_of(self, index: int, user: User) -> str:
        return str(index)

    def group_states(
        self,
        updates: Sequence[Update],
        weights: Sequence[float],
        table: Ownership,
        population: Population,
        known: State,
    ) -> dict[str, State]:
        for update in updates:
            known |= {f"{update.user}/{k.removeprefix(SAID)}": v for k, v in update.notes.items() if k.startswith(SAID)}
        moments = {u: unflatten(_under(known, f"{u}/")) for u in population.seen}
        measured = [u for u in updates if moments[u.user]]
        if len(measured) < 2:
            return {}
        out: dict[str, State] = {}
        for user, own in moments.items():
            if not own:
                continue
            me = next((i for i, u in enumerate(measured) if u.user == user), -1)
            distances = torch.tensor([self.distance(own, moments[u.user]) for u in measured], dtype=torch.float64)
            share = self.weights(distances, me).tolist()
            out[str(user)] = {k: naive_mean([u.state[k] for u in measured], share) for k in table.keys(SHARED)}
        return out


def _under(state: State, prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
