r"""SIGHT: temporal smoothing of predictions, weakened by surprise; the network stays unchanged.

Prototypes :math:`\mu_k` start at the classifier's normalized weights. The last prediction :math:`q` predicts features
:math:`\hat z=\sum_k q_k\mu_k`; surprise is :math:`\lambda=1-e^{-\beta(1-\cos(z,\hat z))^2}`. The prior for this window
is :math:`(1-\lambda)q+\lambda\pi`, where :math:`\pi` weights the classes in whose direction the features moved,
:math:`\mathrm{softmax}(\cos(z-\hat z,\mu_k-\hat z)/\tau)`, by the square root of their frequency (habit :math:`h`). The
prediction is proportional to the network's times the prior. Prototypes follow it slowly and are pulled back to the
source.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedbn.tta.base import Method, Step, features_of

PULL = 0.01
"""Weight of the source's prototype in each update."""


@dataclass(frozen=True)
class Sight(Method):
    """Processes one window at a time. The state is prototypes, habit and the last prediction.

    Attributes:
        eta_mu: rate of the prototypes.
        beta: sensitivity to surprise.
        eta_h: rate of the habit.
        tau: temperature of the direction of movement.

    >>> Sight().block
    1
    """

    name = "sight"
    about = "temporal smoothing by surprise and habit, network unchanged"
    source = "SIGHT 2026, https://github.com/zszhou21/SIGHT"
    includes_current = False
    needs = "class probabilities, which it smooths"
    block: int = 1
    eta_mu: float = 0.01
    beta: float = 1.0
    eta_h: float = 0.05
    tau: float = 0.2

    def begin(self, model: nn.Module, source: Tensor, draw: torch.Generator) -> Step:
        classifier, features = features_of(model)
        start = F.normalize(classifier.weight.detach().clone(), dim=1)  # type: ignore[operator]
        mu = start.clone()
        habit = mu.new_full((len(mu),), 1 / len(mu))
        q: Tensor | None = None

        def smooth(p: Tensor, z: Tensor) -> Tensor:
            nonlocal mu, habit, q
            prior = torch.ones_like(p)
            if q is not None:
                expected = q @ mu
                surprise = 1 - torch.exp(-self.beta * (1 - F.cosine_similarity(z, expected, dim=0)) ** 2)
                direction = F.cosine_similarity((z - expected)[None], mu - expected, dim=1)
                pi = (direction / self.tau).softmax(0) * habit.sqrt()
                prior = ((1 - surprise) * q + surprise * pi / pi.sum()).clamp_min(1e-8)
                habit = (1 - self.eta_h) * habit + self.eta_h * q
            q = p * prior / (p * prior).sum()
            rate = self.eta_mu * q[:, None]
            mu = F.normalize((1 - PULL) * ((1 - rate) * mu + rate * z) + PULL * start, dim=1)
            return q

        def step(x: Tensor) -> Tensor:
            with torch.no_grad():
                p = model(x).softmax(1)
                return torch.stack([smooth(*row) for row in zip(p, features(), strict=True)]).clamp_min(1e-30).log()

        return step
