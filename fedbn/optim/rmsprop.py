"""RMSprop (Tieleman, Hinton, 2012)."""

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
class RMSprop(Optimizer):
    r"""`torch.optim.RMSprop`: steps along :math:`g/(\sqrt v+\epsilon)`.

    Lecture 6.5, https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf

    Attributes:
        alpha: decay rate of the running mean :math:`v` of the squared gradient.
        eps: added to the denominator.
        momentum: momentum of the steps.
        weight_decay: weight of the L2 penalty, which is part of the gradient.

    Raises:
        UserError: a value is out of bounds.

    >>> RMSprop(alpha=0.9).alpha
    0.9
    """

    name = "rmsprop"
    about = "RMSprop; options alpha, eps, momentum, weight_decay"
    default_lr = 0.001
    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.alpha < 1 and 0 <= self.momentum < 1):
            raise UserError("rmsprop: alpha and momentum must be from 0 to below 1")
        if self.eps < 0 or self.weight_decay < 0:
            raise UserError("rmsprop: eps and weight_decay must be 0 or more")

    def build(self, parameters: Sequence[nn.Parameter], plan: Plan, lr: float) -> torch.optim.Optimizer:
        return eager(torch.optim.RMSprop)(
            list(parameters),
            lr=lr,
            alpha=self.alpha,
            eps=self.eps,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
