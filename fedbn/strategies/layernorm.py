"""LayerNorm in place of BN (Ba, Kiros, Hinton, 2016; in FL: Du et al., 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.strategies.base import StatelessLayer


@dataclass(frozen=True)
class LayerNorm(StatelessLayer):
    """Normalize each sample over all channels and positions (GroupNorm with one group).

    https://arxiv.org/abs/1607.06450, https://arxiv.org/abs/2210.03277

    >>> from torch import nn as torch_nn
    >>> LayerNorm().prepare_model(torch_nn.Sequential(torch_nn.Linear(3, 4), torch_nn.BatchNorm1d(4)))[1].num_groups
    1
    """

    name = "layernorm"
    title = "LayerNorm"
    aliases = ("ln", "layer")
    about = "LayerNorm instead of BN"
    source = "Ba et al. 2016"
    kind = "layer"
