r"""RoTTA: a teacher predicts; a student learns from a class-balanced memory of recent, certain windows.

*Robust BN* normalizes by running statistics that a step on the memory has just moved by 0.05. *CSTU* memory: each class
has :math:`N/K` places. A new window of a class replaces the one with the highest
:math:`\lambda_t/(1+e^{-a/N})+\lambda_u H/\ln K` (age :math:`a`, entropy :math:`H`) if its own value is lower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedbn.nn.batchnorm import AnyBatchNorm, along
from fedbn.nn.plain import copy_model
from fedbn.optim.eager import eager
from fedbn.tta.base import Method, Step, affine_parameters, augment, bn_training, entropy, replace_bn, set_momentum


@dataclass(frozen=True)
class Rotta(Method):
    """The student trains on scaled and noisy windows instead of image changes. Both networks update their statistics.

    A block is predicted as a whole; its windows are then stored one by one, with a step after every ``capacity``
    windows of the stream.

    Attributes:
        lr: learning rate of Adam.
        nu: the teacher's rate.
        capacity: windows in memory, and between two steps.
        momentum: of robust BN.

    >>> Rotta().nu
    0.001
    """

    name = "rotta"
    about = "robust BN, mean teacher on a balanced, timely memory"
    source = "Yuan, Xie, Li 2023, https://arxiv.org/abs/2303.13899"
    includes_current = False
    block: int = 1
    lr: float = 1e-3
    nu: float = 1e-3
    capacity: int = 64
    momentum: float = 0.05

    def begin(self, model: nn.Module, source: Tensor, draw: torch.Generator) -> Step:
        student = replace_bn(model, RobustBN)
        set_momentum(student, self.momentum)
        teacher = copy_model(student)
        optimizer = eager(torch.optim.Adam)(affine_parameters(student), self.lr)
        memory: Memory | None = None
        seen = 0

        def step(x: Tensor) -> Tensor:
            nonlocal memory, seen
            with torch.no_grad():
                logits: Tensor = teacher(x)
            memory = memory or Memory(self.capacity, logits.shape[1])
            for row, label, h in zip(x, logits.argmax(1).tolist(), entropy(logits).tolist(), strict=True):
                memory.add(row, label, h)
                seen += 1
                if seen % self.capacity == 0:
                    learn(*memory.windows())
            return logits

        def learn(windows: Tensor, age: Tensor) -> None:
            with bn_training(student), bn_training(teacher):
                with torch.no_grad():
                    target = teacher(windows).softmax(1)
                logp = student(augment(windows, draw, 0.05)).log_softmax(1)
            timeliness = torch.exp(-age) / (1 + torch.exp(-age))
            optimizer.zero_grad()
            (timeliness.to(logp) * -(target * logp).sum(1)).mean().backward()
            optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                    slow.lerp_(fast, self.nu)

        return step


@dataclass
class Item:
    """A window in memory: its predicted class, entropy in nats, and age in windows."""

    x: Tensor
    label: int
    entropy: float
    age: int = 0


@dataclass
class Memory:
    """CSTU: category-balanced sampling with timeliness and uncertainty.

    Attributes:
        capacity: N.
        classes: K.
        items: stored windows.
    """

    capacity: int
    classes: int
    items: list[Item] = field(default_factory=list)

    def score(self, item: Item) -> float:
        """Age plus uncertainty, each in [0, 1]. Items with a high score are replaced first."""
        return 1 / (1 + math.exp(-item.age / self.capacity)) + item.entropy / math.log(self.classes)

    def add(self, x: Tensor, label: int, h: float) -> None:
        """Offer one window ``[*shape]``; the age of all others grows by one."""
        new = Item(x, label, h)
        count = [sum(i.label == c for i in self.items) for c in range(self.classes)]
        full = len(self.items) >= self.capacity
        if count[label] >= self.capacity / self.classes:
            classes = {label}
        elif full:
            classes = {c for c in range(self.classes) if count[c] == max(count)}
        else:
            classes = set()
        worst = max((i for i in self.items if i.label in classes), key=self.score, default=None)
        if worst is None or self.score(worst) > self.score(new):
            self.items = [*(i for i in self.items if i is not worst), new]
        for item in self.items:
            item.age += 1

    def windows(self) -> tuple[Tensor, Tensor]:
        """Stored windows, ``[n, *shape]``, and their ages in units of the capacity, ``[n]``."""
        ages = torch.tensor([i.age / self.capacity for i in self.items])
        return torch.stack([i.x for i in self.items]), ages


class RobustBN(AnyBatchNorm):
    """BN that always normalizes by its running statistics, which training mode updates first."""

    momentum: float

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations, of the input's shape."""
        mean, var = self.running_mean, self.running_var
        if self.training:
            axes = [0, *range(2, input.dim())]
            mean = torch.lerp(mean, input.mean(axes), self.momentum)
            var = torch.lerp(var, input.var(axes, correction=0), self.momentum)
            self.running_mean, self.running_var = mean.detach(), var.detach()
        return self.scale_and_shift((input - along(mean, input)) / (along(var, input) + self.eps).sqrt())
