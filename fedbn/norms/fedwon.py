r"""FedWon: federated learning without normalization (Zhuang, Lyu, ICLR 2024, https://arxiv.org/abs/2306.05879).

Convolutions have scaled standardized weights with a learned gain for each filter,

.. math:: \hat W_i = \gamma\, g_i\, \frac{W_i-\bar W_i}{\sqrt{\max(\mathrm{fan_{in}}\mathrm{Var}(W_i), \epsilon)}},

and gradients are clipped relative to the norm of the weights,
:math:`G_i \leftarrow \lambda \lVert W_i\rVert/\lVert G_i\rVert\; G_i` where
:math:`\lVert G_i\rVert > \lambda\max(\lVert W_i\rVert, \epsilon)`. Nothing depends on the batch. This is a
reconstruction from secondary sources. With :math:`\gamma = \sqrt{2/(1-1/\pi)}` a ReLU preserves the variance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from fedbn.nn.conversion import drop_norms
from fedbn.norms.weight_standardization import convolutions

GAMMA_RELU = math.sqrt(2 / (1 - 1 / math.pi))
"""Inverse standard deviation of ReLU(z) for a standard normal z."""


class ScaledWeightStandardization(nn.Module):
    """Parametrization from weights ``[out, in, *kernel]`` to standardized weights; the gain starts at one.

    >>> ScaledWeightStandardization(1, gamma=1.0)(torch.tensor([[[1.0, 3.0]]])).norm().round(decimals=3).item()
    1.0
    """

    rowwise = True

    def __init__(self, out: int, *, gamma: float = GAMMA_RELU, eps: float = 1e-4) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(out))
        self.gamma, self.eps = gamma, eps

    def forward(self, weight: Tensor) -> Tensor:
        """Standardized and scaled weights."""
        rows = weight.flatten(1)
        var, mean = torch.var_mean(rows, 1, correction=0)
        scale = self.gamma * self.gain * torch.rsqrt((var * rows.shape[1]).clamp_min(self.eps))
        return (scale[:, None] * (rows - mean[:, None])).view_as(weight)


@torch.no_grad()
def clip_adaptively(parameters: Iterable[Tensor], lam: float, eps: float = 1e-3) -> None:
    """Adaptive gradient clipping per unit (axis 0) of weights ``[out, in, ...]``; vectors are not clipped.

    >>> w = torch.ones(1, 4, requires_grad=True); w.grad = torch.full((1, 4), 5.0); clip_adaptively([w], 0.1)
    >>> round(float(w.grad.norm() / w.detach().norm()), 4)
    0.1
    """
    for parameter in parameters:
        if parameter.grad is None or parameter.dim() < 2:
            continue
        limit = lam * parameter.flatten(1).norm(dim=1).clamp_min(eps)
        norm = parameter.grad.flatten(1).norm(dim=1)
        factor = (limit / norm).clamp_max(1.0)  # infinite before the clamp where the gradient is zero
        parameter.grad.mul_(factor.view(-1, *[1] * (parameter.dim() - 1)))


def convert(model: nn.Module, *, gamma: float = GAMMA_RELU) -> nn.Module:
    """Apply scaled weight standardization to every convolution and remove the normalization layers.

    Args:
        model: changed in place; ``weight`` becomes ``parametrizations.weight.original``.
        gamma: constant that compensates for the activation; the default is for ReLU.

    Raises:
        UserError: the model has no convolution.

    >>> net = convert(nn.Sequential(nn.Conv1d(3, 4, 2, bias=False), nn.BatchNorm1d(4), nn.Conv1d(4, 2, 1)))
    >>> net[0].bias.shape, net[1]
    (torch.Size([4]), Identity())
    """
    for layer in convolutions(drop_norms(model), "fedwon"):
        scaled = ScaledWeightStandardization(len(layer.weight), gamma=gamma)
        register_parametrization(layer, "weight", scaled.to(layer.weight.device, layer.weight.dtype))
    return model
