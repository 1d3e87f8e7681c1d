"""Published methods that adapt by gradients or smooth outputs, for comparison under the same protocol. One file each.

They follow one user at a time, take windows in blocks, and most keep raw windows in memory: the price that rules on
statistics alone do not pay. What an image paper augments by crops and colors, sensors get as scaling and noise; that
is said where it is so.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.nn.conversion import require_norms
from fedbn.nn.roles import head, keeps_statistics, norm_layers, statistics_layers
from fedbn.plugins import discover, parse, render
from fedbn.seeds import generator

Step = Callable[[Tensor], Tensor]
"""Answers windows ``[b, *shape]`` with logits ``[b, classes]``, and learns."""


@dataclass(frozen=True)
class Method(ABC):
    """A method as a value: fields are hyper-parameters; subclasses lie one to a file in ``fedbn.tta``.

    Attributes:
        name: what the command line calls it.
        about: one line for lists.
        source: authors, year, link.
        includes_current: a window is inside the statistics or the neighbourhood that its own answer depends on.
        block: windows it takes at once.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    source: ClassVar[str]
    includes_current: ClassVar[bool]

    block: int = 16

    def __post_init__(self) -> None:
        if self.block < 1:
            raise UserError(f"method {self.name!r}: block must be at least 1, not {self.block}")

    @abstractmethod
    def begin(self, model: nn.Module, source: Tensor, draw: torch.Generator) -> Step:
        """Set out from a model.

        Args:
            model: in evaluation mode; the method's own to change.
            source: ``[n, *shape]`` unlabeled windows of the kind that the model was trained on.
            draw: for all randomness.
        """


class Adapter:
    """A method at work on one user's stream; `reset` takes it back to where it began, bit for bit."""

    def __init__(self, method: Method, model: nn.Module, source: Tensor, seed: int = 0) -> None:
        self._begin = lambda: method.begin(
            copy.deepcopy(model).eval().requires_grad_(False), source, generator(seed, "adapt", render(method))
        )
        self._step = self._begin()

    def __call__(self, x: Tensor) -> Tensor:
        """Logits ``[b, classes]`` of windows ``[b, *shape]``, learning on the way."""
        return self._step(x).detach()

    def reset(self) -> None:
        """Forget everything since the beginning."""
        self._step = self._begin()


def methods() -> dict[str, type[Method]]:
    """All methods found, by name."""
    return discover("fedbn.tta", Method)


def method(text: str) -> Method:
    """The method that a text such as ``tent`` or ``tent:lr=0.01:block=32`` names.

    Raises:
        UserError: unknown name or option, or an option out of range.
    """
    return parse(text, "method", methods())


# ---------------------------------------------------------------- what methods share


def entropy(outputs: Tensor) -> Tensor:
    r""":math:`H(p)=-\sum_k p_k\log p_k` of each row of logits ``[n, K]``, in nats.

    >>> round(float(entropy(torch.zeros(1, 4)).exp()), 4)
    4.0
    """
    logp = outputs.log_softmax(1)
    return -(logp.exp() * logp).sum(1)


def affine_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Scale and shift of all normalization layers, set to require gradients.

    Raises:
        UserError: there are none.
    """
    require_norms(model, "adaptation of scale and shift")
    found: list[nn.Parameter] = [p for layer in norm_layers(model).values() for p in layer.parameters(recurse=False)]
    if not found:
        raise UserError(
            "the model's normalization layers have no scale and shift to adapt: build them with affine=True"
        )
    for p in found:
        p.requires_grad_()
    return found


def use_batch_statistics(model: nn.Module) -> None:
    """Let every BN layer normalize by the statistics of the batch at hand, in place.

    Nado et al. 2020 (prediction-time BN), https://arxiv.org/abs/2006.10963
    """
    for layer in statistics_layers(model).values():
        layer.register_buffer("running_mean", None)
        layer.register_buffer("running_var", None)


@contextmanager
def learning_statistics(model: nn.Module) -> Iterator[None]:
    """BN layers in training mode, everything else (dropout) in evaluation mode."""
    layers = [m for m in model.modules() if keeps_statistics(m)]
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer in layers:
            layer.eval()


def set_momentum(model: nn.Module, momentum: float) -> None:
    """Weight of a new batch in the running statistics of every BN layer."""
    for layer in statistics_layers(model).values():
        layer.momentum = momentum  # type: ignore[assignment]


def scaled_and_noisy(x: Tensor, draw: torch.Generator, strength: float) -> Tensor:
    """Sensor windows ``[n, C, *positions]`` scaled per channel and with noise, both N(0, strength) relative.

    Stands in for the crops, flips and color changes of image papers, which mean nothing for sensors.
    """
    shape = (*x.shape[:2], *[1] * (x.dim() - 2))
    scale = 1 + strength * torch.randn(shape, generator=draw)
    level = x.std(dim=tuple(range(2, x.dim())), keepdim=True) if x.dim() > 2 else x.abs()
    noise = torch.randn(x.shape, generator=draw)
    return x * scale.to(x) + strength * level * noise.to(x)


def features_of(model: nn.Module) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The classifier, and a function giving its input at the last forward pass, ``[n, features]``.

    Raises:
        UserError: the model has no linear classifier.
    """
    path = head(model)
    last = model.get_submodule(path) if path is not None else None
    if not isinstance(last, nn.Linear):
        raise UserError("output smoothing works on the input of a last linear layer, which this model does not have")
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[:] = [args[0].detach()]

    last.register_forward_pre_hook(keep)
    return last, lambda: seen[0]


def sharpness_aware(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor | None], rho: float) -> Tensor | None:
    r"""One step against the gradient taken :math:`\rho` up the slope.

    Foret et al. 2021 (SAM), https://arxiv.org/abs/2010.01412

    Args:
        optimizer: of the parameters to move.
        loss: evaluated at the parameters and again up the slope; None where there is nothing to learn from.
        rho: distance.

    Returns:
        The second loss; None if there was nothing to learn from, and then nothing has moved.
    """
    moved = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    first = loss()
    if first is None:
        return None
    first.backward()
    norm = torch.stack([cast(Tensor, p.grad).norm() for p in moved]).norm() + 1e-12
    up = [rho * cast(Tensor, p.grad) / norm for p in moved]
    before = [p.detach().clone() for p in moved]
    with torch.no_grad():
        for p, e in zip(moved, up, strict=True):
            p.add_(e)
    optimizer.zero_grad()
    second = loss()
    if second is not None:
        second.backward()
    with torch.no_grad():
        for p, old in zip(moved, before, strict=True):
            p.copy_(old)
    if second is None:
        return None
    optimizer.step()
    return second.detach()
