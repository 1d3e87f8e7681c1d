r"""EvalNorm (Singh, Shrivastava, ICCV 2019, https://arxiv.org/abs/1904.06031).

In training a sample is one of the :math:`M` samples behind its statistics; in evaluation it is not. For a sample with
instance moments :math:`(m_i, s_i^2)` in an i.i.d. batch, with :math:`\mu = E[\mu_B]` and :math:`v = E[v_B]`,

.. math:: E[\mu_B \mid i] = a\,m_i + (1-a)\mu,\qquad
    E[v_B \mid i] = b\,s_i^2 + (1-b)v + b(1-b)(m_i-\mu)^2,\qquad a = b = 1/M,

exactly. Evaluation normalizes by these expectations. The formula was derived here. It is unclear whether the paper's
rule of thumb is :math:`1/M` or :math:`1/M^2`. How the paper learns :math:`a` and :math:`b` was not available to us; the
learned variant is a reconstruction.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.nn.conversion import convert_norms
from fedbn.norms.statnorm import batch_statistics, blend

Rule = Literal["1/M", "1/M^2", "learned"]


def instance_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``[N, C]`` of each sample of ``x`` ``[N, C, *positions]`` over its positions.

    >>> instance_statistics(torch.tensor([[[0.0, 4.0]]]))
    (tensor([[2.]]), tensor([[4.]]))
    """
    var, mean = torch.var_mean(x.unsqueeze(2).flatten(2), 2, correction=0)
    return mean, var


class EvalNorm(AnyBatchNorm):
    """BN in training; in evaluation each sample of ``[N, C, *positions]`` contributes to its own statistics.

    The number of rows of a training batch is recorded in ``running_size``, so M is sent with the statistics. A layer
    that has never been trained evaluates as BN.

    Args:
        num_features: channels C.
        rule: ``a`` and ``b`` as a function of M, or ``learned``: two numbers per layer, found in training by gradient
            steps that do not change the network.
        size: M for a network trained elsewhere; None uses the recorded value.
        lr: step size of the learned rule.
        **kwargs: ``eps``, ``momentum`` and ``affine`` as in `torch.nn.BatchNorm1d`.

    >>> layer = EvalNorm(1, size=2).eval(); x = torch.tensor([[3.0], [-3.0]])
    >>> [round(y, 2) for y in layer(x).flatten().tolist()]  # (3 - 1.5) / sqrt(1 / 4 + 9 / 4), within (-1, 1)
    [0.95, -0.95]
    """

    channelwise = True
    running_size: Tensor
    running_logits: Tensor

    def __init__(
        self, num_features: int, *, rule: Rule = "1/M", size: float | None = None, lr: float = 0.1, **kwargs: Any
    ) -> None:
        if size is not None and size < 1:
            raise UserError(f"evalnorm: a training batch has at least one row, not size={size}")
        super().__init__(num_features, **kwargs)
        self.rule, self.size, self.lr = rule, size, lr
        self.register_buffer("running_size", torch.zeros(()))
        if rule == "learned":
            self.register_buffer("running_logits", torch.zeros(2))

    @property
    def rows(self) -> float | Tensor:
        """M, the number of rows of a training batch; infinite before any training, so that the layer is BN.

        Raises:
            UserError: the network was trained without recording M.
        """
        if self.size is not None:
            return self.size
        if torch.compiler.is_compiling():
            return self.running_size  # a graph cannot branch on values
        return self.per_channel(_known_rows, self.running_size, self.num_batches_tracked)

    def weights(self) -> tuple[float | Tensor, float | Tensor]:
        """Weights (a, b) of the sample in its mean and in its variance."""
        if self.rule == "learned":
            return self._learned(self.running_logits)
        a = 1 / self.rows if self.rule == "1/M" else 1 / self.rows**2
        return a, a

    def _learned(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (a, b) of the learned rule; with the logits of K clients, for each channel."""
        if logits.dim() == 1 and len(logits) == 2:
            a, b = torch.sigmoid(logits)
            return a, b
        a, b = torch.sigmoid(logits).view(-1, 2).repeat_interleave(self.num_features, 0).unbind(1)
        return a, b

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations, of the input's shape."""
        if self.training:
            with torch.no_grad():
                size = torch.full_like(self.running_size, len(input))
                moved = self.running_size.lerp(size, 0.1)
                self.running_size.copy_(torch.where(self.running_size == 0, size, moved))
            out = super().forward(input)
            if self.rule == "learned":
                self._learn(input.detach())
            return out
        known = self.size is not None or torch.compiler.is_compiling()
        if not known and not self.running_size.any() and not self.num_batches_tracked.any():
            return super().forward(input)  # not trained yet
        self._check_input_dim(input)
        m, s2 = instance_statistics(input)
        # PyTorch stores unbiased variances; the formula uses the biased ones that normalize.
        n = self.rows * input[0, 0].numel()
        mean, var = blend(self.running_mean, self.running_var * (1 - 1 / n), m, s2, *self.weights())
        return self.normalize_instances(input, mean, var)

    def _learn(self, x: Tensor) -> None:
        """Gradient step on the mean distance between the statistics of the samples and of the batch."""
        mean, var, n = batch_statistics(x)
        m, s2 = instance_statistics(x)
        v = self.running_var * (1 - 1 / n)
        with torch.enable_grad():
            logits = self.running_logits.detach().clone().requires_grad_()
            a, b = self._learned(logits)
            mu_i, v_i = blend(self.running_mean, v, m, s2, a, b)
            ratio = torch.sqrt((v_i + self.eps) / (var + self.eps))
            distance = ((mu_i - mean) ** 2 / (v + self.eps) + (ratio - 1) ** 2).mean()
            (gradient,) = torch.autograd.grad(distance * self.running_size.numel(), logits)  # the sum of K means
        with torch.no_grad():
            self.running_logits.sub_(self.lr * gradient)


def _known_rows(rows: float, batches: int) -> float:
    if not rows and batches:
        raise UserError(
            "evalnorm: this network was trained without recording the rows M of a batch; give size=M, or train on"
        )
    return rows or math.inf


convert = partial(convert_norms, cls=EvalNorm, kind="evalnorm")
"""Replace BN by EvalNorm. Options: ``rule``, ``size``, ``lr``.

Given M as ``size``, any trained BN network can be converted for evaluation only.
"""
