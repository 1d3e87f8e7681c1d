"""Local bound: every user trains its own model and shares nothing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedbn.strategies.base import NormStrategy
from fedbn.strategies.ownership import LOCAL


@dataclass(frozen=True)
class Local(NormStrategy):
    """One model per user, trained for as many epochs as federated models. Unseen users have no model.

    >>> set(map(str, Local().owners().values()))
    {'local'}
    """

    name = "local"
    title = "local training"
    about = "bound: every user trains a model alone"
    body = LOCAL
    head = LOCAL
    affine = LOCAL
    sample_affine = LOCAL
    gate = LOCAL
    statistics = LOCAL

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return model
