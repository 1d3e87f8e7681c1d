"""Published test-time adaptation methods that adapt by gradients or smooth outputs, as baselines. One file each.

They follow one user at a time and take windows in blocks, and most keep raw windows in memory. Rules that use
statistics alone need none of this. Where an image paper augments by crops and colors, the methods here scale sensor
windows and add noise; their docstrings say so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedbn.errors import UserError
from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.nn.conversion import channels_of, replace_norms, require_norms
from fedbn.nn.hooks import capture_inputs
from fedbn.nn.plain import copy_model
from fedbn.nn.roles import head_layer, keeps_statistics, norm_layers, statistics_layers
from fedbn.plugins import discover, parse, render
from fedbn.seeds import generator

Step = Callable[[Tensor], Tensor]
"""Predicts windows ``[b, *shape]`` as logits ``[b, classes]``, and adapts."""


@dataclass(frozen=True)
class Method(ABC):
    """Base class of methods. Fields are hyperparameters; each subclass has its own file in ``fedbn.tta``.

    Attributes:
        name: name on the command line.
        about: one-line description for lists.
        source: authors, year, link.
        includes_current: whether a window is part of the statistics or the neighborhood that its own prediction uses.
        needs: what it needs of the outputs, for messages; empty if it works for every task.
        block: windows per step.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    source: ClassVar[str]
    includes_current: ClassVar[bool]
    needs: ClassVar[str] = "the entropy of class probabilities"

    block: int = 16

    def __post_init__(self) -> None:
        for option in ("block", "capacity"):
            if (value := getattr(self, option, 1)) < 1:
                raise UserError(f"method {self.name!r}: {option} must be at least 1, not {value}")

    @abstractmethod
    def begin(self, model: nn.Module, source: Tensor, draw: torch.Generator) -> Step:
        """Start adaptation of a model.

        Args:
            model: in evaluation mode; the method may modify it.
            source: ``[n, *shape]`` unlabeled windows from the distribution that the model was trained on.
            draw: source of all randomness.
        """


class Adapter:
    """A method applied to one user's stream. `reset` restores the initial state bit for bit."""

    def __init__(self, method: Method, model: nn.Module, source: Tensor, seed: int = 0) -> None:
        self._begin = lambda: method.begin(
            copy_model(model).eval().requires_grad_(False), source, generator(seed, "adapt", render(method))
        )
        self._step = self._begin()

    def __call__(self, x: Tensor) -> Tensor:
        """Logits ``[b, classes]`` for windows ``[b, *shape]``; adapts to them."""
        return self._step(x).detach()

    def reset(self) -> None:
        """Discard all adaptation."""
        self._step = self._begin()


def methods() -> dict[str, type[Method]]:
    """All methods, by name."""
    return discover("fedbn.tta", Method)


def method(text: str) -> Method:
    """Parse a method from text such as ``tent`` or ``tent:lr=0.01:block=32``.

    Raises:
        UserError: unknown name or option, or an option out of range.
    """
    return parse(text, "method", methods())


