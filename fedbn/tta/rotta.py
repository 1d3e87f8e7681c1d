r"""RoTTA: a teacher answers; a student learns from a memory balanced over classes, timely and certain.

*Robust BN* normalizes by running statistics that a step on the memory has just moved by 0.05. *CSTU* memory: each class
has :math:`N/K` places; of windows of one class the one with the highest
:math:`\lambda_t/(1+e^{-a/N})+\lambda_u H/\ln K` (age :math:`a`, entropy :math:`H`) gives way to a newcomer with less.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.nn.conversion import channels_of, replace_norms
from fedbn.nn.roles import keeps_statistics
from fedbn.tta.base import Method, Step, affine_parameters, entropy, learning_statistics, scaled_and_noisy, set_momentum


@dataclass(frozen=True)
class Rotta(Method):
    """The student sees scaled and noisy windows instead of image changes; both track their own statistics.

    Attributes:
        lr: of Adam.
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
        student = robust(model)
        set_momentum(student, self.momentum)
        teacher = copy.deepcopy(student)
        optimizer = torch.optim.Adam(affine_parameters(student), self.lr)
        memory: Memory | None = None
        since = 0

        def step(x: Tensor) -> Tensor:
            nonlocal memory, since
            with torch.no_grad():
                answer: Tensor = teacher(x)
            memory = memory or Memory(self.capacity, answer.shape[1])
            for row, label, h in zip(x, answer.argmax(1).tolist(), entropy(answer).tolist(), strict=True):
                memory.add(row, label, h)
            since += len(x)
            if since >= self.capacity:
                since = 0
                windows, age = memory.windows()
                with learning_statistics(student), learning_statistics(teacher):
                    with torch.no_grad():
                        target = teacher(windows).softmax(1)
                    said = student(scaled_and_noisy(windows, draw, 0.05)).log_softmax(1)
                timely = torch.exp(-age) / (1 + torch.exp(-age))
                optimizer.zero_grad()
                (timely.to(said) * -(target * said).sum(1)).mean().backward()
                optimizer.step()
                with torch.no_grad():
                    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                        slow.lerp_(fast, self.nu)
            return answer

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
    """CSTU: class-balanced, timely, certain.

    Attributes:
        capacity: N.
        classes: K.
        items: windows kept.
    """

    capacity: int
    classes: int
    items: list[Item] = field(default_factory=list)

    def score(self, item: Item) -> float:
        """What speaks against an item: age and uncertainty, each in [0, 1]."""
        return 1 / (1 + math.exp(-item.age / self.capacity)) + item.entropy / math.log(self.classes)

    def add(self, x: Tensor, label: int, h: float) -> None:
        """Meet one window ``[*shape]``; all others grow older by one."""
        new = Item(x, label, h)
        count = [sum(i.label == c for i in self.items) for c in range(self.classes)]
        full = len(self.items) >= self.capacity
        if count[label] >= self.capacity / self.classes:
            rivals = {label}
        elif full:
            rivals = {c for c in range(self.classes) if count[c] == max(count)}
        else:
            rivals = set()
        worst = max((i for i in self.items if i.label in rivals), key=self.score, default=None)
        if worst is None or self.score(worst) > self.score(new):
            self.items = [*(i for i in self.items if i is not worst), new]
        for item in self.items:
            item.age += 1

    def windows(self) -> tuple[Tensor, Tensor]:
        """Windows kept, ``[n, *shape]``, and their ages in units of the capacity, ``[n]``."""
        ages = torch.tensor([i.age / self.capacity for i in self.items])
        return torch.stack([i.x for i in self.items]), ages


class RobustBN(AnyBatchNorm):
    """BN that normalizes by its running statistics always; in training mode after they have moved to the batch's."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations, of the input's shape."""
        mean, var = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        if self.training:
            axes = [0, *range(2, input.dim())]
            rate = cast(float, self.momentum)
            mean = torch.lerp(mean, input.mean(axes), rate)
            var = torch.lerp(var, input.var(axes, correction=0), rate)
            self.running_mean, self.running_var = mean.detach(), var.detach()
        shape = (1, -1, *[1] * (input.dim() - 2))
        out = (input - mean.view(shape)) / (var.view(shape) + self.eps).sqrt()
        return out * self.weight.view(shape) + self.bias.view(shape) if self.affine else out


def robust(model: nn.Module) -> nn.Module:
    """Put `RobustBN` with the same statistics in the place of every BN layer, in place."""

    def make(path: str, layer: nn.Module) -> nn.Module | None:
        if not keeps_statistics(layer):
            return None
        new = RobustBN(
            channels_of(layer), eps=cast(float, layer.eps), affine=getattr(layer, "weight", None) is not None
        )
        new.to(cast(Tensor, layer.running_mean))
        new.load_state_dict(layer.state_dict())
        return new

    return replace_norms(model, make)
