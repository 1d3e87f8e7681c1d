r"""BN that normalizes by shared running statistics in training too, while measuring its batches.

Guerraoui, Pinot, Rizk, Stephan, Taiani, 2024 (FBN), https://arxiv.org/abs/2405.14670
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.norms.statnorm import batch_statistics


class SharedStatisticsNorm(AnyBatchNorm):
    """Normalizes by the constants ``running_mean`` and ``running_var`` in training and in evaluation.

    In training the mean and biased variance of each batch are accumulated in buffers that do not belong to the state;
    `publish` writes their averages into the running statistics, which are sent to the server.

    >>> layer = SharedStatisticsNorm(1); x = torch.tensor([[0.0], [4.0]])
    >>> [round(v, 3) for v in layer(x).flatten().tolist()]
    [0.0, 4.0]
    >>> layer.publish(); layer.running_mean.item(), layer.running_var.item()
    (2.0, 4.0)
    """

    channelwise = True
    sum_mean: Tensor
    sum_var: Tensor
    batches: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(num_features, eps=eps, affine=affine)
        self.register_buffer("sum_mean", torch.zeros(num_features), persistent=False)
        self.register_buffer("sum_var", torch.zeros(num_features), persistent=False)
        self.register_buffer("batches", torch.zeros(()), persistent=False)

    def reset_sums(self) -> None:
        """Discard the accumulated statistics."""
        for total in (self.sum_mean, self.sum_var, self.batches):
            total.zero_()

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations ``[N, C, *positions]``."""
        if self.training:
            mean, var, _ = batch_statistics(input.detach())
            self.sum_mean += mean
            self.sum_var += var
            self.batches += 1
            self.num_batches_tracked.add_(1)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def publish(self) -> None:
        """Replace the running statistics by the averages over the batches since `reset_sums`."""
        if self.batches:
            self.running_mean.copy_(self.sum_mean / self.batches)
            self.running_var.copy_(self.sum_var / self.batches)


def shared_statistics_layers(model: nn.Module) -> list[SharedStatisticsNorm]:
    """Layers of this kind in a model."""
    return [m for m in model.modules() if isinstance(m, SharedStatisticsNorm)]
