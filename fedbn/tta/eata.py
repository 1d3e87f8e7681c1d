r"""EATA: entropy minimization on reliable, non-redundant windows, with a Fisher-weighted anchor to the source.

A window is used if :math:`H<E_0=0.4\ln K` and its prediction differs from the moving average of the predictions used so
far, :math:`|\cos(\bar p,p)|<d`. Its weight is :math:`e^{E_0-H}`. The penalty
:math:`\lambda\sum_i F_i(\theta_i-\theta_i^s)^2` anchors the parameters that have high Fisher information on source
windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedbn.optim.eager import eager
from fedbn.tta.base import Method, Step, affine_parameters, entropy, use_batch_statistics

CHUNK = 64
"""Batch size of source windows for the Fisher information."""


@dataclass(frozen=True)
class Eata(Method):
    """The Fisher information is computed once, at the start, from pseudo-labels of the source windows.

    The defaults are the setting for CIFAR-10-C, as in https://github.com/taeckyung/SoTTA (``tta.sh``): it is the one
    for few classes. For ImageNet-C, the authors (https://github.com/mr-eggplant/EATA) use
    ``lr=0.00025:redundant=0.05:fisher=2000``. Both are for batches of 64.

    Attributes:
        lr: learning rate of SGD with momentum 0.9.
        margin: E0 as a share of ln K.
        redundant: d, the similarity from which a window is redundant.
        fisher: weight of the anchor.

    >>> Eata().redundant
    0.4
    """

    name = "eata"
    about = "entropy on reliable, diverse windows with a Fisher anchor"
    source = "Niu et al. 2022, https://arxiv.org/abs/2204.02610"
    includes_current = True
    lr: float = 5e-3
    margin: float = 0.4
    redundant: float = 0.4
    fisher: float = 1.0

    def begin(self, model: nn.Module, source: Tensor, draw: torch.Generator) -> Step:
        use_batch_statistics(model)
        parameters = affine_parameters(model)
        importance = fisher_information(model, parameters, source)
        start = [p.detach().clone() for p in parameters]
        optimizer = eager(torch.optim.SGD)(parameters, self.lr, momentum=0.9)
        average: Tensor | None = None

        def step(x: Tensor) -> Tensor:
            nonlocal average
            logits: Tensor = model(x)
            h, p = entropy(logits), logits.softmax(1)
            e0 = self.margin * math.log(logits.shape[1])
            used = h < e0
            if average is not None:
                used = used & (F.cosine_similarity(p, average[None], dim=1).abs() < self.redundant)
            if not bool(used.any()):
                return logits
            mean = p[used].detach().mean(0)
            average = mean if average is None else 0.9 * average + 0.1 * mean
            loss = (torch.exp(e0 - h[used].detach()) * h[used]).mean()
            for parameter, initial, weight in zip(parameters, start, importance, strict=True):
                loss = loss + self.fisher * (weight * (parameter - initial) ** 2).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return logits

        return step


def fisher_information(model: nn.Module, parameters: list[nn.Parameter], source: Tensor) -> list[Tensor]:
    """Mean squared gradient of the loss on the model's own labels, over batches of source windows."""
    batches = [part for part in source.split(CHUNK) if len(part) > 1]
    total = [torch.zeros_like(p) for p in parameters]
    for rows in batches:
        out = model(rows)
        loss = F.cross_entropy(out, out.argmax(1))
        for acc, g in zip(total, torch.autograd.grad(loss, parameters, materialize_grads=True), strict=True):
            acc += g**2 / len(batches)
    return total
