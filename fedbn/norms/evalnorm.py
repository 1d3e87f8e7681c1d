r"""EvalNorm (Singh, Shrivastava, ICCV 2019, https://arxiv.org/abs/1904.06031).

In training a sample is one of the :math:`M` that make its statistics; in evaluation it is not. For a sample with
instance moments :math:`(m_i, s_i^2)` in an i.i.d. batch, with :math:`\mu = E[\mu_B]` and :math:`v = E[v_B]`,

.. math:: E[\mu_B \mid i] = a\,m_i + (1-a)\mu,\qquad
    E[v_B \mid i] = b\,s_i^2 + (1-b)v + b(1-b)(m_i-\mu)^2,\qquad a = b = 1/M,

exactly. Evaluation normalizes by these. The formula is a derivation; whether the paper's rule of thumb is
:math:`1/M` or :math:`1/M^2` could not be settled, and how it learns :math:`a` and :math:`b` was not read: the learned
variant is a reconstruction.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.nn.conversion import exchange
from fedbn.norms.statnorm import along, batch_statistics, blend

Rule = Literal["1/M", "1/M^2", "learned"]


def instance_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``[N, C]`` of each sample of ``x`` ``[N, C, *positions]`` over its positions.

    >>> instance_statistics(torch.tensor([[[0.0, 4.0]]]))
    (tensor([[2.]]), tensor([[4.]]))
    """
    var, mean = torch.var_mean(x.unsqueeze(2).flatten(2), 2, correction=0)
    return mean, var


class EvalNorm(AnyBatchNorm):
    """BN in training; in evaluation each sample of ``[N, C, *positions]`` weighs in its own statistics.

    The rows of a training batch are recorded in ``running_size``, so M travels with the statistics. A layer that has
    never been trained evaluates as BN.

    Args:
        num_features: channels C.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics; None: plain mean over all batches.
        affine: whether there are a scale and a shift.
        rule: ``a`` and ``b`` as a function of M, or ``learned``: two numbers a layer, found by gradient steps in
            training that do not touch the network.
        size: M, for a network trained elsewhere; None: as recorded.
        lr: step of the learned rule.

    >>> layer = EvalNorm(1, size=2).eval(); x = torch.tensor([[3.0], [-3.0]])
    >>> [round(y, 2) for y in layer(x).flatten().tolist()]  # (3 - 1.5) / sqrt(1 / 4 + 9 / 4), within (-1, 1)
    [0.95, -0.95]
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    running_size: Tensor
    running_logits: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        rule: Rule = "1/M",
        size: float | None = None,
        lr: float = 0.1,
    ) -> None:
        if size is not None and size < 1:
            raise UserError(f"evalnorm: a training batch has at least one row, not size={size}")
        super().__init__(num_features, eps, momentum, affine)
        self.rule, self.size, self.lr = rule, size, lr
        self.register_buffer("running_size", torch.zeros(()))
        if rule == "learned":
            self.register_buffer("running_logits", torch.zeros(2))

    @property
    def rows(self) -> float:
        """M, the rows of a training batch."""
        rows = float(self.running_size) if self.size is None else self.size
        if not rows:
            raise UserError(
                "evalnorm: this network was trained without recording the rows M of a batch; give size=M, or train on"
            )
        return rows

    def weights(self) -> tuple[float | Tensor, float | Tensor]:
        """(a, b), the sample's weight in its mean and in its variance."""
        if self.rule == "learned":
            a, b = torch.sigmoid(self.running_logits)
            return a, b
        a = 1 / self.rows if self.rule == "1/M" else 1 / self.rows**2
        return a, a

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations, of the input's shape."""
        if self.training:
            with torch.no_grad():
                size = torch.full_like(self.running_size, len(input))
                self.running_size.copy_(size if self.running_size == 0 else self.running_size.lerp(size, 0.1))
            out = super().forward(input)
            if self.rule == "learned":
                self._learn(input.detach())
            return out
        if self.size is None and self.running_size == 0 and self.num_batches_tracked == 0:
            return super().forward(input)  # nothing was learnt by batches yet
        self._check_input_dim(input)
        m, s2 = instance_statistics(input)
        # PyTorch stores unbiased variances; the formula is about the biased ones that normalize.
        n = self.rows * input[0, 0].numel()
        mean, var = blend(self.running_mean, self.running_var * (1 - 1 / n), m, s2, *self.weights())
        shape = (*mean.shape, *[1] * (input.dim() - 2))
        out = (input - mean.view(shape)) * torch.rsqrt(var.view(shape) + self.eps)
        return out if self.weight is None else out * along(self.weight, input) + along(self.bias, input)

    def _learn(self, x: Tensor) -> None:
        """One step down the mean over samples of the distance between their statistics and the batch's."""
        mean, var, n = batch_statistics(x)
        m, s2 = instance_statistics(x)
        v = self.running_var * (1 - 1 / n)
        with torch.enable_grad():
            logits = self.running_logits.detach().clone().requires_grad_()
            a, b = torch.sigmoid(logits)
            mu_i, v_i = blend(self.running_mean, v, m, s2, a, b)
            ratio = torch.sqrt((v_i + self.eps) / (var + self.eps))
            loss = ((mu_i - mean) ** 2 / (v + self.eps) + (ratio - 1) ** 2).mean()
            (gradient,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            self.running_logits.sub_(self.lr * gradient)


def convert(model: nn.Module, *, rule: Rule = "1/M", size: float | None = None, lr: float = 0.1) -> nn.Module:
    """EvalNorm for every normalization layer: of any trained BN network, given M, for evaluation alone.

    >>> convert(nn.Sequential(nn.BatchNorm1d(4)), size=2)[0].weights()
    (0.5, 0.5)
    """
    return exchange(model, EvalNorm, "evalnorm", rule=rule, size=size, lr=lr)
