r"""Full normalization (Lian, Liu, AISTATS 2019, https://arxiv.org/abs/1810.06177).

The objective normalizes by the statistics of all data instead of those of the batch. Stochastic compositional
optimization tracks these statistics, and the gradients with respect to them, over time:

.. math::
    \mu \leftarrow (1-a)\mu + a\,\overline{x},\qquad \nu \leftarrow (1-a)\nu + a\,\overline{x^2},\qquad
    \hat x = (x-\mu)/\sqrt{\nu-\mu^2+\epsilon},

.. math::
    G_\mu \leftarrow (1-a) G_\mu + a\,(g_\mu - 2\mu g_v),\qquad G_\nu \leftarrow (1-a) G_\nu + a\,g_v,\qquad
    \frac{\partial L}{\partial x} = g s + \frac{G_\mu + 2 x G_\nu}{n}.

This is a reconstruction: the formulas were derived here from the paper's idea and checked. The step size of the weights
must be small compared with :math:`a`; momentum and large steps diverge.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.nn.conversion import convert_norms
from fedbn.norms.statnorm import batch_statistics, blend, normalize


class FullNorm(AnyBatchNorm):
    r"""Full normalization of ``[N, C, *positions]`` in training, plain BN in evaluation.

    The loss must be the mean over the batch. ``running_var`` holds :math:`\nu-\mu^2`. The backward pass writes
    ``running_grad_mean`` (:math:`G_\mu`) and ``running_grad_second`` (:math:`G_\nu`), so it must run once per forward
    pass.

    Args:
        num_features: channels C.
        eps: added to the variance.
        affine: whether the layer has a scale and a shift.
        a: weight of a batch; the first batch has weight 1.

    >>> layer = FullNorm(1, a=0.5); _ = layer(torch.tensor([[0.0], [2.0]])), layer(torch.tensor([[6.0], [8.0]]))
    >>> float(layer.running_mean), float(layer.running_var)  # 4, and (2 + 50) / 2 - 16
    (4.0, 10.0)
    """

    channelwise = True
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
        # A float buffer, which is sent with the statistics. Counters are not sent: late clients would start again.
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations, of the input's shape."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        a = self.per_channel(lambda steps: self.a if steps else 1.0, self.steps)
        self.num_batches_tracked += 1
        self.steps += 1
        mean, var, _ = batch_statistics(input.detach())
        mu, v = blend(self.running_mean, self.running_var, mean.to(self.running_mean), var.to(self.running_var), a)
        self.running_mean.copy_(mu)
        self.running_var.copy_(v)

        def average(g_mu: Tensor, g_v: Tensor) -> tuple[Tensor, Tensor]:
            G_mu, G_nu = self.running_grad_mean, self.running_grad_second
            G_mu.lerp_((g_mu - 2 * mu * g_v).to(G_mu), a)
            G_nu.lerp_(g_v.to(G_nu), a)
            return G_mu + 2 * mu * G_nu, G_nu.clone()

        out = normalize(input, mu, v, self.eps, gradient_map=average)
        return self.scale_and_shift(out)


convert = partial(convert_norms, cls=FullNorm, kind="full-norm")
"""Replace BN by full normalization. Option: ``a``."""
