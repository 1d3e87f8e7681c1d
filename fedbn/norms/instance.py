"""Instance normalization (Ulyanov, Vedaldi, Lempitsky, 2016, https://arxiv.org/abs/1607.08022)."""

from __future__ import annotations

from torch import nn

from fedbn.nn.batchnorm import AnyInstanceNorm
from fedbn.nn.conversion import channels_of, replace_norms, require_norms


def convert(model: nn.Module) -> nn.Module:
    """Normalize each channel of each sample over its positions; nothing is kept.

    >>> type(convert(nn.Sequential(nn.BatchNorm2d(4)))[0]).__name__
    'AnyInstanceNorm'
    """
    require_norms(model, "conversion to instance")

    def make(path: str, layer: nn.Module) -> nn.Module:
        affine = getattr(layer, "weight", None) is not None
        return AnyInstanceNorm(channels_of(layer), eps=getattr(layer, "eps", None) or 1e-5, affine=affine)

    return replace_norms(model, make)
