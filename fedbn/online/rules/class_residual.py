r"""Class residual: shift of a user's windows from the source's windows *of the same class*."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.online.rules.base import ClassConditional
from fedbn.online.statistics import Pair, Prior, State


@dataclass(frozen=True)
class ClassResidual(ClassConditional):
    r"""Shifts the means by one vector, the same for all classes. Variances do not change.

    The shift is the mean over classes of :math:`D_k`, the mean of :math:`m-\mu_{0,k}` over the windows of class k:

    .. math:: \mu = \mu_0 + \frac{\sum_k u_k D_k}{\tfrac12+\sum_k u_k},\qquad u_k = \frac{c_k}{c_k+n_0},

    with :math:`c_k` the windows of class k, weighted by posteriors. A long sequence of one class then changes only what
    is specific to the user. Proposed by this project. It needs the source's moments of each class
    (`fedbn.online.prior.source_prior`) and reliable posteriors.

    Attributes:
        n0: windows of a class after which its shift has weight one half.
    """

    name = "class-residual"
    about = "mean shift from the source's windows of the same class"

    def use(self, prior: Prior, state: State) -> Pair:
        u, residual = self.class_shifts(prior, state)
        return prior.mean + (u * residual).sum(1) / (0.5 + u.sum(1)), prior.var
