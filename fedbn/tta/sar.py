r"""SAR: sharpness-aware entropy minimization on reliable windows, with a reset on collapse.

Windows with :math:`H<0.4\ln K` are used, at the parameters and again up the slope; both forward passes take the whole
block, so that all of its windows are part of the batch statistics. When the moving average of the loss falls below 0.2
nats, the model predicts one class with certainty, and scale, shift, momentum and moving average are reset. (In the
authors' code, momentum and moving average survive the reset.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedbn.optim.eager import eager
from fedbn.tta.base import Method, Step, affine_parameters, entropy, sharpness_aware_step, use_batch_statistics


@dataclass(frozen=True)
class Sar(Method):
    """The authors recommend group or layer norm; BN layers use batch statistics.

    The defaults are the authors' setting for ResNet-50 on ImageNet-C (https://github.com/mr-eggplant/SAR): learning
    rate 0.00025, for blocks of fewer than 32 windows in proportion to their size. All normalization layers adapt; the
    authors leave out the last ones.

    Attributes:
        lr: learning rate of SGD with momentum 0.9; None: the authors', ``0.00025 * min(1, block / 32)``.
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
    lr: float | None = None
    margin: float = 0.4
    rho: float = 0.05
    collapse: float = 0.2

    def begin(self, model: nn.Module, source: Tensor, draw: torch.Generator) -> Step:
        use_batch_statistics(model)
        parameters = affine_parameters(model)
        start = [p.detach().clone() for p in parameters]
        rate = 2.5e-4 * min(1, self.block / 32) if self.lr is None else self.lr
        optimizer = eager(torch.optim.SGD)(parameters, rate, momentum=0.9)
        average: float | None = None

        def step(x: Tensor) -> Tensor:
            nonlocal average
            outputs: list[Tensor] = []
            used = torch.ones(len(x), dtype=torch.bool, device=x.device)

            def loss() -> Tensor:
                nonlocal used
                outputs.append(model(x))
                h = entropy(outputs[-1])
                used = used & (h < self.margin * math.log(outputs[-1].shape[1]))
                # The mean of no windows is NaN with gradient 0. Momentum then still moves the parameters.
                return h[used].mean()

            last = float(sharpness_aware_step(optimizer, loss, self.rho))
            if math.isfinite(last):
                average = last if average is None else 0.9 * average + 0.1 * last
                if average < self.collapse:
                    with torch.no_grad():
                        for p, initial in zip(parameters, start, strict=True):
                            p.copy_(initial)
                    optimizer.state.clear()
                    average = None
            return outputs[0]

        return step
