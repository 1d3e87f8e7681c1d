"""Batch normalization (Ioffe, Szegedy, ICML 2015, https://arxiv.org/abs/1502.03167)."""

from __future__ import annotations

from torch import nn

from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.nn.conversion import exchange


def convert(model: nn.Module) -> nn.Module:
    """BN for every normalization layer; a layer that kept the same statistics hands them over.

    >>> type(convert(nn.Sequential(nn.GroupNorm(2, 4)))[0]).__name__
    'AnyBatchNorm'
    """
    return exchange(model, AnyBatchNorm, "batch")
