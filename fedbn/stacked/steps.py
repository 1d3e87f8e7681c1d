"""Optimizer steps of K clients at once, equal to those of ``torch.optim`` up to rounding.

Parameters of all clients are one tensor ``[K*n, ...]`` or ``[K, n, ...]``, in the layout of the program. Only bias
corrections depend on the number of steps of a client, which can differ between clients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from fedbn.config import Plan
from fedbn.optim.adam import Adam
from fedbn.optim.adamw import AdamW
from fedbn.optim.base import Optimizer, optimizer
from fedbn.optim.rmsprop import RMSprop
from fedbn.optim.sgd import SGD
from fedbn.stacked.layers import Unstackable

STEP = "step"
"""Entry of an optimizer's state that counts the steps; one number per parameter and client."""

Entries = dict[str, list[Tensor]]
"""State of an optimizer by entry: a tensor per parameter, in its layout; `STEP` is ``[K]``."""


class StackedStep(Protocol):
    """One step of an optimizer; ``lr`` is the learning rate of all clients, or ``[K]`` in double precision."""

    @property
    def lr(self) -> float | Tensor: ...
    @property
    def entries(self) -> tuple[str, ...]:
        """Names of the state's entries, as in ``torch.optim``."""
        ...

    def __call__(self, parameters: list[Tensor], gradients: list[Tensor], state: Entries, k: int) -> None:
        """Update parameters and state in place."""
        ...


@dataclass(frozen=True)
class SGDStep:
    """``torch.optim.SGD``."""

    lr: float | Tensor
    momentum: float = 0.0
    weight_decay: float = 0.0

    @property
    def entries(self) -> tuple[str, ...]:
        """As in `StackedStep`."""
        return ("momentum_buffer",) if self.momentum else ()

    def __call__(self, parameters: list[Tensor], gradients: list[Tensor], state: Entries, k: int) -> None:
        if self.weight_decay:
            gradients = list(torch._foreach_add(gradients, parameters, alpha=self.weight_decay))
        if self.momentum:
            buffers = state["momentum_buffer"]
            torch._foreach_mul_(buffers, self.momentum)
            torch._foreach_add_(buffers, gradients)
            gradients = buffers
        gradients, lr = _with_rate(gradients, self.lr, k)
        torch._foreach_add_(parameters, gradients, alpha=-lr)


@dataclass(frozen=True)
class AdamStep:
    """``torch.optim.Adam``, or with ``decoupled`` weight decay ``torch.optim.AdamW``."""

    lr: float | Tensor
    betas: tuple[float, ...]
    eps: float
    weight_decay: float
    decoupled: bool

    entries = (STEP, "exp_avg", "exp_avg_sq")

    def __call__(self, parameters: list[Tensor], gradients: list[Tensor], state: Entries, k: int) -> None:
        means, squares, (beta1, beta2) = state["exp_avg"], state["exp_avg_sq"], self.betas
        torch._foreach_add_(state[STEP], 1)
        if self.decoupled:
            decay = 1 - self.lr * self.weight_decay
            if isinstance(decay, Tensor):
                for parameter in parameters:
                    _rows(parameter, k).mul_(_column(decay, parameter))
            else:
                torch._foreach_mul_(parameters, decay)
        elif self.weight_decay:
            gradients = list(torch._foreach_add(gradients, parameters, alpha=self.weight_decay))
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        steps = torch.stack(state[STEP]).double()
        sizes, scales = self.lr / (1 - beta1**steps), (1 - beta2**steps).sqrt()
        for parameter, mean, square, size, scale in zip(parameters, means, squares, sizes, scales, strict=True):
            denominator = _rows(square.sqrt(), k).div_(_column(scale, square)).add_(self.eps)
            _rows(parameter, k).addcdiv_(_rows(mean, k) * _column(size, mean), denominator, value=-1)


