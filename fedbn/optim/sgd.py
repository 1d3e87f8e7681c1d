"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedbn.config import Plan
from fedbn.optim.base import Optimizer
from fedbn.optim.eager import eager


@dataclass(frozen=True)
class SGD(Optimizer):
    """`torch.optim.SGD` with the plan's ``momentum`` and ``weight_decay``.

    >>> SGD().build([nn.Parameter(torch.ones(2))], Plan(momentum=0.5), 0.1).param_groups[0]["momentum"]
    0.5
    """

    name = "sgd"
    about = "stochastic gradient descent; options --momentum and --weight-decay"

    def build(self, parameters: Sequence[nn.Parameter], plan: Plan, lr: float) -> torch.optim.Optimizer:
        return eager(torch.optim.SGD)(list(parameters), lr=lr, momentum=plan.momentum, weight_decay=plan.weight_decay)

    def validate(self, plan: Plan) -> None:
        pass
