r"""Hybrid BN: a learnt mixture of global and batch statistics.

Chen, Xu, Wu, Kittler, ICML 2025, https://arxiv.org/abs/2505.21877
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fedbn.norms.statnorm import along, widened
from fedbn.statistics.moments import Moments


class HybridNorm(_BatchNorm):
    r"""Training: :math:`\mu=(1-a)\mu_G+a\mu_b`, :math:`\sigma^2` likewise; evaluation: the global ones.

    :math:`a=\mathrm{sigmoid}(f)`. Gradients flow through the batch statistics and ``gate`` (:math:`f`, one a channel,
    at first 0). The running statistics are the global ones :math:`\mu_G, \sigma^2_G`; training does not move them.

    >>> layer = HybridNorm(1, affine=False); x = torch.tensor([[0.0], [4.0]])
    >>> [round(v, 3) for v in layer(x).flatten().tolist()]  # mean (0 + 2) / 2, variance (1 + 4) / 2
    [-0.632, 1.897]
    """

    gates = ("gate",)

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(num_features, eps=eps, affine=affine)
        self.gate = nn.Parameter(torch.zeros(num_features))
        self.measured: Moments | None = None
        self.measuring = False

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations ``[N, C, *positions]``."""
        global_mean, global_var = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        if not (self.training or self.measuring):
            return F.batch_norm(input, global_mean, global_var, self.weight, self.bias, False, 0.0, self.eps)
        if self.num_batches_tracked is not None and self.training:
            self.num_batches_tracked.add_(1)
        input = widened(input)
        axes = [0, *range(2, input.dim())]
        var, mean = torch.var_mean(input, axes, correction=0)
        a = torch.sigmoid(self.gate)
        mean, var = torch.lerp(global_mean, mean, a), torch.lerp(global_var, var, a)
        if self.measuring:
            # As published, a sample counts once, however many positions it has.
            seen = Moments.from_variance(float(len(input)), mean.detach().cpu(), var.detach().cpu())
            self.measured = seen if self.measured is None else self.measured.merge(seen)
        normal = (input - along(mean, input)) * along(torch.rsqrt(var + self.eps), input)
        if self.weight is None:
            return normal
        return torch.addcmul(along(self.bias, input), normal, along(self.weight, input))

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of position axes."""


def hybrid_layers(model: nn.Module) -> dict[str, HybridNorm]:
    """Path -> layer."""
    return {path: m for path, m in model.named_modules() if isinstance(m, HybridNorm)}


@contextmanager
def measuring(model: nn.Module) -> Iterator[dict[str, HybridNorm]]:
    """Within, evaluation-mode passes use and record hybrid statistics; dropout stays off."""
    found = hybrid_layers(model)
    model.eval()
    for layer in found.values():
        layer.measuring, layer.measured = True, None
    try:
        yield found
    finally:
        for layer in found.values():
            layer.measuring = False
