"""FBN: train with the shared running statistics (Guerraoui, Pinot, Rizk, Stephan, Taiani, 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fedbn.nn.conversion import convert_norms
from fedbn.nn.roles import State
from fedbn.norms.shared_statistics import SharedStatisticsNorm, shared_statistics_layers
from fedbn.statistics.consensus import Aggregates
from fedbn.strategies.base import Progress, Updates
from fedbn.strategies.global_pooled import GlobalPooled


@dataclass(frozen=True)
class FBN(GlobalPooled):
    """Clients normalize with the server's statistics and send their batch statistics; the server averages slowly.

    https://arxiv.org/abs/2405.14670. The server's statistics move by ``rate`` towards the clients' pooled ones. They
    start at 0 and 1, so the first rounds are hardly normalized. The paper's robust aggregation is not included.

    Attributes:
        rate: weight of a round's statistics.

    >>> FBN().rate
    0.1
    """

    name = "fbn"
    title = "FBN"
    about = "trains with the server's running statistics as constants; option rate"
    source = "Guerraoui et al. 2024"
    rate: float = 0.1

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return convert_norms(super().prepare_model(model), SharedStatisticsNorm, self.name)

    def set_training_mode(self, model: nn.Module, progress: Progress, aggregates: Aggregates = ()) -> None:
        model.train()
        for layer in shared_statistics_layers(model):
            layer.reset_sums()

    def after_local_training(self, model: nn.Module) -> State:
        for layer in shared_statistics_layers(model):
            layer.publish()
        return {}

    def aggregate_statistics(
        self, updates: Updates, weights: Sequence[float], keys: Sequence[str], old: State, progress: Progress
    ) -> State:
        new = super().aggregate_statistics(updates, weights, keys, old, progress)
        return {k: old[k].lerp(new[k], self.rate) for k in keys}
