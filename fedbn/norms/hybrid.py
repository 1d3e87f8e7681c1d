r"""Hybrid BN: a learned mixture of global and batch statistics.

Chen, Xu, Wu, Kittler, ICML 2025, https://arxiv.org/abs/2505.21877
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedbn.nn.batchnorm import AnyBatchNorm, along
from fedbn.norms.statnorm import widened
from fedbn.statistics.moments import Moments


class HybridNorm(AnyBatchNorm):
    r"""BN that mixes global and batch statistics in training and uses the global ones in evaluation.

    The mixture is :math:`\mu=(1-a)\mu_G+a\mu_b` with :math:`a=\mathrm{sigmoid}(f)`, and likewise for :math:`\sigma^2`.
    Gradients flow through the batch statistics and ``gate`` (:math:`f`, one value per channel, initially 0). The
    running statistics are the global ones :math:`\mu_G, \sigma^2_G`; training does not change them.

    >>> layer = HybridNorm(1, affine=False); x = torch.tensor([[0.0], [4.0]])
    >>> [round(v, 3) for v in layer(x).flatten().tolist()]  # mean (0 + 2) / 2, variance (1 + 4) / 2
    [-0.632, 1.897]
    """

    channelwise = True
    gates = ("gate",)

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(num_features, eps=eps, affine=affine)
        self.gate = nn.Parameter(torch.zeros(num_features))
        self.measured: Moments | None = None
        self.measuring = False

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations ``[N, C, *positions]``."""
        global_mean, global_var = self.running_mean, self.running_var
        if not (self.training or self.measuring):
            return F.batch_norm(input, global_mean, global_var, self.weight, self.bias, False, 0.0, self.eps)
        if self.training:
            self.num_batches_tracked.add_(1)
        input = widened(input)
        axes = [0, *range(2, input.dim())]
        var, mean = torch.var_mean(input, axes, correction=0)
        a = torch.sigmoid(self.gate)
        mean, var = torch.lerp(global_mean, mean, a), torch.lerp(global_var, var, a)
        if self.measuring:
            # As in the paper, a sample counts once, regardless of its number of positions.
            batch = Moments.from_variance(float(len(input)), mean.detach().cpu(), var.detach().cpu())
            self.measured = batch if self.measured is None else self.measured.merge(batch)
        normalized = (input - along(mean, input)) * along(torch.rsqrt(var + self.eps), input)
        if self.weight is None:
            return normalized
        return torch.addcmul(along(self.bias, input), normalized, along(self.weight, input))


def hybrid_layers(model: nn.Module) -> dict[str, HybridNorm]:
    """Layers of this kind by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, HybridNorm)}


@contextmanager
def measuring(model: nn.Module) -> Iterator[dict[str, HybridNorm]]:
    """Use and record hybrid statistics in evaluation-mode passes inside the ``with`` block; dropout stays off."""
    layers = hybrid_layers(model)
    model.eval()
    for layer in layers.values():
        layer.measuring, layer.measured = True, None
    try:
        yield layers
    finally:
        for layer in layers.values():
            layer.measuring = False
