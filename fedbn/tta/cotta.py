r"""CoTTA: a slow teacher labels, a student learns, and a few weights go back to the source at random.

Teacher :math:`\theta'\leftarrow\alpha\theta'+(1-\alpha)\theta`; where the source model is unsure of a block the teacher
answers by the mean over augmented views; after each step every weight returns to the source with probability
:math:`p`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedbn.tta.base import Method, Step, scaled_and_noisy, use_batch_statistics


@dataclass(frozen=True)
class CoTTA(Method):
    """All weights learn; the answer is the teacher's. Views are scaled and noisy windows instead of image changes.

    Attributes:
        lr: of Adam.
        keep: alpha, the teacher's inertia.
        restore: p.
        views: augmented views, where they are used.
        unsure: mean confidence of the source model below which they are.

    >>> CoTTA().keep
    0.999
    """

    name = "cotta"
    about = "mean teacher over augmented views, all weights, random restore"
    source = "Wang et al. 2022, https://arxiv.org/abs/2203.13591"
    includes_current = True
    lr: float = 1e-3
    keep: float = 0.999
    restore: float = 0.01
    views: int = 8
    unsure: float = 0.92

    def begin(self, model: nn.Module, source: Tensor, draw: torch.Generator) -> Step:
        use_batch_statistics(model)
        anchor, teacher = copy.deepcopy(model), copy.deepcopy(model)
        student = model.requires_grad_()
        optimizer = torch.optim.Adam(student.parameters(), self.lr)

        def step(x: Tensor) -> Tensor:
            with torch.no_grad():
                answer: Tensor = teacher(x)
                if float(anchor(x).softmax(1).amax(1).mean()) < self.unsure:
                    views = [teacher(scaled_and_noisy(x, draw, 0.05)) for _ in range(self.views)]
                    answer = torch.stack(views).mean(0)
            optimizer.zero_grad()
            loss = -(answer.softmax(1) * student(x).log_softmax(1)).sum(1).mean()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                sides = zip(teacher.parameters(), student.parameters(), anchor.parameters(), strict=True)
                for slow, fast, old in sides:
                    slow.lerp_(fast, 1 - self.keep)
                    back = torch.rand(fast.shape, generator=draw).to(fast) < self.restore
                    fast.copy_(old.where(back, fast))
            return answer

        return step
