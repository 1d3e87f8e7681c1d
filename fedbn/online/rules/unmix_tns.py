r"""UnMix-TNS: mixture of components, of which a sequence of one class changes only some."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedbn.online.rules.base import INF, BatchRule, equal_mixture
from fedbn.online.statistics import Pair, Prior, State, WindowStatistics


@dataclass(frozen=True)
class UnMixTNS(BatchRule):
    r"""Normalizes a window by a mixture of K components, each moved towards the window by its similarity.

    With :math:`p_k = \operatorname{softmax}_k(\cos(m, \mu_k)/0.07)`,

    .. math:: \tilde\mu_k = (1-p_k)\mu_k + p_k m,\quad \tilde v_k = (1-p_k) v_k + p_k w,\quad
        \mu_k \leftarrow \mu_k + \lambda p_k (m-\mu_k),\quad v_k \leftarrow v_k + \lambda p_k (w-v_k),

    with :math:`\lambda = 1-0.9^{B/64}` for B windows.

    Tomar, Vray, Thiran, Bozorgtabar, 2024, *Un-mixing test-time normalization statistics: combatting label temporal
    correlation*, ICLR, https://arxiv.org/abs/2401.08328

    Several windows of a user in one call count as one window with their joint moments. The components start at random
    values around the source, the same for all users. The mixture has the source's moments only in expectation.

    Attributes:
        K: number of components.
        seed: seed of their initial values.
    """

    name = "unmix-tns"
    about = "mixture of K components, each moved by similar windows"
    source = "Tomar, Vray, Thiran, Bozorgtabar 2024, arXiv:2401.08328"
    ranges = (("K", 2, INF),)
    K: int = 16
    seed: int = 0

    def start(self, prior: Prior, classes: int) -> State:
        state = self.state_at_prior(prior, classes, self.K, extra=2)
        channels = prior.mean.shape[1]
        noise = torch.randn(self.K, channels, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        offset = (0.5 * self.K / (self.K - 1)) ** 0.5 * prior.var.sqrt()[:, None] * noise.to(prior.mean)
        mixture = torch.stack(prior.moments, 1)
        return replace(state, mean=state.mean + offset, var=0.5 * state.var, extra=mixture)

    def update(self, prior: Prior, state: State, window: WindowStatistics, weight: Tensor, posterior: Tensor) -> State:
        m, w = window.mean[:, None], window.var[:, None]
        dot, a, b = (prior.per_layer(v) for v in (m * state.mean, m * m, state.mean**2))
        p = (dot / (a * b).sqrt().clamp_min(1e-12) / 0.07).softmax(1)[:, :, prior.layer]
        mean, var = torch.lerp(state.mean, m, p), torch.lerp(state.var, w, p)
        step = (1 - 0.9 ** (weight / 64))[:, None, None] * p
        return replace(
            state,
            n=state.n + weight[:, None] / self.K,
            mean=torch.lerp(state.mean, m, step),
            var=torch.lerp(state.var, w, step),
            extra=torch.stack(equal_mixture(mean, var), 1),
        )

    def use(self, prior: Prior, state: State) -> Pair:
        return state.extra[:, 0], state.extra[:, 1]
