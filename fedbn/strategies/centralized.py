"""Centralized bound: one client trains on all seen users' data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedbn.strategies.base import NormStrategy


@dataclass(frozen=True)
class Centralized(NormStrategy):
    """One model, trained on the union of the seen users' data for as many epochs as federated models.

    The result of federated learning if data could be pooled. Not an upper bound for personalized models.

    >>> Centralized.is_centralized
    True
    """

    name = "centralized"
    title = "centralized training"
    about = "bound: one model trained on all seen users' pooled data"
    is_centralized = True

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return model
