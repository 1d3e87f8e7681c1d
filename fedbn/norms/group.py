"""Group normalization (Wu, He, ECCV 2018, https://arxiv.org/abs/1803.08494)."""

from __future__ import annotations

from torch import nn

from fedbn.nn.conversion import channels_of, converted, groups_for, replace_norms


def convert(model: nn.Module, *, groups: int | None = None, per_group: int | None = None) -> nn.Module:
    """Normalize each sample over groups of channels and all positions.

    Args:
        model: changed in place.
        groups: maximum number of groups; the largest divisor of a layer's channels up to it is used.
        per_group: channels per group instead. With neither there is one channel per group (instance normalization).

    >>> convert(nn.Sequential(nn.BatchNorm2d(48)), groups=32)[0].num_groups
    24
    """
    which = converted(model, "group")

    def make(path: str, layer: nn.Module) -> nn.Module:
        channels = channels_of(layer)
        count = groups_for(channels, groups=groups, per_group=per_group)
        affine = getattr(layer, "weight", None) is not None
        return nn.GroupNorm(count, channels, getattr(layer, "eps", None) or 1e-5, affine)

    return replace_norms(model, make, which)
