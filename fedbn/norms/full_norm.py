r"""Full normalization (Lian, Liu, AISTATS 2019, https://arxiv.org/abs/1810.06177).

The objective normalizes by the statistics of all data instead of the batch's; stochastic compositional optimization
follows them, and the gradients with respect to them, over time:

.. math::
    \mu \leftarrow (1-a)\mu + a\,\overline{x},\qquad \nu \leftarrow (1-a)\nu + a\,\overline{x^2},\qquad
    \hat x = (x-\mu)/\sqrt{\nu-\mu^2+\epsilon},

.. math::
    G_\mu \leftarrow (1-a) G_\mu + a\,(g_\mu - 2\mu g_v),\qquad G_\nu \leftarrow (1-a) G_\nu + a\,g_v,\qquad
    \frac{\partial L}{\partial x} = g s + \frac{G_\mu + 2 x G_\nu}{n}.

A reconstruction: the paper's idea was read, the formulas were derived from it and checked. The step size of the
weights must be small against :math:`a`; momentum and large steps diverge.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.nn.conversion import exchange
from fedbn.norms.statnorm import along, batch_statistics, blend, normalize


class FullNorm(AnyBatchNorm):
    r"""Full normalization of ``[N, C, *positions]``; evaluation is BN's. The loss must be the mean over the batch.

    ``running_var`` holds :math:`\nu-\mu^2`. The backward pass writes ``running_grad_mean`` and
    ``running_grad_second``, :math:`G_\mu` and :math:`G_\nu`, so it must run once for each forward pass.

    Args:
        num_features: channels C.
        eps: added to the variance.
        affine: whether there are a scale and a shift.
        a: weight of a batch; 1 in the first.

    >>> layer = FullNorm(1, a=0.5); _ = layer(torch.tensor([[0.0], [2.0]])), layer(torch.tensor([[6.0], [8.0]]))
    >>> float(layer.running_mean), float(layer.running_var)  # 4, and (2 + 50) / 2 - 16
    (4.0, 10.0)
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    running_grad_mean: Tensor
    running_grad_second: Tensor
    steps: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = True, *, a: float = 0.1) -> None:
        if not 0 < a <= 1:
            raise UserError(f"full normalization needs a weight above 0 and at most 1, not a={a}")
        super().__init__(num_features, eps, affine=affine)
        self.a = a
        self.register_buffer("running_grad_mean", torch.zeros(num_features))
        self.register_buffer("running_grad_second", torch.zeros(num_features))
        # A buffer that travels with the statistics: a counter stays home, and latecomers would start anew.
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations, of the input's shape."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        a = 1.0 if self.steps == 0 else self.a
        self.num_batches_tracked += 1
        self.steps += 1
        mean, var, _ = batch_statistics(input.detach())
        mu, v = blend(self.running_mean, self.running_var, mean.to(self.running_mean), var.to(self.running_var), a)
        self.running_mean.copy_(mu)
        self.running_var.copy_(v)

        def follow(g_mu: Tensor, g_v: Tensor) -> tuple[Tensor, Tensor]:
            G_mu, G_nu = self.running_grad_mean, self.running_grad_second
            G_mu.lerp_((g_mu - 2 * mu * g_v).to(G_mu), a)
            G_nu.lerp_(g_v.to(G_nu), a)
            return G_mu + 2 * mu * G_nu, G_nu.clone()

        out = normalize(input, mu, v, self.eps, exchange=follow)
        return out if self.weight is None else out * along(self.weight, input) + along(self.bias, input)


def convert(model: nn.Module, *, a: float = 0.1) -> nn.Module:
    """Full normalization for every normalization layer.

    >>> convert(nn.Sequential(nn.BatchNorm1d(4)), a=0.05)[0].a
    0.05
    """
    return exchange(model, FullNorm, "full-norm", a=a)
