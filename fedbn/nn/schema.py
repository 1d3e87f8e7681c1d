"""Declarations of the tensors in a client's message, and their checks.

A message can come from a faulty or malicious client. Its *schema* declares every tensor that it may contain: name,
dtype, shape and kind. The kind bounds the values, so that sums, squares and averages of valid messages stay finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from fedbn.nn.roles import Role, State

MAX_VALUE = 1e15
"""Largest absolute value of a parameter, mean or gradient; its square is finite in float32."""

MAX_COUNT = 1e12
"""Largest number of values or examples."""


class Kind(StrEnum):
    """Kind of the values of a tensor.

    Attributes:
        PARAMETER: weights or gradients; their joint norm can be limited.
        VALUE: other numbers of either sign.
        NONNEGATIVE: other numbers that are not negative.
        MEAN: means of activations.
        VARIANCE: variances of activations, not negative.
        SUM: sums of squared deviations, not negative.
        COUNT: numbers of values, at least 1.
        SHARE: numbers from 0 to 1, such as an accuracy.
        WORD: integers of any size, such as masked messages.
    """

    PARAMETER = "parameter"
    VALUE = "value"
    NONNEGATIVE = "nonnegative"
    MEAN = "mean"
    VARIANCE = "variance"
    SUM = "sum"
    COUNT = "count"
    SHARE = "share"
    WORD = "word"


@dataclass(frozen=True)
class Limits:
    """Limits of plausible messages, for deployments; none by default.

    Attributes:
        norm: largest L2 norm of the change of a client's parameters in a round, and of the gradients that it sends.
        statistic: largest absolute mean and standard deviation of activations.
        examples: largest number of training examples of a client.
    """

    norm: float = math.inf
    statistic: float = math.inf
    examples: float = math.inf

    def range(self, kind: Kind) -> tuple[float, float]:
        """Smallest and largest value of a kind.

        >>> Limits(statistic=100.0).range(Kind.VARIANCE)
        (0.0, 10000.0)
        """
        mean = min(self.statistic, MAX_VALUE)
        match kind:
            case Kind.MEAN:
                return -mean, mean
            case Kind.VARIANCE:
                return 0.0, mean**2
            case Kind.SUM:
                return 0.0, mean**2 * MAX_COUNT
            case Kind.COUNT:
                return 1.0, MAX_COUNT
            case Kind.SHARE:
                return 0.0, 1.0
            case Kind.NONNEGATIVE:
                return 0.0, MAX_VALUE
            case _:
                return -MAX_VALUE, MAX_VALUE


NO_LIMITS = Limits()


@dataclass(frozen=True)
class TensorSpec:
    """Declaration of one tensor.

    Attributes:
        dtype: type of the elements.
        shape: sizes of the axes.
        kind: kind of the values.
        required: whether a message that has any of the declared tensors must have this one.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    kind: Kind = Kind.PARAMETER
    required: bool = True

    @property
    def num_bytes(self) -> int:
        """Size of the values in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


Schema = Mapping[str, TensorSpec]
"""Declared tensors of a message by name."""


def entries_schema(state: State, roles: Mapping[str, Role]) -> dict[str, TensorSpec]:
    """Schema of entries of a model.

    Args:
        state: the entries, with any values.
        roles: role of each entry.

    >>> schema = entries_schema({"bn.running_var": torch.ones(3)}, {"bn.running_var": Role.STATISTICS})
    >>> schema["bn.running_var"].kind.value, schema["bn.running_var"].shape
    ('variance', (3,))
    """
    return {k: TensorSpec(v.dtype, tuple(v.shape), _entry_kind(k, roles[k])) for k, v in state.items()}


def _entry_kind(name: str, role: Role) -> Kind:
    if role is not Role.STATISTICS:
        return Kind.PARAMETER
    entry = name.rpartition(".")[2]
    if entry in ("steps", "running_size"):
        return Kind.NONNEGATIVE
    if entry.endswith("_var"):
        return Kind.VARIANCE
    return Kind.MEAN if entry.endswith("_mean") and "grad" not in entry else Kind.VALUE


def moments_schema(channels: Mapping[str, int]) -> dict[str, TensorSpec]:
    """Schema of moments by name, as flattened by `fedbn.statistics.consensus.flatten`.

    Args:
        channels: number of channels of each name. Moments whose name ends with ``|var`` are moments of variances, so
            their mean is not negative.

    >>> sorted(moments_schema({"bn": 4}))
    ['bn|m2', 'bn|mean', 'bn|n']
    """
    out = {}
    for name, size in channels.items():
        mean = Kind.VARIANCE if name.endswith("|var") else Kind.MEAN
        for field, shape, kind in (("n", (), Kind.COUNT), ("mean", (size,), mean), ("m2", (size,), Kind.SUM)):
            out[f"{name}|{field}"] = TensorSpec(torch.float64, shape, kind)
    return out


def check_names(names: Iterable[str], schema: Schema) -> list[str]:
    """Names that are not declared, and required names that are missing, sorted.

    >>> check_names(["a", "c"], {"a": TensorSpec(torch.float32, ()), "b": TensorSpec(torch.float32, ())})
    ['b', 'c']
    """
    given = set(names)
    return sorted((given - schema.keys()) | {k for k, spec in schema.items() if spec.required and k not in given})


def check_tensors(state: State, schema: Schema) -> str | None:
    """Describe the first tensor whose dtype or shape is not the declared one; None if all are.

    >>> check_tensors({"a": torch.zeros(2)}, {"a": TensorSpec(torch.float32, (3,))})
    'a as torch.float32 [2], expected torch.float32 [3]'
    """
    for name, value in state.items():
        spec = schema[name]
        if value.dtype != spec.dtype or value.shape != spec.shape:
            return f"{name} as {value.dtype} {list(value.shape)}, expected {spec.dtype} {list(spec.shape)}"
    return None


def check_values(state: State, schema: Schema, limits: Limits = NO_LIMITS) -> str | None:
    """Describe the first tensor with a value that is not finite or out of range; None if there is none.

    >>> check_values({"v": torch.tensor([-1.0])}, {"v": TensorSpec(torch.float32, (1,), Kind.VARIANCE)})
    '-1 in v, expected 0 to 1e+30'
    """
    by_kind: dict[Kind, list[Tensor]] = {}
    for name, value in state.items():
        if (kind := schema[name].kind) is not Kind.WORD and value.numel():
            by_kind.setdefault(kind, []).append(value)
    if all(_is_within(values, limits.range(kind)) for kind, values in by_kind.items()):
        return None
    for name, value in state.items():
        low, high = limits.range(schema[name].kind)
        if value.numel() and not _is_within([value], (low, high)):
            numbers = _real(value).double()
            if not torch.isfinite(numbers).all():
                return f"NaN or Inf in {name}"
            wrong = numbers[(numbers < low) | (numbers > high)][0]
            return f"{float(wrong):g} in {name}, expected {low:g} to {high:g}"
    raise AssertionError("a value was out of range in a group only")


MAX_JOINED = 2**14
"""Largest tensor that is copied to be checked together with others; a copy of larger ones takes longer."""


def _is_within(values: list[Tensor], bounds: tuple[float, float]) -> bool:
    """Whether all values lie within the bounds; False for NaN."""
    flat = [_real(v).reshape(-1) for v in values]
    small = [v for v in flat if len(v) <= MAX_JOINED]
    parts = [v for v in flat if len(v) > MAX_JOINED]
    if small:
        parts.append(torch.cat(small) if len(small) > 1 else small[0])
    for part in parts:
        low, high = torch.aminmax(part)  # NaN if any value is
        if not (low >= bounds[0] and high <= bounds[1]):
            return False
    return True


def _real(value: Tensor) -> Tensor:
    return torch.view_as_real(value) if value.is_complex() else value


def parameter_norm(state: State, schema: Schema, received: State | None = None) -> float:
    """L2 norm of all parameters of a message, or of their change from ``received``.

    >>> spec = TensorSpec(torch.float32, (2,))
    >>> parameter_norm({"w": torch.tensor([3.0, 4.0])}, {"w": spec}, {"w": torch.zeros(2)})
    5.0
    """
    names = [k for k in state if schema[k].kind is Kind.PARAMETER]
    changes = [state[k] if received is None else state[k] - received[k].to(state[k].device) for k in names]
    return float(nn.utils.get_total_norm(changes))
