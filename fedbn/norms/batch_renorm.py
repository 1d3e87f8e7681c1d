r"""Batch Renormalization (Ioffe, NeurIPS 2017, https://arxiv.org/abs/1702.03275).

Batch statistics are corrected towards the running ones by a scale and a shift that gradients do not see:

.. math:: \hat x = \frac{x-\mu_B}{\sigma_B} r + d,\quad
    r = \mathrm{clip}\Bigl(\frac{\sigma_B}{\sigma}, \frac1{r_{max}}, r_{max}\Bigr),\quad
    d = \mathrm{clip}\Bigl(\frac{\mu_B-\mu}{\sigma}, -d_{max}, d_{max}\Bigr).

:math:`\sigma = \sqrt{v + \epsilon}` everywhere, and it is :math:`\sigma` that is averaged over batches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.nn.conversion import exchange
from fedbn.norms.statnorm import along, batch_statistics, normalize


class BatchRenorm(AnyBatchNorm):
    """Batch Renormalization of ``[N, C, *positions]``; evaluation is BN's.

    Batches of one are possible. The limits open linearly while the layer counts its batches: until ``start`` it is
    BN, from ``r_full`` and ``d_full`` on they are open. The defaults are the paper's, for ImageNet.

    Args:
        num_features: channels C.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics.
        affine: whether there are a scale and a shift.
        r_max: limit of the scale in the end, at least 1.
        d_max: limit of the shift in the end, at least 0.
        start: batches until the limits begin to open.
        r_full: batches until the limit of the scale is open.
        d_full: batches until the limit of the shift is.

    >>> layer = BatchRenorm(1, eps=0.0, r_max=float("inf"), d_max=float("inf"), start=0, r_full=0, d_full=0)
    >>> layer(torch.tensor([[0.0], [2.0]])).flatten().tolist()  # running mean 0, variance 1
    [0.0, 2.0]
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.01,
        affine: bool = True,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        start: int = 5_000,
        r_full: int = 40_000,
        d_full: int = 25_000,
    ) -> None:
        if r_max < 1 or d_max < 0:
            raise UserError(f"batch renormalization needs r_max >= 1 and d_max >= 0, not {r_max} and {d_max}")
        super().__init__(num_features, eps, momentum, affine)
        self.r_max, self.d_max, self.start, self.r_full, self.d_full = r_max, d_max, start, r_full, d_full
        self.weight_of_batch = momentum

    def limits(self, step: int) -> tuple[float, float]:
        """(r_max, d_max) after ``step`` batches.

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
        r_max, d_max = self.limits(int(self.num_batches_tracked))
        r = (sigma / running).clamp(1 / r_max, r_max)
        d = ((mean - self.running_mean) / running).clamp(-d_max, d_max)
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean), self.weight_of_batch)
        self.running_var.copy_(running.lerp(sigma.to(running), self.weight_of_batch) ** 2 - self.eps)
        out = normalize(input, mean, var, self.eps) * along(r, input).to(input) + along(d, input).to(input)
        return out if self.weight is None else out * along(self.weight, input) + along(self.bias, input)


def _ramp(step: int, start: int, full: int) -> float:
    """0 before ``start``, 1 from ``full`` on, linear between."""
    if step >= full:
        return 1.0
    return max(0.0, (step - start) / (full - start))


def convert(
    model: nn.Module,
    *,
    momentum: float = 0.01,
    r_max: float = 3.0,
    d_max: float = 5.0,
    start: int = 5_000,
    r_full: int = 40_000,
    d_full: int = 25_000,
) -> nn.Module:
    """Batch Renormalization for every normalization layer.

    >>> type(convert(nn.Sequential(nn.BatchNorm1d(4)))[0]).__name__
    'BatchRenorm'
    """
    return exchange(
        model,
        BatchRenorm,
        "batch-renorm",
        momentum=momentum,
        r_max=r_max,
        d_max=d_max,
        start=start,
        r_full=r_full,
        d_full=d_full,
    )
