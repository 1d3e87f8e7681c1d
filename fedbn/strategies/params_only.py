"""FedAvg on ``model.parameters()``, as in many frameworks, which silently keeps statistics local."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedbn.strategies.base import NormStrategy
from fedbn.strategies.ownership import LOCAL


@dataclass(frozen=True)
class ParamsOnly(NormStrategy):
    """Average ``parameters()`` only; buffers stay local and new users keep initial statistics (0, 1).

    Training is identical to SiloBN as long as clients keep their state, but usually unintended. Without buffers it is
    plain FedAvg.

    >>> {str(role): str(owner) for role, owner in ParamsOnly().owners().items()}["statistics"]
    'local'
    """

    name = "params-only"
    title = "FedAvg (parameters only)"
    about = "FedAvg on parameters(): statistics silently stay local"
    source = "common in FL frameworks"
    statistics = LOCAL

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return model
