"""Features of fixed norm before the classifier, without other normalization (Zhang et al., TMLR 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.strategies.base import StatelessNorm


@dataclass(frozen=True)
class FeatureNorm(StatelessNorm):
    """Only feature normalization, the part of LayerNorm that helps under label skew. https://arxiv.org/abs/2308.09565

    >>> from torch import nn as torch_nn
    >>> net = torch_nn.Sequential(torch_nn.Linear(3, 4), torch_nn.BatchNorm1d(4), torch_nn.Linear(4, 2))
    >>> type(FeatureNorm().prepare_model(net)[2]).__name__
    'FeatureNormLinear'
    """

    name = "feature-norm"
    title = "FedFN (feature norm)"
    about = "fixed norm of the features instead of BN (FedFN)"
    source = "Zhang et al. 2024"
    kind = "feature-norm"
