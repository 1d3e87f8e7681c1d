"""Base class of strategies that average each client's parameters with weights by similarity of the data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedbn.data.population import Examples, Population, User
from fedbn.nn.roles import State, with_prefix
from fedbn.nn.schema import TensorSpec, moments_schema
from fedbn.statistics.consensus import flatten, unflatten
from fedbn.statistics.moments import Moments, naive_mean
from fedbn.statistics.recalibration import all_moments
from fedbn.strategies.base import NormStrategy, Progress, Updates
from fedbn.strategies.ownership import LOCAL, SHARED, Ownership

MOMENTS = "moments/"
"""Prefix of a client's moments in the notes of its update."""


@dataclass(frozen=True)
class SimilarityWeighted(NormStrategy):
    """Local BN; after a warm-up, clients send their moments once and receive similarity-weighted parameters.

    Attributes:
        warm_up: share of rounds trained as FedBN, to obtain a model under which moments can be compared.
    """

    affine = LOCAL
    statistics = LOCAL
    depends_on_rounds = True
    warm_up: float = 0.3

    @abstractmethod
    def weights(self, distances: Tensor, index: int) -> Tensor:
        """Aggregation weights ``[K]`` for a client.

        Args:
            distances: distances ``[K]`` from the client to all clients.
            index: position of the client among them; -1 if it is not included.
        """

    @abstractmethod
    def distance(self, a: dict[str, Moments], b: dict[str, Moments]) -> float:
        """Distance of two clients, from their moments by layer."""

    def notes_schema(self, model: nn.Module, x: Tensor) -> dict[str, TensorSpec]:
        channels = {path: len(moments.mean) for path, moments in all_moments(model, x).items()}
        return {MOMENTS + k: spec for k, spec in moments_schema(channels).items()}

    def before_local_training(self, model: nn.Module, data: Examples, progress: Progress) -> State:
        # Clients are compared under the first model after the warm-up.
        if progress.known or progress.round <= self.warm_up * progress.rounds:
            return {}
        return {MOMENTS + k: v for k, v in flatten(all_moments(model, data.x)).items()}

    def is_known_client(self, user: int, known: State) -> bool:
        return any(key.startswith(f"{user}/") for key in known)

    def group_of(self, index: int, user: User) -> str:
        return str(index)

    def group_states(
        self, updates: Updates, weights: Sequence[float], table: Ownership, population: Population, known: State
    ) -> dict[str, State]:
        for update in updates:
            known |= {f"{update.user}/{k}": v for k, v in with_prefix(update.notes, MOMENTS).items()}
        moments = {u: unflatten(with_prefix(known, f"{u}/")) for u in population.seen}
        measured = [u for u in updates if moments[u.user]]
        if len(measured) < 2:
            return {}
        out: dict[str, State] = {}
        for user, own in ((u, m) for u, m in moments.items() if m):
            index = next((i for i, u in enumerate(measured) if u.user == user), -1)
            distances = torch.tensor([self.distance(own, moments[u.user]) for u in measured], dtype=torch.float64)
            shares = self.weights(distances, index).tolist()
            out[str(user)] = {k: naive_mean([u.state[k] for u in measured], shares) for k in table.keys(SHARED)}
        return out
