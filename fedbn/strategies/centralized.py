"""Bound: all seen users' data in one place, trained as one client."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedbn.strategies.base import NormStrategy


@dataclass(frozen=True)
class Centralized(NormStrategy):
    """One model on the union of the seen users' training data, as many epochs as in federation.

    What federation would give if data could be pooled; it is no upper bound for personal models.

    >>> Centralized.is_centralized
    True
    """

    name = "centralized"
    about = "bound: all seen users' data trained in one place"
    is_centralized = True

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return model
