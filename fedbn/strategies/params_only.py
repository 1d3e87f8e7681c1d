"""FedAvg on ``model.parameters()``: what many frameworks call FedAvg, silently keeping statistics at home."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.strategies.base import NormStrategy
from fedbn.strategies.ownership import LOCAL


@dataclass(frozen=True)
class ParamsOnly(NormStrategy):
    """Average what ``parameters()`` lists; buffers stay where they are and newcomers keep (0, 1).

    The same training as SiloBN when clients persist; the accident is that nobody chose it.

    >>> {str(role): str(owner) for role, owner in ParamsOnly().owners().items()}["statistics"]
    'local'
    """

    name = "params-only"
    about = "FedAvg on parameters(): statistics silently stay local"
    source = "common in FL frameworks"
    statistics = LOCAL
