"""InstanceNorm in place of BN (Ulyanov, Vedaldi, Lempitsky, 2016)."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.strategies.base import StatelessLayer


@dataclass(frozen=True)
class InstanceNorm(StatelessLayer):
    """Normalize each channel of each sample over its positions. https://arxiv.org/abs/1607.08022

    Models with normalization after a linear layer are refused, because its output has no positions.

    >>> from torch import nn as torch_nn
    >>> net = torch_nn.Sequential(torch_nn.Conv1d(3, 4, 1), torch_nn.BatchNorm1d(4))
    >>> type(InstanceNorm().prepare_model(net)[1]).__name__
    'AnyInstanceNorm'
    """

    name = "instancenorm"
    title = "InstanceNorm"
    aliases = ("in", "instance")
    about = "InstanceNorm instead of BN (layers with positions only)"
    source = "Ulyanov et al. 2016"
    kind = "instance"
