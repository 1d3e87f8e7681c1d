"""SoTTA: sharpness-aware entropy minimization on a class-balanced memory of confident windows.

High-confidence uniform-class sampling excludes foreign windows: a window with low confidence is predicted and not
stored. When the memory is full, a random window of a largest class is replaced.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedbn.optim.eager import eager
from fedbn.tta.base import (
    Method,
    Step,
    affine_parameters,
    bn_training,
    entropy,
    has_variance,
    parts_until_steps,
    set_momentum,
    sharpness_aware_step,
)


@dataclass(frozen=True)
class Sotta(Method):
    """Predicts with running statistics, which each step on the memory updates. Blocks have no effect.

    Attributes:
        lr: learning rate of Adam.
        confident: minimum probability of a stored window.
        capacity: windows in memory, and between two steps.
        momentum: of the running statistics, in a step.
        rho: distance up the slope at which the gradient is taken.

    >>> Sotta().confident
    0.99
    """

    name = "sotta"
    about = "sharpness-aware entropy on a memory of confident windows"
    source = "Gong et al. 2023, https://arxiv.org/abs/2310.10074"
    includes_current = False
    block: int = 1
    lr: float = 1e-3
    confident: float = 0.99
    capacity: int = 64
    momentum: float = 0.2
    rho: float = 0.05

    def begin(self, model: nn.Module, source: Tensor, draw: torch.Generator) -> Step:
        set_momentum(model, self.momentum)
        optimizer = eager(torch.optim.Adam)(affine_parameters(model), self.lr)
        memory = ConfidentMemory(self.capacity, self.confident, draw)
        seen = 0

        def step(x: Tensor) -> Tensor:
            nonlocal seen
            outputs: list[Tensor] = []
            for part in parts_until_steps(x, seen, self.capacity):
                with torch.no_grad():
                    outputs.append(model(part))
                for row, p, label in zip(part, *outputs[-1].softmax(1).max(1), strict=True):
                    memory.add(row, int(label), float(p))
                seen += len(part)
                if seen % self.capacity == 0 and memory.items:
                    learn(torch.stack([w for w, _ in memory.items]))
            return torch.cat(outputs)

        def learn(windows: Tensor) -> None:
            if has_variance(model, windows):
                with bn_training(model):
                    sharpness_aware_step(optimizer, lambda: entropy(model(windows)).mean(), self.rho)

        return step


@dataclass
class ConfidentMemory:
    """HUS: a class-balanced memory of confident windows.

    Attributes:
        capacity: windows.
        threshold: minimum probability of a stored window.
        draw: source of all randomness.
        items: (window, class), in order of arrival.
    """

    capacity: int
    threshold: float
    draw: torch.Generator
    items: list[tuple[Tensor, int]] = field(default_factory=list)

    def add(self, x: Tensor, label: int, confidence: float) -> None:
        """Offer one window ``[*shape]``."""
        if confidence < self.threshold:
            return
        if len(self.items) >= self.capacity:
            labels = [c for _, c in self.items]
            most = max(map(labels.count, set(labels)))
            largest = {c for c in labels if labels.count(c) == most}
            classes = {label} if label in largest else largest
            candidates = [i for i, c in enumerate(labels) if c in classes]
            self.items.pop(candidates[int(torch.randint(len(candidates), (), generator=self.draw))])
        self.items.append((x, label))