# ---------------------------------------------------------------- shared by methods


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
        UserError: the model has none.
    """
    require_norms(model, "adaptation of scale and shift")
    parameters = [p for layer in norm_layers(model).values() for p in layer.parameters(recurse=False)]
    if not parameters:
        raise UserError("the normalization layers have no scale and shift to adapt: build them with affine=True")
    for p in parameters:
        p.requires_grad_()
    return parameters


def use_batch_statistics(model: nn.Module) -> None:
    """Make every BN layer normalize by the statistics of the current batch, in place.

    Nado et al. 2020 (prediction-time BN), https://arxiv.org/abs/2006.10963
    """
    for layer in statistics_layers(model).values():
        layer.register_buffer("running_mean", None)
        layer.register_buffer("running_var", None)


def replace_bn(model: nn.Module, cls: type[AnyBatchNorm], **options: Any) -> nn.Module:
    """Replace every BN layer by ``cls(channels, eps=, affine=, **options)`` with the same state, in place."""

    def make(path: str, layer: nn.Module) -> nn.Module | None:
        if not keeps_statistics(layer):
            return None
        affine = getattr(layer, "weight", None) is not None
        new = cls(channels_of(layer), eps=cast(float, layer.eps), affine=affine, **options)
        new.load_state_dict(layer.state_dict())
        return new

    return replace_norms(model, make)


@contextmanager
def bn_training(model: nn.Module) -> Iterator[None]:
    """Put BN layers into training mode; everything else (dropout) stays in evaluation mode."""
    layers = [m for m in model.modules() if keeps_statistics(m)]
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer in layers:
            layer.eval()


def has_variance(model: nn.Module, x: Tensor) -> bool:
    """Whether each BN layer gets more than one value per channel from ``x``, as its training mode requires."""
    if len(x) > 1:
        return True
    sizes: list[int] = []
    with torch.no_grad(), capture_inputs(statistics_layers(model), lambda _, v: sizes.append(v[:, 0].numel())):
        model(x)
    return min(sizes, default=0) > 1


def parts_until_steps(x: Tensor, seen: int, every: int) -> list[Tensor]:
    """Split a block so that each part but the last ends with a step, which follows each ``every`` windows of a stream.

    Args:
        x: ``[b, *shape]``.
        seen: windows before the block.
        every: windows between two steps.

    >>> [len(part) for part in parts_until_steps(torch.zeros(8, 1), seen=4, every=3)]
    [2, 3, 3]
    """
    first = every - seen % every
    return [x[:first], *x[first:].split(every)] if len(x) > first else [x]


def set_momentum(model: nn.Module, momentum: float) -> None:
    """Set the weight of a new batch in the running statistics of every BN layer."""
    for layer in statistics_layers(model).values():
        layer.momentum = momentum  # type: ignore[assignment]


def augment(x: Tensor, draw: torch.Generator, strength: float) -> Tensor:
    """Sensor windows ``[n, C, *positions]`` scaled per channel and with noise, both N(0, strength) relative.

    Replaces the crops, flips and color changes of image papers, which do not apply to sensors.
    """
    shape = (*x.shape[:2], *[1] * (x.dim() - 2))
    scale = 1 + strength * torch.randn(shape, generator=draw)
    level = x.std(dim=tuple(range(2, x.dim())), keepdim=True) if x.dim() > 2 else x.abs()
    noise = torch.randn(x.shape, generator=draw)
    return x * scale.to(x) + strength * level * noise.to(x)


def features_of(model: nn.Module) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The classifier, and a function that returns its input in the last forward pass, ``[n, features]``.

    Raises:
        UserError: the model has no linear classifier.
    """
    _, last = head_layer(model)
    if not isinstance(last, nn.Linear):
        raise UserError("output smoothing works on the input of a last linear layer, which this model does not have")
    inputs: deque[Tensor] = deque(maxlen=1)
    last.register_forward_pre_hook(
        lambda _module, args, kwargs: inputs.append(next(iter((*args, *kwargs.values()))).detach()), with_kwargs=True
    )
    return last, lambda: inputs[0]


def sharpness_aware_step(optimizer: Optimizer, loss: Callable[[], Tensor], rho: float) -> Tensor:
    r"""One step against the gradient taken :math:`\rho` up the slope.

    Foret et al. 2021 (SAM), https://arxiv.org/abs/2010.01412

    Args:
        optimizer: of the parameters to update.
        loss: is evaluated at the parameters and again up the slope.
        rho: distance.

    Returns:
        The second loss.
    """
    optimizer.zero_grad()
    loss().backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.stack([p.grad.norm() for p in parameters]).norm() + 1e-12
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            p.add_(rho * p.grad / norm)
    optimizer.zero_grad()
    second = loss()
    second.backward()
    with torch.no_grad():
        for p, old in zip(parameters, before, strict=True):
            p.copy_(old)
    optimizer.step()
    return second.detach()
