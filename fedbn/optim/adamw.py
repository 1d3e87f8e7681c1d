"""AdamW (Loshchilov, Hutter, ICLR 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedbn.config import Plan
from fedbn.optim.adam import Adam
from fedbn.optim.eager import eager


@dataclass(frozen=True)
class AdamW(Adam):
    r"""`torch.optim.AdamW`: Adam with weights that shrink by the factor :math:`1-\eta\lambda` in each step.

    https://arxiv.org/abs/1711.05101

    Attributes:
        weight_decay: :math:`\lambda`.

    >>> AdamW().weight_decay
    0.01
    """

    name = "adamw"
    about = "Adam with decoupled weight decay; options betas, eps, weight_decay"
    weight_decay: float = 0.01

    def build(self, parameters: Sequence[nn.Parameter], plan: Plan, lr: float) -> torch.optim.Optimizer:
        return eager(torch.optim.AdamW)(
            list(parameters),
            lr=lr,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
