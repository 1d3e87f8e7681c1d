r"""How a user's windows differ from the source's *of the same class*."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.online.rules.base import ClassConditional
from fedbn.online.statistics import Pair, Prior, State


@dataclass(frozen=True)
class ClassResidual(ClassConditional):
    r"""Means move by the user's shift, the same for all classes; variances stay.

    The shift is the mean over classes of :math:`D_k`, the mean of :math:`m-\mu_{0,k}` over the windows of class k:

    .. math:: \mu = \mu_0 + \frac{\sum_k u_k D_k}{\tfrac12+\sum_k u_k},\qquad u_k = \frac{c_k}{c_k+n_0},

    with :math:`c_k` the windows of class k, posteriors as weights. A long stretch of one class then moves nothing but
    what is the user's own. This project's; it needs the source's moments of each class
    (`fedbn.online.prior.source_prior`), and posteriors that can be trusted.

    Attributes:
        n0: windows of a class before it is believed by half.
    """

    name = "class-residual"
    about = "mean shift of the user's windows against the source's of the same class"

    def use(self, prior: Prior, state: State) -> Pair:
        u, residual = self.belief(prior, state)
        return prior.mean + (u * residual).sum(1) / (0.5 + u.sum(1)), prior.var
