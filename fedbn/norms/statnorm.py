r"""StatNorm: normalize by statistics from anywhere, with statistic gradients from anywhere.

Training-time methods differ in two answers: which :math:`(\mu, v)` normalizes, and which gradient of the loss with
respect to them flows back. With :math:`\hat x = (x-\mu)/\sqrt{v+\epsilon}`, :math:`s = 1/\sqrt{v+\epsilon}` and
:math:`g = \partial L/\partial\hat x`, sums over the :math:`n` values of a channel,

.. math::
    g_\mu = -s\sum g,\qquad g_v = -\tfrac12 s^3 \sum g\,(x-\mu),\qquad
    \frac{\partial L}{\partial x} = g s + \frac{G_\mu}{n} + \frac{2 (x-\mu)\, G_v}{n},

where :math:`(G_\mu, G_v)` are the statistic gradients to use: the own ones (BN), zero (statistics are constants: DBN,
frozen BN), or whatever a callable makes of the own ones (averages over clients: FedTAN; over time: full
normalization).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Exchange = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From the own statistic gradients (g_mu, g_v), ``[C]`` each, to those that flow back."""


def own(g_mu: Tensor, g_v: Tensor) -> tuple[Tensor, Tensor]:
    """The own statistic gradients, as in BN."""
    return g_mu, g_v


def along(values: Tensor, x: Tensor) -> Tensor:
    """``values`` ``[C]`` shaped to broadcast against ``x`` ``[N, C, *positions]``."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def batch_statistics(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance (``[C]`` each) and count (0-d) of ``x`` ``[N, C, *positions]``, in float32 at least.

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
    r"""Statistics moved towards others: :math:`(1-a)\mu + a m` and :math:`(1-b)v + b w + b(1-b)(m-\mu)^2`.

    With ``b = a`` (None) these are the exact moments of the mixture, so second moments are averaged without ever being
    formed, and the variance cannot become negative.

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
    exchange: Exchange | None = own,
    mask: Tensor | None = None,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps)`` with the statistic gradients that ``exchange`` chooses.

    The own gradients are right when ``var`` is a mean of squares about ``mean`` itself. No double backward.

    Args:
        x: ``[N, C, *positions]``; half precision is normalized in float32 and given back as it came.
        mean: ``[C]``, a constant for autograd.
        var: ``[C]``, a constant for autograd.
        eps: added to the variance.
        exchange: called once in the backward pass; None: the statistics do not depend on ``x``.
        mask: ``[N, *positions]``, true where a value counts; the output is 0 elsewhere.

    >>> x = torch.tensor([[0.0], [2.0]], requires_grad=True); mean, var, _ = batch_statistics(x.detach())
    >>> normalize(x, mean, var, 0.0).flatten().tolist()
    [-1.0, 1.0]
    >>> normalize(x, mean, var, 0.0)[1, 0].backward(); x.grad.flatten().tolist()
    [0.0, 0.0]
    >>> x.grad = None; normalize(x, mean, var, 0.0, exchange=None)[1, 0].backward(); x.grad.flatten().tolist()
    [0.0, 1.0]
    """
    return cast(Tensor, _StatNorm.apply(x, mean.detach(), var.detach(), eps, exchange, mask))  # type: ignore[no-untyped-call]


class _StatNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, eps: float, exchange: Exchange | None, mask: Tensor | None
    ) -> Tensor:
        wide = widened(x)
        mean = mean.to(wide.dtype)
        inv = torch.rsqrt(var.to(wide.dtype) + eps)
        ctx.save_for_backward(x, mean, inv, mask)
        ctx.exchange = exchange
        return _only((wide - along(mean, x)) * along(inv, x), mask).to(x.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inv, mask = ctx.saved_tensors
        g = _only(widened(grad), mask)
        gx = g * along(inv, x)
        if ctx.exchange is not None:
            centered = _only(widened(x) - along(mean, x), mask)
            axes = [0, *range(2, x.dim())]
            g_mu = -inv * g.sum(axes)
            g_v = -0.5 * inv**3 * (g * centered).sum(axes)
            G_mu, G_v = ctx.exchange(g_mu, g_v)
            n = x.numel() // x.shape[1] if mask is None else mask.sum()
            gx = gx + _only(along(G_mu / n, x) + along(2 * G_v / n, x) * centered, mask)
        return gx.to(x.dtype), None, None, None, None, None


def widened(x: Tensor) -> Tensor:
    """Half precision as float32, in which statistics are computed; anything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _only(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(~mask.unsqueeze(1), 0)
