r"""TEMA: running average, mixed with the source by layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedbn.online.rules.base import Rule
from fedbn.online.statistics import Pair, Prior, State, WindowStatistics, mix


@dataclass(frozen=True)
class TEMA(Rule):
    r"""Running average whose gain depends on the batch size, mixed with the source by layer.

    The weight of the source is :math:`r_l = (z_l+1)/4`, where z is the divergence from it, standardized over layers and
    clipped to [-1, 1]: layers that differ most from the source give it the most weight.

    Su, Guo, Yang et al., 2024, *Unraveling batch normalization for realistic test-time adaptation*, AAAI,
    https://arxiv.org/abs/2312.09486

    The divergence is the symmetric Kullback-Leibler divergence of Gaussians with independent channels. The published
    code computes r in a first pass over the batch and predicts in a second. Here the weights are those after the
    previous batch, so one pass is enough.

    Attributes:
        smooth: weight of the previous r.
    """

    name = "tema"
    about = "running average, gain by batch size and layer divergence"
    source = "Su et al. 2024, arXiv:2312.09486"
    includes_current = True
    ranges = (("smooth", 0, 1),)
    smooth: float = 0.9

    def start(self, prior: Prior, classes: int) -> State:
        state = self.state_at_prior(prior, classes, 1, extra=2)
        return replace(state, extra=state.extra + 0.25)

    def gain(self, state: State, weight: Tensor) -> Tensor:
        few, many = weight.new_tensor(0.01), weight.new_tensor(0.1)
        return torch.where((weight >= 64) | (state.n[:, 0] == 0), 1.0, torch.where(weight > 2, many, few))

    def update(self, prior: Prior, state: State, window: WindowStatistics, weight: Tensor, posterior: Tensor) -> State:
        after = super().update(prior, state, window, weight, posterior)
        (mean, var), (mean0, var0) = after.moments, (prior.mean, prior.var)
        var, var0 = var + prior.eps, var0 + prior.eps
        terms = 0.5 * (var / var0 + var0 / var - 2 + (mean - mean0) ** 2 * (1 / var + 1 / var0))
        divergence = prior.per_layer(terms)
        std = divergence.std(1, correction=0, keepdim=True)
        z = ((divergence - divergence.mean(1, keepdim=True)) / std.clamp_min(1e-12)).clamp(-1, 1)
        r = ((z + 1) / 4)[:, prior.layer]
        current = state.extra[:, 1]
        following = torch.lerp(r, current, state.n.new_tensor(self.smooth))
        return replace(after, extra=torch.stack((current, following), 1))

    def use(self, prior: Prior, state: State) -> Pair:
        return mix(state.moments, prior.moments, state.extra[:, 0])
