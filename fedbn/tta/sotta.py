"""SoTTA: entropy minimization, towards flat minima, on a class-balanced memory of confident windows only.

High-confidence uniform-class sampling keeps foreign windows out: a window that the model is not sure of is answered
and forgotten. When the memory is full a random window of a largest class gives way.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedbn.tta.base import Method, Step, affine_parameters, entropy, learning_statistics, set_momentum, sharpness_aware


@dataclass(frozen=True)
class Sotta(Method):
    """Answers by running statistics, which a step on the memory moves.

    Attributes:
        lr: of Adam.
        confident: probability from which a window is kept.
        capacity: windows in memory, and met between two steps.
        momentum: of the running statistics, at a step.
        rho: how far up the slope the gradient is taken.

    >>> Sotta().confident
    0.99
    """

    name = "sotta"
    about = "sharpness-aware entropy on a balanced memory of confident windows"
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
        optimizer = torch.optim.Adam(affine_parameters(model), self.lr)
        memory = ConfidentMemory(self.capacity, self.confident, draw)
        since = 0

        def step(x: Tensor) -> Tensor:
            nonlocal since
            with torch.no_grad():
                answer: Tensor = model(x)
            sure = answer.softmax(1).max(1)
            for row, p, label in zip(x, sure.values.tolist(), sure.indices.tolist(), strict=True):
                memory.add(row, label, p)
            since += len(x)
            if since >= self.capacity and len(memory.items) > 1:
                since = 0
                windows = torch.stack([w for w, _ in memory.items])
                with learning_statistics(model):
                    sharpness_aware(optimizer, lambda: entropy(model(windows)).mean(), self.rho)
            return answer

        return step


@dataclass
class ConfidentMemory:
    """HUS: confident windows, classes balanced.

    Attributes:
        capacity: windows.
        threshold: probability from which a window is kept.
        draw: for all randomness.
        items: (window, class), in order of arrival.
    """

    capacity: int
    threshold: float
    draw: torch.Generator
    items: list[tuple[Tensor, int]] = field(default_factory=list)

    def add(self, x: Tensor, label: int, confidence: float) -> None:
        """Meet one window ``[*shape]``."""
        if confidence < self.threshold:
            return
        if len(self.items) >= self.capacity:
            labels = [c for _, c in self.items]
            most = max(map(labels.count, set(labels)))
            largest = {c for c in labels if labels.count(c) == most}
            out = {label} if label in largest else largest
            places = [i for i, c in enumerate(labels) if c in out]
            self.items.pop(places[int(torch.randint(len(places), (), generator=self.draw))])
        self.items.append((x, label))