@dataclass(frozen=True)
class RMSpropStep:
    """``torch.optim.RMSprop``."""

    lr: float | Tensor
    alpha: float
    eps: float
    momentum: float
    weight_decay: float

    @property
    def entries(self) -> tuple[str, ...]:
        """As in `StackedStep`."""
        return (STEP, "square_avg", *(["momentum_buffer"] if self.momentum else []))

    def __call__(self, parameters: list[Tensor], gradients: list[Tensor], state: Entries, k: int) -> None:
        squares = state["square_avg"]
        torch._foreach_add_(state[STEP], 1)
        if self.weight_decay:
            gradients = list(torch._foreach_add(gradients, parameters, alpha=self.weight_decay))
        torch._foreach_mul_(squares, self.alpha)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - self.alpha)
        denominators = list(torch._foreach_sqrt(squares))
        torch._foreach_add_(denominators, self.eps)
        if self.momentum:
            buffers = state["momentum_buffer"]
            torch._foreach_mul_(buffers, self.momentum)
            torch._foreach_addcdiv_(buffers, gradients, denominators)
            directions, lr = _with_rate(buffers, self.lr, k)
            torch._foreach_add_(parameters, directions, alpha=-lr)
        else:
            gradients, lr = _with_rate(gradients, self.lr, k)
            torch._foreach_addcdiv_(parameters, gradients, denominators, value=-lr)


_STEPS: dict[type[Optimizer], Callable[..., StackedStep]] = {
    SGD: lambda o, plan, lr: SGDStep(lr, plan.momentum, plan.weight_decay),
    Adam: lambda o, plan, lr: AdamStep(lr, o.betas, o.eps, o.weight_decay, decoupled=False),
    AdamW: lambda o, plan, lr: AdamStep(lr, o.betas, o.eps, o.weight_decay, decoupled=True),
    RMSprop: lambda o, plan, lr: RMSpropStep(lr, o.alpha, o.eps, o.momentum, o.weight_decay),
}


def stacked_step(plan: Plan, lr: float) -> StackedStep:
    """The stacked step of a plan's optimizer.

    Raises:
        Unstackable: there is none.

    >>> stacked_step(Plan(momentum=0.5), 0.1)
    SGDStep(lr=0.1, momentum=0.5, weight_decay=0.0)
    """
    chosen = optimizer(plan.optimizer)
    if type(chosen) not in _STEPS:
        raise Unstackable(f"optimizer {plan.optimizer} has no stacked step")
    return _STEPS[type(chosen)](chosen, plan, lr)


def step_of(step: StackedStep, rows: slice | Tensor) -> StackedStep:
    """The step of some clients of a stack.

    >>> step_of(SGDStep(torch.tensor([0.1, 0.2, 0.3])), slice(1, 3)).lr
    tensor([0.2000, 0.3000])
    """
    return with_rates(step, step.lr[rows]) if isinstance(step.lr, Tensor) else step


def with_rates(step: StackedStep, lr: Tensor) -> StackedStep:
    """The step with a learning rate ``[K]`` for each client."""
    return replace(cast(Any, step), lr=lr)


def clip_gradients(gradients: Sequence[Tensor], k: int, max_norm: float) -> list[Tensor]:
    """Scale the gradients of each client to a largest norm, as ``torch.nn.utils.clip_grad_norm_`` does.

    >>> clip_gradients([torch.tensor([[3.0, 4.0], [0.3, 0.4]])], 2, 1.0)[0].round(decimals=4).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.30000001192092896, 0.4000000059604645]]
    """
    norms = torch.stack([torch.linalg.vector_norm(_rows(g, k), dim=1) for g in gradients]).norm(dim=0)
    scale = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    return [(_rows(g, k) * scale[:, None]).view(g.shape) for g in gradients]


def _with_rate(tensors: list[Tensor], lr: float | Tensor, k: int) -> tuple[list[Tensor], float]:
    """Tensors and a factor for all of them, whose products are the tensors times each client's learning rate."""
    if not isinstance(lr, Tensor):
        return tensors, lr
    return [(_rows(t, k) * _column(lr, t)).view(t.shape) for t in tensors], 1.0


def _rows(t: Tensor, k: int) -> Tensor:
    """One row per client; a view of a contiguous tensor."""
    return t.reshape(k, -1)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype)[:, None]
