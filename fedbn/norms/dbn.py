r"""Diminishing batch normalization (Ma, Klabjan, 2017, https://arxiv.org/abs/1705.08011).

The statistics :math:`\lambda = (\mu, \sigma)` are a moving average whose weight may diminish,

.. math:: \lambda^{(m)} = \alpha^{(m)} (\mu_B, \sigma_B) + (1-\alpha^{(m)})\,\lambda^{(m-1)},\qquad \alpha^{(1)} = 1,

and gradients treat them as constants. The paper averages standard deviations, adds :math:`\epsilon` to them, and puts
the layer after the activation. It does not state whether training normalizes by :math:`\lambda` or by the batch; both
are available.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedbn.errors import UserError
from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.nn.conversion import convert_norms
from fedbn.norms.statnorm import batch_statistics, normalize

Mode = Literal["algorithm1", "inference"]
Step = Literal["iter", "epoch"]
Stat = Literal["std", "var"]


def schedule(text: str) -> Callable[[float], float]:
    """The weight alpha after m steps: a number (constant), ``1/m`` or ``1/m^h``; always 1 at the first step.

    >>> [schedule(t)(2) for t in ("0.25", "1/m", "1/m^2")], schedule("0.25")(1)
    ([0.25, 0.5, 0.25], 1.0)

    Raises:
        UserError: unknown schedule, a constant outside [0, 1], or a power that is not positive.
    """
    head, _, power = text.partition("^")
    try:
        h = float(power or 1) if head == "1/m" else None
        a = float(text) if h is None else 0.0
    except ValueError:
        a, h = -1.0, None
    if h is not None and h > 0:
        return lambda m: float(max(m, 1.0)) ** -h
    if h is not None or not 0 <= a <= 1:
        raise UserError(f"unknown schedule {text!r}: write a number from 0 to 1, 1/m, or 1/m^h with h above 0")
    return lambda m: 1.0 if m <= 1 else a


class DiminishingBN(AnyBatchNorm):
    """Diminishing BN of ``[N, C, *positions]``.

    ``running_var`` holds the square of the averaged standard deviation, or the averaged variance with ``stat="var"``.

    Args:
        num_features: channels C.
        eps: added to the standard deviation as in the paper, or to the variance with ``stat="var"``.
        affine: whether the layer has a scale and a shift.
        alpha: see `schedule`.
        mode: ``algorithm1``: training also normalizes by the moving average, after updating it, as in the published
            algorithm; ``inference``: training is plain BN, and the average is used in evaluation only.
        step: what m counts: batches (``iter``), or calls of `next_epoch` (``epoch``).
        stat: averaged statistic.
        unbiased: average the unbiased variance, as PyTorch does.

    >>> layer = DiminishingBN(1, alpha="1/m")
    >>> for x in (1.0, 3.0, 8.0): _ = layer(torch.tensor([[x], [x + 2.0]]))
    >>> round(float(layer.running_mean), 5)
    5.0
    """

    channelwise = True
    steps: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        alpha: str = "0.25",
        mode: Mode = "algorithm1",
        step: Step = "iter",
        stat: Stat = "std",
        unbiased: bool = False,
    ) -> None:
        super().__init__(num_features, eps, affine=affine)
        self.alpha, self.mode, self.step, self.stat, self.unbiased = schedule(alpha), mode, step, stat, unbiased
        # A float buffer, which is sent with the statistics. Counters are not sent: late clients would restart at 1.
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations, of the input's shape."""
        self._check_input_dim(input)
        if self.training:
            self.num_batches_tracked += 1
            if self.step == "iter":
                self.steps += 1
            mean, var, n = batch_statistics(input.detach())
            self._update(mean, var * n / (n - 1) if self.unbiased else var)
            if self.mode == "inference":
                return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)
        var, eps = self.running_var, self.eps
        if self.stat == "std":
            var, eps = (var.sqrt() + eps) ** 2, 0.0
        out = normalize(input, self.running_mean, var, eps, gradient_map=None)
        return self.scale_and_shift(out)

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor) -> None:
        alpha = self.per_channel(self.alpha, self.steps)
        mean, var = mean.to(self.running_mean), var.to(self.running_var)
        self.running_mean.lerp_(mean, alpha)
        self.running_var.copy_(diminished(self.running_var, var, alpha, self.stat))


def diminished(old: Tensor, new: Tensor, alpha: float | Tensor, stat: Stat) -> Tensor:
    """Move the variance ``old`` towards ``new`` by a weight ``alpha``, on the scale given by ``stat``.

    >>> float(diminished(torch.tensor(1.0), torch.tensor(9.0), 0.5, "std"))
    4.0
    """
    return old.lerp(new, alpha) if stat == "var" else old.sqrt().lerp(new.sqrt(), alpha) ** 2


def next_epoch(model: nn.Module) -> None:
    """Count an epoch in each `DiminishingBN` layer with ``step="epoch"``; call it before every epoch."""
    for layer in model.modules():
        if isinstance(layer, DiminishingBN) and layer.step == "epoch":
            layer.steps += 1


convert = partial(convert_norms, cls=DiminishingBN, kind="dbn")
"""Replace BN by diminishing BN, in the same place.

The paper puts it after the activation. Options: ``alpha``, ``mode``, ``step``, ``stat``, ``unbiased``.
"""
