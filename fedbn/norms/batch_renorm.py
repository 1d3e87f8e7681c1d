r"""Batch Renormalization (Ioffe, NeurIPS 2017, https://arxiv.org/abs/1702.03275).

Batch statistics are corrected towards the running ones by a scale and a shift without gradients:

.. math:: \hat x = \frac{x-\mu_B}{\sigma_B} r + d,\quad
    r = \mathrm{clip}\Bigl(\frac{\sigma_B}{\sigma}, \frac1{r_{max}}, r_{max}\Bigr),\quad
    d = \mathrm{clip}\Bigl(\frac{\mu_B-\mu}{\sigma}, -d_{max}, d_{max}\Bigr).

Here :math:`\sigma = \sqrt{v + \epsilon}`, and the running average is over :math:`\sigma`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.nn.batchnorm import AnyBatchNorm, along
from fedbn.nn.conversion import convert_norms
from fedbn.norms.statnorm import batch_statistics, normalize


class BatchRenorm(AnyBatchNorm):
    """Batch Renormalization of ``[N, C, *positions]`` in training, plain BN in evaluation.

    Batches of size one are possible. The layer is BN for the first ``start`` batches. Then the limits grow linearly to
    ``r_max`` and ``d_max``, which they reach after ``r_full`` and ``d_full`` batches. The defaults are the paper's, for
    ImageNet.

    Args:
        num_features: channels C.
        momentum: weight of a batch in the running statistics.
        r_max: final limit of the scale, at least 1.
        d_max: final limit of the shift, at least 0.
        start: number of batches before the limits begin to grow.
        r_full: number of batches until the scale's limit is ``r_max``.
        d_full: number of batches until the shift's limit is ``d_max``.
        **kwargs: ``eps`` and ``affine`` as in `torch.nn.BatchNorm1d`.

    >>> layer = BatchRenorm(1, eps=0.0, r_max=float("inf"), d_max=float("inf"), start=0, r_full=0, d_full=0)
    >>> layer(torch.tensor([[0.0], [2.0]])).flatten().tolist()  # running mean 0, variance 1
    [0.0, 2.0]
    """

    channelwise = True

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float = 0.01,
        r_max: float = 3.0,
        d_max: float = 5.0,
        start: int = 5_000,
        r_full: int = 40_000,
        d_full: int = 25_000,
        **kwargs: Any,
    ) -> None:
        if r_max < 1 or d_max < 0:
            raise UserError(f"batch renormalization needs r_max >= 1 and d_max >= 0, not {r_max} and {d_max}")
        super().__init__(num_features, momentum=momentum, **kwargs)
        self.r_max, self.d_max, self.start, self.r_full, self.d_full = r_max, d_max, start, r_full, d_full
        self.batch_weight = momentum

    def limits(self, step: int) -> tuple[float, float]:
        """Current limits (r_max, d_max) after ``step`` batches.

        >>> BatchRenorm(1).limits(22_500)
        (2.0, 4.375)
        """
        r = 1 + (self.r_max - 1) * _ramp(step, self.start, self.r_full) if self.r_max > 1 else 1.0
        d = self.d_max * _ramp(step, self.start, self.d_full) if self.d_max > 0 else 0.0
        return r, d

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations, of the input's shape."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        mean, var, _ = batch_statistics(input.detach())
        sigma, running = torch.sqrt(var + self.eps), torch.sqrt(self.running_var + self.eps)
        r_max: Any = self.per_channel(lambda step: self.limits(step)[0], self.num_batches_tracked)
        d_max: Any = self.per_channel(lambda step: self.limits(step)[1], self.num_batches_tracked)
        r = (sigma / running).clamp(1 / r_max, r_max)
        d = ((mean - self.running_mean) / running).clamp(-d_max, d_max)
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean), self.batch_weight)
        self.running_var.copy_(running.lerp(sigma.to(running), self.batch_weight) ** 2 - self.eps)
        out = normalize(input, mean, var, self.eps) * along(r, input).to(input) + along(d, input).to(input)
        return self.scale_and_shift(out)


def _ramp(step: int, start: int, full: int) -> float:
    """Linear ramp from 0 at ``start`` to 1 at ``full``."""
    if step >= full:
        return 1.0
    return max(0.0, (step - start) / (full - start))


convert = partial(convert_norms, cls=BatchRenorm, kind="batch-renorm", momentum=0.01)
"""Replace BN by Batch Renormalization.

Options: ``momentum``, ``r_max``, ``d_max``, ``start``, ``r_full``, ``d_full``.
"""
