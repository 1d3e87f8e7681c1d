"""Bound: every user trains alone, nothing is shared."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedbn.strategies.base import NormStrategy
from fedbn.strategies.ownership import LOCAL


@dataclass(frozen=True)
class Local(NormStrategy):
    """Each user's own model, as many epochs as in federation. There is no model for an unseen user.

    >>> set(map(str, Local().owners().values()))
    {'local'}
    """

    name = "local"
    about = "bound: each user alone, nothing shared"
    body = LOCAL
    head = LOCAL
    affine = LOCAL
    gate = LOCAL
    statistics = LOCAL

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return model
