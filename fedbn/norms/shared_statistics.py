r"""BN by shared running statistics in training too, measuring its batches on the side.

Guerraoui, Pinot, Rizk, Stephan, Taiani, 2024 (FBN), https://arxiv.org/abs/2405.14670
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fedbn.norms.statnorm import batch_statistics


class SharedStatisticsNorm(_BatchNorm):
    """Normalizes by ``running_mean`` and ``running_var``, constants, in training and in evaluation.

    In training each batch's mean and biased variance are accumulated; `publish` writes their averages into the
    running statistics, from where they travel to the server.

    >>> layer = SharedStatisticsNorm(1); x = torch.tensor([[0.0], [4.0]])
    >>> [round(v, 3) for v in layer(x).flatten().tolist()]
    [0.0, 4.0]
    >>> layer.publish(); layer.running_mean.item(), layer.running_var.item()
    (2.0, 4.0)
    """

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(num_features, eps=eps, affine=affine)
        self.begin()

    def begin(self) -> None:
        """Forget what was accumulated."""
        self._batches = 0
        self._mean = self._var = torch.zeros(())

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations ``[N, C, *positions]``."""
        if self.training:
            mean, var, _ = batch_statistics(input.detach())
            self._mean, self._var, self._batches = self._mean + mean, self._var + var, self._batches + 1
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def publish(self) -> None:
        """Replace the running statistics by the averages over the batches met since `begin`."""
        if self._batches:
            with torch.no_grad():
                self.running_mean.copy_(self._mean / self._batches)  # type: ignore[union-attr]
                self.running_var.copy_(self._var / self._batches)  # type: ignore[union-attr]

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of position axes."""


def layers(model: nn.Module) -> list[SharedStatisticsNorm]:
    """The model's layers of this kind."""
    return [m for m in model.modules() if isinstance(m, SharedStatisticsNorm)]
