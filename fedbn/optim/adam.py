"""Adam (Kingma, Ba, ICLR 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedbn.config import Plan
from fedbn.errors import UserError
from fedbn.optim.base import Optimizer
from fedbn.optim.eager import eager


@dataclass(frozen=True)
class Adam(Optimizer):
    r"""`torch.optim.Adam`: steps along :math:`\hat m/(\sqrt{\hat v}+\epsilon)`. https://arxiv.org/abs/1412.6980

    Attributes:
        betas: decay rates of the running means of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: weight of the L2 penalty, which is part of the gradient.

    Raises:
        UserError: a value is out of bounds.

    >>> Adam(betas=(0.9, 0.99)).betas
    (0.9, 0.99)
    """

    name = "adam"
    about = "Adam; options betas, eps, weight_decay"
    default_lr = 0.001
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"{self.name}: betas must be two numbers from 0 to below 1, e.g. betas=0.9+0.999")
        if self.eps < 0 or self.weight_decay < 0:
            raise UserError(f"{self.name}: eps and weight_decay must be 0 or more")

    def build(self, parameters: Sequence[nn.Parameter], plan: Plan, lr: float) -> torch.optim.Optimizer:
        return eager(torch.optim.Adam)(
            list(parameters),
            lr=lr,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
