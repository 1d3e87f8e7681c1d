r"""SAR: sharpness-aware entropy minimization on reliable windows, with a reset on collapse.

Windows with :math:`H<0.4\ln K` are used. When the moving average of the loss falls below 0.2 nats, the model predicts
one class with certainty, and scale and shift are reset.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedbn.tta.base import Method, Step, affine_parameters, entropy, sharpness_aware_step, use_batch_statistics


@dataclass(frozen=True)
class Sar(Method):
    """The authors recommend group or layer norm; BN layers use batch statistics.

    Attributes:
        lr: learning rate of SGD with momentum 0.9.
        margin: maximum entropy of a reliable window, as a share of ln K.
        rho: distance up the slope at which the gradient is taken.
        collapse: moving average of the loss, in nats, below which scale and shift are reset.

    >>> Sar().margin
    0.4
    """

    name = "sar"
    about = "sharpness-aware entropy on reliable windows, reset on collapse"
    source = "Niu et al. 2023, https://arxiv.org/abs/2302.12400"
    includes_current = True
    lr: float = 2.5e-4
    margin: float = 0.4
    rho: float = 0.05
    collapse: float = 0.2

    def begin(self, model: nn.Module, source: Tensor, draw: torch.Generator) -> Step:
        use_batch_statistics(model)
        parameters = affine_parameters(model)
        start = [p.detach().clone() for p in parameters]
        optimizer = torch.optim.SGD(parameters, self.lr, momentum=0.9)
        average: float | None = None

        def step(x: Tensor) -> Tensor:
            nonlocal average
            with torch.no_grad():
                logits: Tensor = model(x)
            reliable = x[entropy(logits) < self.margin * math.log(logits.shape[1])]

            def loss() -> Tensor | None:
                # Windows that are no longer reliable up the slope are dropped, as in the first selection.
                if len(reliable) < 2:
                    return None
                h = entropy(model(reliable))
                mask = h < self.margin * math.log(logits.shape[1])
                return h[mask].mean() if bool(mask.any()) else None

            last = sharpness_aware_step(optimizer, loss, self.rho)
            if last is not None and math.isfinite(float(last)):
                average = float(last) if average is None else 0.9 * average + 0.1 * float(last)
                if average < self.collapse:
                    with torch.no_grad():
                        for p, initial in zip(parameters, start, strict=True):
                            p.copy_(initial)
                    optimizer.state.clear()
                    average = None
            return logits

        return step
