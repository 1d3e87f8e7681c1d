r"""Weight normalization (Salimans, Kingma, NeurIPS 2016, https://arxiv.org/abs/1602.07868).

The weights of each unit are split into a length and a direction, :math:`w = g\,v/\lVert v\rVert_2`. No statistics of
data are used, except those of one initial batch in `initialize`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from fedbn.nn.conversion import drop_norms, weighted_layers
from fedbn.nn.plain import fixed_weight


def convert(model: nn.Module) -> nn.Module:
    """Apply weight normalization to every linear layer and convolution and remove the normalization layers.

    Length and direction start at those of the weights, so the function of each layer does not change. This is PyTorch's
    parametrization: ``weight`` becomes ``parametrizations.weight.original0`` (g) and ``original1`` (v). Transposed
    convolutions are not changed. Other parametrizations of the weights are replaced by their values.

    >>> sorted(dict(convert(nn.Sequential(nn.Linear(3, 4, bias=False))).named_parameters()))
    ['0.parametrizations.weight.original0', '0.parametrizations.weight.original1']
    """
    for layer in weighted_layers(drop_norms(model)).values():
        weight_norm(fixed_weight(layer))
    return model


@torch.no_grad()
def initialize(model: nn.Module, x: Tensor) -> None:
    r"""Data-dependent initialization, in place: on ``x`` each unit gets mean zero and variance one.

    Section 3 of the paper: :math:`g\leftarrow g/\sigma[t]`, :math:`b\leftarrow (b-\mu[t])/\sigma[t]`, layer by layer in
    forward order, with the moments of the pre-activations :math:`t` over rows and positions. A layer that runs more
    than once is initialized in its first run. A layer without a bias keeps its mean.

    Args:
        model: converted to weight normalization.
        x: rows ``[N, ...]``. Units are the last axis of a linear layer's output, and axis 1 of a convolution's.

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
        units = out.dim() - 1 if isinstance(layer, nn.Linear) else 1
        var, mean = torch.var_mean(out, [axis for axis in range(out.dim()) if axis != units], correction=0)
        shape = [-1 if axis == units else 1 for axis in range(out.dim())]
        length = layer.parametrizations.weight.original0
        # A unit that is constant on x cannot be scaled to variance one.
        scale = torch.where(var > 1e-12, var, 1.0).rsqrt()
        length.mul_(scale.view(-1, *[1] * (length.dim() - 1)))
        if layer.bias is None:
            return out * scale.view(shape)
        layer.bias.sub_(mean).mul_(scale)
        return (out - mean.view(shape)) * scale.view(shape)

    handles = [layer.register_forward_hook(hook) for layer in weighted_layers(model).values()]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
