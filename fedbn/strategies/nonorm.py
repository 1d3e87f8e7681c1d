"""No normalization: every normalization layer is replaced by the identity."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedbn.nn.conversion import convert
from fedbn.nn.roles import norm_layers
from fedbn.strategies.base import StatelessNorm


@dataclass(frozen=True)
class NoNorm(StatelessNorm):
    """The control without normalization.

    >>> NoNorm().prepare_model(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))[1]
    Identity()
    """

    name = "nonorm"
    title = "no normalization"
    about = "normalization layers removed"

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return convert(model, "none") if norm_layers(model) else model
