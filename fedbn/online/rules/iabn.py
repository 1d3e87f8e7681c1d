r"""IABN: source statistics, corrected where a window differs significantly."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedbn.online.rules.base import INF, BatchRule
from fedbn.online.statistics import Prior, State, WindowStatistics
from fedbn.tta.note import soft_threshold


@dataclass(frozen=True)
class IABN(BatchRule):
    r"""Instance-aware BN: corrects the source where a window lies more than k standard errors away,

    .. math:: \mu = \mu_0 + \psi(m-\mu_0;\, k s_\mu),\quad v = [v_0 + \psi(w-v_0;\, k s_v)]_+,\quad
        \psi(x;t) = \operatorname{sign}(x)\,[|x|-t]_+,

    :math:`s_\mu=\sqrt{v_0/L},\ s_v=v_0\sqrt{2/(L-1)}` for L positions. ``k=0`` is instance normalization, a large
    k the source. Layers without positions use the source.

    Gong, Jeong, Kim, Kim, Shin, Lee, 2022, *NOTE: robust continual test-time adaptation against temporal correlation*,
    NeurIPS, https://arxiv.org/abs/2208.05117

    The paper also trains with IABN. Its standard errors assume independent positions. Samples of a sensor are not
    independent, so ``effective`` scales L.

    Attributes:
        k: threshold in standard errors.
        effective: number of independent positions, as a share of L.
    """

    name = "iabn"
    about = "source statistics, corrected where a window is far off (NOTE)"
    source = "Gong et al. 2022, arXiv:2208.05117"
    ranges = (("k", 0, INF), ("effective", 0, 1))
    k: float = 4.0
    effective: float = 1.0

    def update(self, prior: Prior, state: State, window: WindowStatistics, weight: Tensor, posterior: Tensor) -> State:
        L = self.effective * window.positions * weight[:, None]
        v0 = prior.var + prior.eps
        mean = prior.mean + soft_threshold(window.mean - prior.mean, self.k * (v0 / L).sqrt())
        error = v0 * (2 / (L - 1).clamp_min(1e-12)).sqrt()
        var = (prior.var + soft_threshold(window.unbiased(weight) - prior.var, self.k * error)).clamp_min(0)
        enough = L > 1
        mean, var = torch.where(enough, mean, prior.mean), torch.where(enough, var, prior.var)
        return replace(state, n=weight[:, None], mean=mean[:, None], var=var[:, None])
