"""FBN: train with the shared running statistics (Guerraoui, Pinot, Rizk, Stephan, Taiani, 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fedbn.nn.conversion import channels_of, replace_norms, require_statistics
from fedbn.nn.roles import State
from fedbn.norms.shared_statistics import SharedStatisticsNorm, layers
from fedbn.statistics.consensus import Aggregates
from fedbn.strategies.base import Progress, Update
from fedbn.strategies.global_pooled import GlobalPooled


@dataclass(frozen=True)
class FBN(GlobalPooled):
    """Clients normalize by the server's statistics and send averages of their batches'; the server follows slowly.

    https://arxiv.org/abs/2405.14670. The new statistics are ``rate`` times the clients' pooled ones plus the rest of
    the old. They start at 0 and 1, so the first rounds are hardly normalized. The paper's robust aggregation is left
    out.

    Attributes:
        rate: weight of a round's statistics.

    >>> FBN().rate
    0.1
    """

    name = "fbn"
    about = "trains with the server's running statistics as constants; option rate"
    source = "Guerraoui et al. 2024"
    rate: float = 0.1

    def prepare_model(self, model: nn.Module) -> nn.Module:
        require_statistics(model, f"strategy {self.name!r}")
        return replace_norms(
            model, lambda _, old: SharedStatisticsNorm(channels_of(old), affine=old.weight is not None)
        )

    def set_training_mode(self, model: nn.Module, progress: Progress, aggregates: Aggregates = ()) -> None:
        model.train()
        for layer in layers(model):
            layer.begin()

    def after_local_training(self, model: nn.Module) -> State:
        for layer in layers(model):
            layer.publish()
        return {}

    def aggregate_statistics(
        self, updates: Sequence[Update], weights: Sequence[float], keys: Sequence[str], old: State, progress: Progress
    ) -> State:
        new = super().aggregate_statistics(updates, weights, keys, old, progress)
        return {k: old[k].lerp(new[k], self.rate) for k in keys}
