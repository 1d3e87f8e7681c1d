r"""CoTTA: a slow teacher labels, a student learns, and a few random weights are restored to the source.

Teacher :math:`\theta'\leftarrow\alpha\theta'+(1-\alpha)\theta`. If the source model's confidence on a block is low, the
teacher predicts with the mean over augmented views. After each step every weight is restored to the source with
probability :math:`p`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedbn.nn.plain import copy_model
from fedbn.optim.eager import eager
from fedbn.tta.base import Method, Step, augment, use_batch_statistics


@dataclass(frozen=True)
class CoTTA(Method):
    """All weights are trained; the teacher predicts. Views are scaled and noisy windows instead of image changes.

    Attributes:
        lr: learning rate of Adam.
        keep: alpha, the weight of the teacher's old parameters.
        restore: p.
        views: number of augmented views.
        unsure: mean confidence of the source model below which the views are used.

    >>> CoTTA().keep
    0.999
    """

    name = "cotta"
    about = "mean teacher over augmented views, all weights, random restore"
    source = "Wang et al. 2022, https://arxiv.org/abs/2203.13591"
    includes_current = True
    needs = "class probabilities, which its teacher gives to a student"
    lr: float = 1e-3
    keep: float = 0.999
    restore: float = 0.01
    views: int = 8
    unsure: float = 0.92

    def begin(self, model: nn.Module, source: Tensor, draw: torch.Generator) -> Step:
        use_batch_statistics(model)
        anchor, teacher = copy_model(model), copy_model(model)
        student = model.requires_grad_()
        optimizer = eager(torch.optim.Adam)(student.parameters(), self.lr)

        def step(x: Tensor) -> Tensor:
            with torch.no_grad():
                logits: Tensor = teacher(x)
                if float(anchor(x).softmax(1).amax(1).mean()) < self.unsure:
                    logits = torch.stack([teacher(augment(x, draw, 0.05)) for _ in range(self.views)]).mean(0)
            optimizer.zero_grad()
            (-(logits.softmax(1) * student(x).log_softmax(1)).sum(1).mean()).backward()
            optimizer.step()
            with torch.no_grad():
                for slow, fast, initial in zip(*(net.parameters() for net in (teacher, student, anchor)), strict=True):
                    slow.lerp_(fast, 1 - self.keep)
                    restored = torch.rand(fast.shape, generator=draw).to(fast) < self.restore
                    fast.copy_(initial.where(restored, fast))
            return logits

        return step
