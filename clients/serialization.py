"""Tensors as Flower arrays and back, fast: NumPy's file format without parsing its header each time.

Flower's arrays hold ``numpy.save``'s bytes. Its header is Python text, which ``numpy.load`` parses anew for every
array and slower than a small model trains. Headers are few, so they are made once; bytes that begin otherwise are
left to Flower. https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from io import BytesIO
from tokenize import TokenError
from typing import Any, Self

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedbn.errors import UserError
from fedbn.nn.roles import State


@lru_cache(maxsize=4096)
def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What ``numpy.save`` writes before the values of an array in C order."""
    file = BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue()


@lru_cache
def _name(kind: torch.dtype) -> str:
    return torch.empty(0, dtype=kind).numpy().dtype.name


def pack(tensor: Tensor) -> Array:
    """A tensor as an array, in the bytes that Flower itself would write.

    >>> x = torch.arange(6.0).view(2, 3)
    >>> pack(x).data == Array(x).data
    True
    """
    values = tensor.detach().cpu().numpy()
    dtype, shape = _name(tensor.dtype), values.shape
    return Array(dtype, shape, "numpy.ndarray", _header(dtype, shape) + values.tobytes())


def unpack(array: Array) -> Tensor:
    """An array as a tensor of its own memory.

    >>> unpack(pack(torch.tensor([True, False])))
    tensor([ True, False])

    Raises:
        UserError: bytes that are no array of numbers.
    """
    try:
        header = _header(array.dtype, array.shape)
        if array.stype == "numpy.ndarray" and array.data.startswith(header):
            values = np.ndarray(array.shape, array.dtype, array.data, len(header))
            return torch.from_numpy(values.copy())
        if array.stype == "numpy.ndarray":
            _check(array.data)
        return torch.from_numpy(array.numpy())
    except (TypeError, ValueError, EOFError, OverflowError, SyntaxError, TokenError, MemoryError) as error:
        raise UserError(f"a message holds an array that cannot be read: {error}") from None


def _check(data: bytes) -> None:
    """Raise `ValueError` unless the values are there that the header promises: NumPy would make room for them first."""
    file = BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not in version 1 of NumPy's file format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"{len(data) - file.tell()} bytes are no {dtype} of shape {list(shape)}")


class LazyArrayRecord(ArrayRecord):
    """A record of tensors that stay where they are: they become arrays when someone looks at one.

    For records that do not leave the process. Whoever takes the tensors themselves must not write to them.

    >>> record = LazyArrayRecord({"a": torch.zeros(2)})
    >>> record.state
    {'a': tensor([0., 0.])}
    >>> record["a"].shape, record.state
    ((2,), None)
    """

    state: State | None = None
    """The tensors; None once there are arrays, which may then have been changed."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state

    def copy(self) -> Self:
        """A record with the same content."""
        copy = super().copy()
        copy.state = self.state
        return copy


def _materialize(name: str) -> Callable[..., Any]:
    of_record = getattr(ArrayRecord, name)

    def method(self: LazyArrayRecord, *args: Any) -> Any:
        if self.state is not None:
            state, self.state = self.state, None
            for key, value in state.items():
                self[key] = pack(value)
        return of_record(self, *args)

    return method


for _method in (
    *("__getitem__", "__setitem__", "__delitem__", "__iter__", "__len__", "__contains__", "__eq__", "__repr__"),
    *("keys", "values", "items"),
):
    setattr(LazyArrayRecord, _method, _materialize(_method))
