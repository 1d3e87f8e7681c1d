r"""SAR: entropy minimization on reliable windows, towards flat minima, with a restart when it collapses.

Windows with :math:`H<0.4\ln K` count. The step is sharpness-aware. When the moving average of the loss falls below
0.2 nats the model predicts one class with certainty, and starts anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedbn.tta.base import Method, Step, affine_parameters, entropy, sharpness_aware, use_batch_statistics


@dataclass(frozen=True)
class Sar(Method):
    """The authors advise group or layer norm; with BN the statistics are the batch's.

    Attributes:
        lr: of SGD with momentum 0.9.
        margin: entropy below this share of ln K is reliable.
        rho: how far up the slope the gradient is taken.
        collapse: moving average of the loss, in nats, below which scale and shift are restored.

    >>> Sar().margin
    0.4
    """

    name = "sar"
    about = "sharpness-aware entropy on reliable windows, restart on collapse"
    source = "Niu et al. 2023, https://arxiv.org/abs/2302.12400"
    includes_current = True
    lr: float = 2.5e-4
    margin: float = 0.4
    rho: float = 0.05
    collapse: float = 0.2

    def begin(self, model: nn.Module, source: Tensor, draw: torch.Generator) -> Step:
        use_batch_statistics(model)
        moved = affine_parameters(model)
        start = [p.detach().clone() for p in moved]
        optimizer = torch.optim.SGD(moved, self.lr, momentum=0.9)
        average: float | None = None

        def step(x: Tensor) -> Tensor:
            nonlocal average
            with torch.no_grad():
                answer: Tensor = model(x)
            kept = x[entropy(answer) < self.margin * math.log(answer.shape[1])]

            def loss() -> Tensor | None:
                # Windows no longer reliable up the slope drop out, as in the first selection.
                if len(kept) < 2:
                    return None
                h = entropy(model(kept))
                sure = h < self.margin * math.log(answer.shape[1])
                return h[sure].mean() if bool(sure.any()) else None

            last = sharpness_aware(optimizer, loss, self.rho)
            if last is not None and math.isfinite(float(last)):
                average = float(last) if average is None else 0.9 * average + 0.1 * float(last)
                if average < self.collapse:
                    with torch.no_grad():
                        for p, old in zip(moved, start, strict=True):
                            p.copy_(old)
                    optimizer.state.clear()
                    average = None
            return answer

        return step
