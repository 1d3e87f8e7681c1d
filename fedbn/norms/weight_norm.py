r"""Weight normalization (Salimans, Kingma, NeurIPS 2016, https://arxiv.org/abs/1602.07868).

Each unit's weights are a length and a direction, :math:`w = g\,v/\lVert v\rVert_2`; no statistics of data, but
for those of one batch at the start: `initialize`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from fedbn.nn.conversion import drop_norms, weighted_layers


def convert(model: nn.Module) -> nn.Module:
    """Weight normalization of every linear layer and convolution; normalization layers are taken out.

    Length and direction start at those of the weights, so no layer's function changes. PyTorch's parametrisation:
    ``weight`` becomes ``parametrizations.weight.original0`` (g) and ``original1`` (v). Transposed convolutions are left
    alone.

    >>> sorted(dict(convert(nn.Sequential(nn.Linear(3, 4, bias=False))).named_parameters()))
    ['0.parametrizations.weight.original0', '0.parametrizations.weight.original1']
    """
    for layer in weighted_layers(drop_norms(model)).values():
        weight_norm(layer)
    return model


@torch.no_grad()
def initialize(model: nn.Module, x: Tensor) -> None:
    r"""Data-dependent start (section 3 of the paper), in place: on ``x`` each unit has mean zero and variance one.

    :math:`g\leftarrow g/\sigma[t]`, :math:`b\leftarrow (b-\mu[t])/\sigma[t]`, layer after layer in the order in which
    they run, with the moments of the pre-activations :math:`t` over rows and positions. A layer that runs more than
    once is set by its first run; one without a bias keeps its mean.

    Args:
        model: converted to weight normalization.
        x: rows ``[N, ...]``.

    >>> net = convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    >>> x = torch.randn(50, 3)
    >>> initialize(net, x)
    >>> torch.allclose(net(x).std(0, correction=0), torch.ones(4), atol=1e-3)
    True
    """
    done: set[nn.Module] = set()

    def hook(layer: Any, _: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        if layer in done:
            return None
        done.add(layer)
        var, mean = torch.var_mean(out, [0, *range(2, out.dim())], correction=0)
        length = layer.parametrizations.weight.original0
        # A unit that is constant on x has no variance to bring to one.
        scale = torch.where(var > 1e-12, var, 1.0).rsqrt()
        length.mul_(scale.view(-1, *[1] * (length.dim() - 1)))
        if layer.bias is None:
            return out * scale.view(-1, *[1] * (out.dim() - 2))
        layer.bias.sub_(mean).mul_(scale)
        return (out - mean.view(-1, *[1] * (out.dim() - 2))) * scale.view(-1, *[1] * (out.dim() - 2))

    handles = [layer.register_forward_hook(hook) for layer in weighted_layers(model).values()]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
