"""Weight normalization instead of BN (Salimans, Kingma, NeurIPS 2016)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedbn.data.population import Examples
from fedbn.nn.roles import State
from fedbn.norms.weight_norm import initialize
from fedbn.strategies.base import Progress, StatelessNorm


@dataclass(frozen=True)
class WeightNorm(StatelessNorm):
    """Weights of each unit as length times direction, which are both averaged. https://arxiv.org/abs/1602.07868

    In the first round every client initializes lengths and biases from its own data, as the paper does from the first
    batch. All clients continue from their mean.

    >>> WeightNorm().prepare_model(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))[1]
    Identity()
    """

    name = "weight-norm"
    title = "WeightNorm"
    about = "weight normalization instead of BN"
    source = "Salimans & Kingma 2016"
    kind = "weight-norm"

    def before_local_training(self, model: nn.Module, data: Examples, progress: Progress) -> State:
        if progress.round == 1:
            initialize(model.eval(), data.x)
        return {}
