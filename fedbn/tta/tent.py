"""TENT: minimize the entropy of predictions over scale and shift, with batch statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedbn.optim.eager import eager
from fedbn.tta.base import Method, Step, affine_parameters, entropy, use_batch_statistics


@dataclass(frozen=True)
class Tent(Method):
    """One Adam step per block on its mean entropy. Predictions are made before the step.

    Attributes:
        lr: learning rate.

    >>> Tent().lr
    0.001
    """

    name = "tent"
    about = "entropy over scale and shift, batch statistics"
    source = "Wang et al. 2021, https://arxiv.org/abs/2006.10726"
    includes_current = True
    lr: float = 1e-3

    def begin(self, model: nn.Module, source: Tensor, draw: torch.Generator) -> Step:
        use_batch_statistics(model)
        optimizer = eager(torch.optim.Adam)(affine_parameters(model), self.lr)

        def step(x: Tensor) -> Tensor:
            out: Tensor = model(x)
            optimizer.zero_grad()
            entropy(out).mean().backward()
            optimizer.step()
            return out

        return step
