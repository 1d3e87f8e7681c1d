r"""The mixture of all classes as this user would give them, met or not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedbn.online.rules.base import ClassConditional
from fedbn.online.statistics import Pair, Prior, State


@dataclass(frozen=True)
class ClassMixture(ClassConditional):
    r"""Moments of every class, mixed in equal parts.

    They are the user's own where a class has been met, and the source's, moved by the user's mean shift, where not:

    .. math:: \hat\mu_k = \mu_{0,k} + \bar D + u_k (D_k - \bar D),\qquad
        \hat v_k = (1-u_k) v_{0,k} + u_k v_k,\qquad u_k = \frac{c_k}{c_k+n_0},

    :math:`D_k` the user's shift in class k and :math:`\bar D` its mean over classes, weighted by :math:`u_k`. What the
    mixture differs from the same mixture of the source is added to the source's overall statistics (mean) or multiplied
    (variance), so that a new user starts exactly there, whatever the source's mix of classes was. This project's; after
    the Balanced BN of Su, Xu, Jia, 2024, https://arxiv.org/abs/2309.14949, with classes that start apart and lend to
    each other.

    Attributes:
        n0: windows of a class before it is believed by half.
    """

    name = "class-mixture"
    about = "equal mixture of all classes, the user's own or the source's moved by the user's shift"

    def use(self, prior: Prior, state: State) -> Pair:
        class_mean, class_var = prior.classwise(self.name)
        u, residual = self.belief(prior, state)
        shift = (u * residual).sum(1, keepdim=True) / u.sum(1, keepdim=True).clamp_min(1e-12)
        mean_k = class_mean + shift + u * (residual - shift)
        var_k = torch.lerp(class_var.expand_as(state.var), state.var, u)
        mean, var = _equal(mean_k, var_k)
        mean0, var0 = _equal(class_mean.expand_as(mean_k), class_var.expand_as(var_k))
        return prior.mean + (mean - mean0), prior.var * ((var + prior.eps) / (var0 + prior.eps))


def _equal(mean: Tensor, var: Tensor) -> Pair:
    """Moments of the mixture in equal parts of ``[U, K, C]``."""
    center = mean.mean(1)
    return center, (var + (mean - center[:, None]) ** 2).mean(1)
