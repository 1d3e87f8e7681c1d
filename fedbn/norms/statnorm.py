r"""StatNorm: normalize by any statistics, with any statistic gradients.

Training-time methods differ in two respects: which :math:`(\mu, v)` normalizes, and which gradient of the loss with
respect to them is propagated back. With :math:`\hat x = (x-\mu)/\sqrt{v+\epsilon}`, :math:`s = 1/\sqrt{v+\epsilon}` and
:math:`g = \partial L/\partial\hat x`, with sums over the :math:`n` values of a channel,

.. math::
    g_\mu = -s\sum g,\qquad g_v = -\tfrac12 s^3 \sum g\,(x-\mu),\qquad
    \frac{\partial L}{\partial x} = g s + \frac{G_\mu}{n} + \frac{2 (x-\mu)\, G_v}{n},

where :math:`(G_\mu, G_v)` are the statistic gradients to use: :math:`(g_\mu, g_v)` itself (BN), zero (constant
statistics: DBN, frozen BN), or the result of a callable (average over clients: FedTAN; average over time: full
normalization).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedbn.nn.batchnorm import along

GradientMap = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Maps the statistic gradients (g_mu, g_v) of the batch, ``[C]`` each, to those that are propagated back."""


def own_gradients(g_mu: Tensor, g_v: Tensor) -> tuple[Tensor, Tensor]:
    """Use the batch's own statistic gradients, as in BN."""
    return g_mu, g_v


def batch_statistics(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance (``[C]`` each) and count (0-d) of ``x`` ``[N, C, *positions]``, at least in float32.

    Args:
        x: activations.
        mask: ``[N, *positions]``, true where a value counts.

    >>> mean, var, n = batch_statistics(torch.tensor([[0.0], [2.0], [7.0]]), torch.tensor([True, True, False]))
    >>> float(mean), float(var), int(n)
    (1.0, 1.0, 2)
    """
    rows = widened(x).transpose(0, 1).flatten(1)
    if mask is not None:
        rows = rows[:, mask.flatten()]
    var, mean = torch.var_mean(rows, 1, correction=0)
    return mean, var, torch.tensor(rows.shape[1], device=x.device)


def blend(
    mean: Tensor, var: Tensor, other_mean: Tensor, other_var: Tensor, a: float | Tensor, b: float | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Move statistics towards others: :math:`(1-a)\mu + a m` and :math:`(1-b)v + b w + b(1-b)(m-\mu)^2`.

    With ``b = a`` (None) these are the exact moments of the mixture. Second moments are averaged without being
    computed, and the variance cannot become negative.

    >>> mean, var = blend(torch.zeros(1), torch.ones(1), torch.full((1,), 2.0), torch.ones(1), 0.5)
    >>> float(mean), float(var)
    (1.0, 2.0)
    """
    b = a if b is None else b
    delta = other_mean - mean
    return mean + a * delta, (1 - b) * var + b * other_var + b * (1 - b) * delta**2


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float = 1e-5,
    *,
    gradient_map: GradientMap | None = own_gradients,
    mask: Tensor | None = None,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps)`` with the statistic gradients given by ``gradient_map``.

    The batch's own gradients are correct when ``var`` is the mean of squares about ``mean``. Double backward is not
    supported.

    Args:
        x: ``[N, C, *positions]``; half precision is normalized in float32 and returned in half precision.
        mean: ``[C]``, a constant for autograd.
        var: ``[C]``, a constant for autograd.
        eps: added to the variance.
        gradient_map: called once in the backward pass; None: the statistics do not depend on ``x``.
        mask: ``[N, *positions]``, true where a value counts; the output is 0 elsewhere.

    >>> x = torch.tensor([[0.0], [2.0]], requires_grad=True); mean, var, _ = batch_statistics(x.detach())
    >>> normalize(x, mean, var, 0.0).flatten().tolist()
    [-1.0, 1.0]
    >>> normalize(x, mean, var, 0.0)[1, 0].backward(); x.grad.flatten().tolist()
    [0.0, 0.0]
    >>> x.grad = None; normalize(x, mean, var, 0.0, gradient_map=None)[1, 0].backward(); x.grad.flatten().tolist()
    [0.0, 1.0]
    """
    return cast(Tensor, _StatNorm.apply(x, mean.detach(), var.detach(), eps, gradient_map, mask))  # type: ignore[no-untyped-call]


class _StatNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
        gradient_map: GradientMap | None,
        mask: Tensor | None,
    ) -> Tensor:
        wide = widened(x)
        mean = mean.to(wide.dtype)
        inv = torch.rsqrt(var.to(wide.dtype) + eps)
        ctx.save_for_backward(x, mean, inv, mask)
        ctx.gradient_map = gradient_map
        return _masked((wide - along(mean, x)) * along(inv, x), mask).to(x.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inv, mask = ctx.saved_tensors
        g = _masked(widened(grad), mask)
        gx = g * along(inv, x)
        if ctx.gradient_map is not None:
            centered = _masked(widened(x) - along(mean, x), mask)
            axes = [0, *range(2, x.dim())]
            g_mu = -inv * g.sum(axes)
            g_v = -0.5 * inv**3 * (g * centered).sum(axes)
            G_mu, G_v = ctx.gradient_map(g_mu, g_v)
            n = x.numel() // x.shape[1] if mask is None else mask.sum()
            gx = gx + _masked(along(G_mu / n, x) + along(2 * G_v / n, x) * centered, mask)
        return gx.to(x.dtype), None, None, None, None, None


def widened(x: Tensor) -> Tensor:
    """Convert half precision to float32, in which statistics are computed; keep other dtypes."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(~mask.unsqueeze(1), 0)
