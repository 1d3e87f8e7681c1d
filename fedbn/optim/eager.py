"""Optimizers of PyTorch without the wrappers for ``torch.compile``."""

from __future__ import annotations

import inspect
from functools import cache
from typing import TypeVar, cast

import torch

WRAPPED = ("add_param_group", "load_state_dict", "state_dict", "step", "zero_grad")

T = TypeVar("T", bound=torch.optim.Optimizer)


@cache
def eager(kind: type[T]) -> type[T]:
    """Subclass of an optimizer whose methods do not import ``torch._dynamo``.

    The wrapped methods of `torch.optim.Optimizer` import it when they are first called, which takes 1 to 2 CPU seconds
    in each process. The wrappers matter only in code that ``torch.compile`` compiles. The steps have the same bits.

    >>> parameter = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = eager(torch.optim.SGD)([parameter], lr=0.5)
    >>> parameter.grad = torch.ones(2)
    >>> optimizer.step()
    >>> parameter.tolist()
    [0.5, 0.5]
    """
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in WRAPPED}
    methods["step"] = torch.no_grad()(methods["step"])
    return cast(type[T], type(kind.__name__, (kind,), methods))
