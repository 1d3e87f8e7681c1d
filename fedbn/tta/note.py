r"""NOTE: instance-aware BN, and entropy minimization on a memory balanced over predicted classes.

IABN moves the source's statistics towards a window's own only as far as chance does not explain: with instance moments
:math:`m,w` over :math:`L` positions and :math:`\psi(x;t)=\mathrm{sign}(x)\max(|x|-t,0)`,

.. math:: \mu=\mu_s+\psi(m-\mu_s;k s_\mu),\ s_\mu^2=\sigma_s^2/L;\qquad
          \sigma^2=[\sigma_s^2+\psi(w-\sigma_s^2;k s_\sigma)]_+,\ s_\sigma=\sigma_s^2\sqrt{2/(L-1)} .

The memory is prediction-balanced reservoir sampling (PBRS).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.nn.conversion import channels_of, replace_norms
from fedbn.nn.roles import keeps_statistics
from fedbn.tta.base import Method, Step, affine_parameters, entropy, learning_statistics, set_momentum


@dataclass(frozen=True)
class Note(Method):
    """Answers window by window; learns from the whole memory each time it could have been filled once more.

    Published numbers are of source models *trained* with IABN, which a model trained with BN is not.

    Attributes:
        lr: of Adam.
        k: width, in standard errors, within which a window keeps the source's statistics.
        capacity: windows in memory, and between two steps.
        momentum: of the running statistics, at a step.

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
        instance_aware(model, self.k)
        set_momentum(model, self.momentum)
        optimizer = torch.optim.Adam(affine_parameters(model), self.lr)
        memory = Reservoir(self.capacity, draw)
        since = 0

        def step(x: Tensor) -> Tensor:
            nonlocal since
            with torch.no_grad():
                answer: Tensor = model(x)
            for row, label in zip(x, answer.argmax(1).tolist(), strict=True):
                memory.add(row, label)
            since += len(x)
            if since >= self.capacity:
                since = 0
                with learning_statistics(model):
                    optimizer.zero_grad()
                    entropy(model(memory.windows())).mean().backward()
                    optimizer.step()
            return answer

        return step


@dataclass
class Reservoir:
    """PBRS: a memory in which every predicted class is a uniform sample of its windows, and classes are balanced.

    When full, a newcomer of a class that is not among the largest takes the place of a random window of a largest one;
    of a largest class it is kept with probability (its windows kept)/(its windows met), for a random one of its own.

    Attributes:
        capacity: windows.
        draw: for all randomness.
        items: (window, class), in order of arrival.
        met: class -> windows met so far.
    """

    capacity: int
    draw: torch.Generator
    items: list[tuple[Tensor, int]] = field(default_factory=list)
    met: dict[int, int] = field(default_factory=dict)

    def add(self, x: Tensor, label: int) -> None:
        """Meet one window ``[*shape]`` with its predicted class."""
        self.met[label] = self.met.get(label, 0) + 1
        if len(self.items) < self.capacity:
            self.items.append((x, label))
            return
        kept = {c: sum(c == other for _, other in self.items) for c in self.met}
        largest = {c for c, n in kept.items() if n == max(kept.values())}
        if label not in largest:
            out = largest
        elif float(torch.rand((), generator=self.draw)) <= kept[label] / self.met[label]:
            out = {label}
        else:
            return
        places = [i for i, (_, c) in enumerate(self.items) if c in out]
        self.items.pop(places[int(torch.randint(len(places), (), generator=self.draw))])
        self.items.append((x, label))

    def windows(self) -> Tensor:
        """All windows kept, ``[n, *shape]``."""
        return torch.stack([x for x, _ in self.items])


class InstanceAwareBN(AnyBatchNorm):
    """IABN on ``[N, C, *positions]``; in training mode around the batch's statistics, which are then gathered too."""

    def __init__(self, channels: int, k: float, eps: float, *, affine: bool) -> None:
        super().__init__(channels, eps=eps, affine=affine)
        self.k = k

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations, of the input's shape."""
        x = input.flatten(2) if input.dim() > 2 else input[:, :, None]
        if self.training:
            super().forward(input)  # gathers running statistics
            mean, var = x.mean((0, 2)), x.var((0, 2), correction=0)
        else:
            mean, var = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        mean, var = mean[None], var[None]
        positions = x.shape[2]
        if positions > 1:
            own_mean, own_var, scale = x.mean(2), x.var(2), var + self.eps
            mean = mean + shrunk(own_mean - mean, self.k * (scale / positions).sqrt())
            var = (var + shrunk(own_var - var, self.k * scale * (2 / (positions - 1)) ** 0.5)).clamp_min(0)
        out = (x - mean[..., None]) / (var[..., None] + self.eps).sqrt()
        if self.affine:
            out = out * self.weight[:, None] + self.bias[:, None]
        return out.view(input.shape)


def shrunk(x: Tensor, by: Tensor) -> Tensor:
    r"""Soft threshold :math:`\psi(x;t)=\mathrm{sign}(x)\max(|x|-t,0)`.

    >>> shrunk(torch.tensor([-3.0, 0.5, 2.0]), torch.tensor(1.0)).tolist()
    [-2.0, 0.0, 1.0]
    """
    return x.sign() * (x.abs() - by).clamp_min(0)


def instance_aware(model: nn.Module, k: float) -> nn.Module:
    """Put `InstanceAwareBN` with the same statistics in the place of every BN layer, in place."""

    def make(path: str, layer: nn.Module) -> nn.Module | None:
        if not keeps_statistics(layer):
            return None
        new = InstanceAwareBN(
            channels_of(layer), k, cast(float, layer.eps), affine=getattr(layer, "weight", None) is not None
        )
        new.to(cast(Tensor, layer.running_mean))
        new.load_state_dict(layer.state_dict())
        return new

    return replace_norms(model, make)
