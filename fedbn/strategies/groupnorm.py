"""GroupNorm in place of BN (Wu, He, 2018; in FL: Hsieh et al., ICML 2020)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedbn.nn.conversion import convert, require_batch_norm
from fedbn.strategies.base import StatelessNorm


@dataclass(frozen=True)
class GroupNorm(StatelessNorm):
    """Normalize each sample over groups of channels. GroupNorm layers that the model already has do not change.

    https://arxiv.org/abs/1803.08494, https://arxiv.org/abs/1910.00189

    Attributes:
        groups: largest number of groups; each layer uses the largest divisor of its channels up to this number.
        channels: channels per group; overrides ``groups``.

    >>> net = nn.Sequential(nn.Conv2d(3, 48, 1), nn.BatchNorm2d(48))
    >>> GroupNorm(groups=32).prepare_model(net)[1].num_groups
    24
    """

    name = "groupnorm"
    title = "GroupNorm"
    aliases = ("gn", "group")
    about = "GroupNorm instead of BN; options groups or channels (per group)"
    source = "Wu & He 2018; Hsieh et al. 2020"
    groups: int = 8
    channels: int | None = None

    def prepare_model(self, model: nn.Module) -> nn.Module:
        require_batch_norm(model, f"strategy {self.name!r}")
        if self.channels is not None:
            return convert(model, "group", per_group=self.channels)
        return convert(model, "group", groups=self.groups)
