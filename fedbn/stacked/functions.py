"""Functions and tensor methods of the stacked program.

Each gets a `StackContext` before the arguments of the original. Activations are ``[B, K*C, *positions]``; what a client
would see is `unstack(...)[:, k]`. Functions that combine rows of a batch are `Unstackable`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedbn.stacked.layers import StackContext, Unstackable, apply_dropout, flatten, restack, unstack

StackedFunction = Callable[..., Any]


def _elementwise(function: Callable[..., Any]) -> StackedFunction:
    def compute(context: StackContext, x: Tensor, *args: Any, inplace: bool = False, **kwargs: Any) -> Any:
        return function(x, *args, **kwargs)

    return compute


def _binary(function: Callable[..., Any]) -> StackedFunction:
    def compute(context: StackContext, a: Any, b: Any, **kwargs: Any) -> Any:
        tensors = isinstance(a, Tensor) and isinstance(b, Tensor)
        if not tensors or context.batch_last or a.shape == b.shape:
            return function(a, b, **kwargs)
        if a.dim() != b.dim():
            raise Unstackable("operands have different numbers of axes")
        return restack(function(unstack(context, a), unstack(context, b), **kwargs))

    return compute


def _pooling(function: Callable[..., Tensor], positions: int) -> StackedFunction:
    def compute(context: StackContext, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.dim() != positions + 2:
            raise Unstackable("pooling without a batch axis")
        return function(x, *args, **kwargs)

    return compute


def _interpolate(context: StackContext, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return F.interpolate(x, *args, **kwargs)


def _pad(context: StackContext, x: Tensor, pad: Sequence[int], *args: Any, **kwargs: Any) -> Tensor:
    if len(pad) > 2 * (x.dim() - 2):
        raise Unstackable("padding of channels")
    return F.pad(x, pad, *args, **kwargs)


def _reduction(function: Callable[..., Tensor]) -> StackedFunction:
    def compute(context: StackContext, x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
        if dim is None:
            raise Unstackable("a reduction over all axes")
        axes = [_axis(x, d) for d in (dim if isinstance(dim, tuple | list) else (dim,))]
        if min(axes) > 2:
            return function(x, [d - 1 for d in axes], keepdim)
        return restack(function(unstack(context, x), axes, keepdim))

    return compute


def _along(function: Callable[..., Tensor]) -> StackedFunction:
    """A function with the argument ``dim`` and an output of the input's shape."""

    def compute(context: StackContext, x: Tensor, dim: int | None = None, **kwargs: Any) -> Tensor:
        if dim is None or kwargs.get("dtype") is not None:
            raise Unstackable(f"{function.__name__} without a dim, or with a dtype")
        return restack(function(unstack(context, x), _axis(x, dim)))

    return compute


def _axis(x: Tensor, dim: int, added: int = 0) -> int:
    """Axis of `unstack` for an axis of one client's activations, which is not the batch."""
    axis = dim % (x.dim() + added)
    if axis == 0:
        raise Unstackable("an operation along the batch")
    return axis + 1


def _cat(context: StackContext, tensors: Any, dim: int = 0) -> Tensor:
    return restack(torch.cat([unstack(context, t) for t in tensors], _axis(tensors[0], dim)))


def _unsqueeze(context: StackContext, x: Tensor, dim: int) -> Tensor:
    return restack(unstack(context, x).unsqueeze(_axis(x, dim, added=1)))


def _squeeze(context: StackContext, x: Tensor, dim: int | None = None) -> Tensor:
    if dim is None:
        raise Unstackable("squeeze without a dim, which may remove the batch")
    return restack(unstack(context, x).squeeze(_axis(x, dim)))


def _transpose(context: StackContext, x: Tensor, dim0: int, dim1: int) -> Tensor:
    return restack(unstack(context, x).transpose(_axis(x, dim0), _axis(x, dim1)))


def _permute(context: StackContext, x: Tensor, *dims: Any) -> Tensor:
    first, *rest = dims[0] if len(dims) == 1 else dims
    if first != 0:
        raise Unstackable("a permutation that moves the batch")
    return restack(unstack(context, x).permute(0, 1, *[_axis(x, d) for d in rest]))


def _reshape(context: StackContext, x: Tensor, *shape: Any) -> Tensor:
    rows, *rest = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    per_row = x[0].numel() // context.k
    if not rest or rows not in (len(x), -1) or (rows == -1 and math.prod(rest) != per_row):
        raise Unstackable(f"a reshape to {[rows, *rest]} that may merge rows of a batch")
    if rest in ([-1], [per_row]):
        return x.flatten(1)
    return restack(unstack(context, x).reshape(len(x), context.k, *rest))


def _getitem(context: StackContext, x: Any, index: Any) -> Any:
    if not isinstance(x, Tensor):
        return x[index]
    first, *rest = index if isinstance(index, tuple) else (index,)
    if first != slice(None) or not all(i is None or i is ... or isinstance(i, int | slice) for i in rest):
        raise Unstackable("an index that selects rows, or an index tensor")
    return restack(unstack(context, x)[(slice(None), slice(None), *rest)])


