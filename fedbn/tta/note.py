"""NOTE: instance-aware BN, and entropy minimization on a memory balanced over predicted classes.

IABN moves the source's statistics towards a window's own only beyond what sampling error explains (formulas in
`fedbn.online.rules.iabn.IABN`). The memory is prediction-balanced reservoir sampling (PBRS).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.optim.eager import eager
from fedbn.tta.base import (
    Method,
    Step,
    affine_parameters,
    bn_training,
    entropy,
    has_variance,
    parts_until_steps,
    replace_bn,
    set_momentum,
)


@dataclass(frozen=True)
class Note(Method):
    """Predicts window by window; trains on the whole memory after every ``capacity`` windows. Blocks have no effect.

    Published numbers are of source models *trained* with IABN. A model trained with BN differs.

    Attributes:
        lr: learning rate of Adam.
        k: width, in standard errors, within which a window uses the source's statistics.
        capacity: windows in memory, and between two steps.
        momentum: of the running statistics, in a step.

    >>> Note().block
    1
    """

    name = "note"
    about = "instance-aware BN, entropy on a prediction-balanced memory"
    source = "Gong et al. 2022, https://arxiv.org/abs/2208.05117"
    includes_current = True
    block: int = 1
    lr: float = 1e-4
    k: float = 4.0
    capacity: int = 64
    momentum: float = 0.01

    def begin(self, model: nn.Module, source: Tensor, draw: torch.Generator) -> Step:
        replace_bn(model, InstanceAwareBN, k=self.k)
        set_momentum(model, self.momentum)
        optimizer = eager(torch.optim.Adam)(affine_parameters(model), self.lr)
        memory = Reservoir(self.capacity, draw)
        seen = 0

        def step(x: Tensor) -> Tensor:
            nonlocal seen
            outputs: list[Tensor] = []
            for part in parts_until_steps(x, seen, self.capacity):
                with torch.no_grad():
                    outputs.append(model(part))
                for row, label in zip(part, outputs[-1].argmax(1).tolist(), strict=True):
                    memory.add(row, label)
                seen += len(part)
                if seen % self.capacity == 0 and has_variance(model, windows := memory.windows()):
                    with bn_training(model):
                        optimizer.zero_grad()
                        entropy(model(windows)).mean().backward()
                        optimizer.step()
            return torch.cat(outputs)

        return step


@dataclass
class Reservoir:
    """PBRS: a class-balanced memory; the windows of each predicted class are a uniform sample of those seen.

    When the memory is full, a new window of a class that is not among the largest replaces a random window of a largest
    class. A new window of a largest class is stored with probability (windows stored)/(windows seen) of its class, and
    replaces a random one of the same class.

    Attributes:
        capacity: windows.
        draw: source of all randomness.
        items: (window, class), in order of arrival.
        num_seen: number of windows seen so far, by class.
    """

    capacity: int
    draw: torch.Generator
    items: list[tuple[Tensor, int]] = field(default_factory=list)
    num_seen: dict[int, int] = field(default_factory=dict)

    def add(self, x: Tensor, label: int) -> None:
        """Offer one window ``[*shape]`` with its predicted class."""
        self.num_seen[label] = self.num_seen.get(label, 0) + 1
        if len(self.items) < self.capacity:
            self.items.append((x, label))
            return
        count = {c: sum(c == other for _, other in self.items) for c in self.num_seen}
        largest = {c for c, n in count.items() if n == max(count.values())}
        if label not in largest:
            classes = largest
        elif float(torch.rand((), generator=self.draw)) <= count[label] / self.num_seen[label]:
            classes = {label}
        else:
            return
        candidates = [i for i, (_, c) in enumerate(self.items) if c in classes]
        self.items.pop(candidates[int(torch.randint(len(candidates), (), generator=self.draw))])
        self.items.append((x, label))

    def windows(self) -> Tensor:
        """All stored windows, ``[n, *shape]``."""
        return torch.stack([x for x, _ in self.items])


class InstanceAwareBN(AnyBatchNorm):
    """IABN on ``[N, C, *positions]``.

    Training mode uses the batch's mean and unbiased variance, as in https://github.com/TaesikGong/NOTE, and updates the
    running statistics.
    """

    def __init__(self, channels: int, k: float, eps: float, *, affine: bool) -> None:
        super().__init__(channels, eps=eps, affine=affine)
        self.k = k

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations, of the input's shape."""
        x = input.flatten(2) if input.dim() > 2 else input[:, :, None]
        mean, var = self.running_mean, self.running_var
        if self.training:
            super().forward(input)  # updates the running statistics
            mean, var = x.mean((0, 2)), x.var((0, 2))
        positions = x.shape[2]
        if positions > 1:
            own_mean, own_var, scale = x.mean(2), x.var(2), var + self.eps
            mean = mean + soft_threshold(own_mean - mean, self.k * (scale / positions).sqrt())
            var = (var + soft_threshold(own_var - var, self.k * scale * (2 / (positions - 1)) ** 0.5)).clamp_min(0)
        out = (x - mean[..., None]) / (var[..., None] + self.eps).sqrt()
        return self.scale_and_shift(out.view(input.shape))


def soft_threshold(x: Tensor, t: Tensor) -> Tensor:
    r""":math:`\psi(x;t)=\mathrm{sign}(x)\max(|x|-t,0)`.

    >>> soft_threshold(torch.tensor([-3.0, 0.5, 2.0]), torch.tensor(1.0)).tolist()
    [-2.0, 0.0, 1.0]
    """
    return x.sign() * (x.abs() - t).clamp_min(0)
