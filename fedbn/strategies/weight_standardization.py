"""Weight standardization with GroupNorm (Qiao, Wang, Liu, Shen, Yuille, 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedbn.nn.conversion import convert
from fedbn.nn.roles import batch_norm_layers
from fedbn.strategies.base import StatelessNorm


@dataclass(frozen=True)
class WeightStandardization(StatelessNorm):
    """Standardized convolutions with GroupNorm, as in the paper. https://arxiv.org/abs/1903.10520

    GroupNorm replaces BN; other normalization layers of the model stay.

    Attributes:
        groups: groups of GroupNorm, as in `groupnorm`; 0: no normalization of activations at all.

    >>> net = nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4))
    >>> WeightStandardization(groups=2).prepare_model(net)[1].num_groups
    2
    """

    name = "weight-standardization"
    title = "weight standardization + GroupNorm"
    about = "weight standardization and GroupNorm instead of BN; option groups (0: no GroupNorm)"
    source = "Qiao et al. 2019"
    groups: int = 8

    def prepare_model(self, model: nn.Module) -> nn.Module:
        if self.groups and batch_norm_layers(model):
            model = convert(model, "group", groups=self.groups)
        return convert(model, "weight-standardization", keep_norms=bool(self.groups))
