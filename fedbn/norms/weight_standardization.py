r"""Weight standardization (Qiao, Wang, Liu, Shen, Yuille, 2019, https://arxiv.org/abs/1903.10520).

Each filter of a convolution is standardized over its inputs, :math:`\hat W_i = (W_i - \bar W_i)/(\mathrm{sd}(W_i) +
10^{-5})`, with the unbiased standard deviation as in the authors' code. It is meant to precede normalization layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from fedbn.errors import UserError
from fedbn.nn.conversion import drop_norms, weighted_layers
from fedbn.nn.plain import fixed_weight


class WeightStandardization(nn.Module):
    """Parametrization from weights ``[out, in, *kernel]`` to standardized weights of the same shape.

    >>> WeightStandardization()(torch.tensor([[[1.0, 3.0]]])).round(decimals=4)
    tensor([[[-0.7071,  0.7071]]])
    """

    rowwise = True

    def forward(self, weight: Tensor) -> Tensor:
        """Standardized weights."""
        std, mean = torch.std_mean(weight.flatten(1), 1)
        shape = (-1, *[1] * (weight.dim() - 1))
        return (weight - mean.view(shape)) / (std.view(shape) + 1e-5)


def convolutions(model: nn.Module, what: str) -> list[nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """The convolutions of ``model`` whose filters have more than one weight, without other parametrizations.

    Raises:
        UserError: the model has none.
    """
    weighted = weighted_layers(model).values()
    found = [m for m in weighted if not isinstance(m, nn.Linear) and m.weight[0].numel() > 1]
    if not found:
        raise UserError(
            f"{what} works on convolutions and {type(model).__name__} has none with more than one weight per filter: "
            "choose a convolutional model, or weight-norm"
        )
    for layer in found:
        fixed_weight(layer)
    return found


def convert(model: nn.Module, *, keep_norms: bool = False) -> nn.Module:
    """Apply weight standardization to every convolution; ``weight`` becomes ``parametrizations.weight.original``.

    Args:
        model: changed in place.
        keep_norms: keep the normalization layers, as in the paper.

    Raises:
        UserError: the model has no convolution.

    >>> net = convert(nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4)))
    >>> bool(net[0].weight.mean((1, 2)).abs().max() < 1e-6), net[1]
    (True, Identity())
    """
    for layer in convolutions(model if keep_norms else drop_norms(model), "weight standardization"):
        register_parametrization(layer, "weight", WeightStandardization())
    return model
