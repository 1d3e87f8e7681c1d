"""Layer normalization (Ba, Kiros, Hinton, 2016, https://arxiv.org/abs/1607.06450)."""

from __future__ import annotations

from torch import nn

from fedbn.norms import group


def convert(model: nn.Module) -> nn.Module:
    """Normalize each sample over all channels and positions: group normalization with one group.

    There is one scale and shift per channel, as in BN.

    >>> convert(nn.Sequential(nn.BatchNorm2d(48)))[0].num_groups
    1
    """
    return group.convert(model, groups=1)
