r"""Weight normalisation (Salimans, Kingma, NeurIPS 2016, https://arxiv.org/abs/1602.07868).

Each unit's weights are a length and a direction, :math:`w = g\,v/\lVert v\rVert_2`; no statistics of data.
"""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from fedbn.layers import drop_norms, weighted_layers


def convert(model: nn.Module) -> nn.Module:
    """Weight normalisation of every linear layer and convolution; normalisation layers are taken out.

    Length and direction start at those of the weights, so no layer's function changes. PyTorch's parametrisation:
    ``weight`` becomes ``parametrizations.weight.original0`` (g) and ``original1`` (v). Transposed convolutions are left
    alone.

    >>> sorted(dict(convert(nn.Sequential(nn.Linear(3, 4, bias=False))).named_parameters()))
    ['0.parametrizations.weight.original0', '0.parametrizations.weight.original1']
    """
    for layer in weighted_layers(drop_norms(model)).values():
        weight_norm(layer)
    return model