def _shape(context: StackContext, x: Tensor) -> tuple[int, ...]:
    return (len(x), x.shape[1] // context.k, *x.shape[2:])


def _size(context: StackContext, x: Tensor, dim: int | None = None) -> Any:
    return _shape(context, x) if dim is None else _shape(context, x)[dim]


def _getattr(context: StackContext, x: Tensor, name: str) -> Any:
    if name == "shape":
        return _shape(context, x)
    if name not in ("ndim", "dtype", "device"):
        raise Unstackable(f"attribute {name} of a tensor")
    return getattr(x, name)


def _dropout(context: StackContext, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return apply_dropout(context, x, p, training)


def _channel_dropout(
    context: StackContext, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    return apply_dropout(context, x, p, training, whole_channels=True)


_OPERATORS: dict[Any, Callable[..., Any]] = {
    **{f: f for f in (operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.pow)},
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ipow: operator.pow,
}
_BINARY = ("add", "sub", "mul", "div", "pow", "maximum", "minimum")
_ELEMENTWISE = (
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus, F.softsign),
    *(F.hardtanh, F.hardswish, F.hardsigmoid, F.logsigmoid, F.hardshrink, F.softshrink, F.tanhshrink),
)
_ELEMENTWISE_METHODS = ("relu", "sigmoid", "tanh", "exp", "log", "sqrt", "rsqrt", "square", "abs", "neg", "clamp")
_REDUCTIONS = ("mean", "sum", "amax", "amin")
_RESHAPING: dict[str, StackedFunction] = {
    **{"flatten": flatten, "reshape": _reshape, "squeeze": _squeeze, "unsqueeze": _unsqueeze},
    **{"transpose": _transpose, "permute": _permute},
}

METHODS: dict[str, StackedFunction] = {
    **{name: _elementwise(getattr(torch, name)) for name in _ELEMENTWISE_METHODS},
    **{f"{name}_": _elementwise(getattr(torch, name)) for name in _ELEMENTWISE_METHODS},
    **{name: _binary(getattr(torch, name)) for name in _BINARY},
    **{f"{name}_": _binary(getattr(torch, name)) for name in ("add", "sub", "mul", "div", "pow")},
    **{name: _reduction(getattr(torch, name)) for name in _REDUCTIONS},
    **{name: _along(getattr(torch, name)) for name in ("softmax", "log_softmax")},
    **_RESHAPING,
    **{"view": _reshape, "size": _size, "dim": _elementwise(Tensor.dim)},
    **{name: _elementwise(getattr(Tensor, name)) for name in ("contiguous", "clone", "detach")},
}
"""Tensor methods by name."""

FUNCTIONS: dict[Any, StackedFunction] = {
    **{f: _elementwise(f) for f in _ELEMENTWISE},
    **{f: _binary(function) for f, function in _OPERATORS.items()},
    **{getattr(torch, name): METHODS[name] for name in (*_ELEMENTWISE_METHODS, *_BINARY, *_REDUCTIONS)},
    **{torch.relu_: METHODS["relu"], operator.neg: METHODS["neg"]},
    **{getattr(torch, name): METHODS[name] for name in ("softmax", "log_softmax")},
    **{F.softmax: METHODS["softmax"], F.log_softmax: METHODS["log_softmax"]},
    **{getattr(torch, name): function for name, function in _RESHAPING.items()},
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _cat),
    **{operator.getitem: _getitem, getattr: _getattr},
    **{
        getattr(F, f"{kind}_pool{n}d"): _pooling(getattr(F, f"{kind}_pool{n}d"), n)
        for kind in ("max", "avg", "adaptive_max", "adaptive_avg")
        for n in (1, 2, 3)
    },
    **{F.interpolate: _interpolate, F.pad: _pad},
    F.dropout: _dropout,
    **dict.fromkeys((F.dropout1d, F.dropout2d, F.dropout3d), _channel_dropout),
}
"""Functions, which `torch.fx` records by themselves."""

DROPOUT_FUNCTIONS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)

FEATURE_FUNCTIONS = {
    *_ELEMENTWISE,
    *_OPERATORS,
    *(f"{name}{suffix}" for name in (*_ELEMENTWISE_METHODS, *_BINARY) for suffix in ("", "_")),
    *(getattr(torch, name) for name in (*_ELEMENTWISE_METHODS, *_BINARY)),
    *(torch.relu_, operator.neg, F.dropout),
} - {"maximum_", "minimum_"}
"""Functions that also work on activations ``[K, C, B]``."""

VIEW_FUNCTIONS = {
    *DROPOUT_FUNCTIONS,
    *_RESHAPING,
    *(getattr(torch, name) for name in _RESHAPING),
    *("view", "contiguous", "detach", operator.getitem),
}
"""Functions whose output can share the memory of their input."""

IN_PLACE_FUNCTIONS = {f for f in _OPERATORS if f.__name__.startswith("i")} | {torch.relu_}
"""Functions that overwrite their first argument, besides methods with a final underscore and ``inplace=True``."""
