r"""Class mixture: the user's moments of all classes, including classes not seen yet."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedbn.online.rules.base import ClassConditional, equal_mixture
from fedbn.online.statistics import Pair, Prior, State


@dataclass(frozen=True)
class ClassMixture(ClassConditional):
    r"""Moments of every class, mixed with equal weights.

    For classes with windows they are the user's own; for the others, the source's moved by the user's mean shift:

    .. math:: \hat\mu_k = \mu_{0,k} + \bar D + u_k (D_k - \bar D),\qquad
        \hat v_k = (1-u_k) v_{0,k} + u_k v_k,\qquad u_k = \frac{c_k}{c_k+n_0},

    :math:`D_k` the user's shift in class k and :math:`\bar D` its mean over classes, weighted by :math:`u_k`. The
    difference between this mixture and the same mixture of the source is added to the source's overall mean; the ratio
    of the variances multiplies its variance. A new user therefore starts exactly from the source, whatever its class
    distribution. Proposed by this project, after the Balanced BN of Su, Xu, Jia, 2024,
    https://arxiv.org/abs/2309.14949, but with separate starts for the classes and a shift that they share.

    Attributes:
        n0: windows of a class after which its shift has weight one half.
    """

    name = "class-mixture"
    about = "equal mixture of the classes' moments, own or shifted source's"

    def use(self, prior: Prior, state: State) -> Pair:
        class_mean, class_var = prior.class_moments(self.name)
        u, residual = self.class_shifts(prior, state)
        shift = (u * residual).sum(1, keepdim=True) / u.sum(1, keepdim=True).clamp_min(1e-12)
        mean_k = class_mean + shift + u * (residual - shift)
        var_k = torch.lerp(class_var.expand_as(state.var), state.var, u)
        mean, var = equal_mixture(mean_k, var_k)
        mean0, var0 = equal_mixture(class_mean.expand_as(mean_k), class_var.expand_as(var_k))
        return prior.mean + (mean - mean0), prior.var * ((var + prior.eps) / (var0 + prior.eps))
