"""Fast conversion of tensors to Flower arrays and back, with cached headers of NumPy's file format.

Flower's arrays hold the bytes of ``numpy.save``. Their header is Python text, and parsing it for every array with
``numpy.load`` takes longer than training a small model. There are few distinct headers, so they are cached; arrays
with other headers are decoded by Flower. https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
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
    """Header that ``numpy.save`` writes for an array in C order."""
    file = BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue()


@lru_cache
def _name(kind: torch.dtype) -> str:
    return torch.empty(0, dtype=kind).numpy().dtype.name


def pack(tensor: Tensor) -> Array:
    """Convert a tensor to an array with the same bytes as Flower's own conversion.

    >>> x = torch.arange(6.0).view(2, 3)
    >>> pack(x).data == Array(x).data
    True
    """
    values = tensor.detach().cpu().numpy()
    dtype, shape = _name(tensor.dtype), values.shape
    return Array(dtype, shape, "numpy.ndarray", _header(dtype, shape) + values.tobytes())


def unpack(array: Array) -> Tensor:
    """Convert an array to a tensor that owns its memory.

    >>> unpack(pack(torch.tensor([True, False])))
    tensor([ True, False])

    Raises:
        UserError: the bytes are not a valid numeric array.
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
        raise UserError(f"a message contains an array that cannot be read: {error}") from None


def _check(data: bytes) -> None:
    """Raise `ValueError` if the size does not match the header, before NumPy allocates memory for it."""
    file = BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not in version 1 of NumPy's file format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"{len(data) - file.tell()} bytes do not match {dtype} of shape {list(shape)}")


class LazyArrayRecord(ArrayRecord):
    """A record that holds tensors by reference and converts them to arrays on first access.

    For messages within one process. Readers of `state` must not modify the tensors.

    >>> record = LazyArrayRecord({"a": torch.zeros(2)})
    >>> record.state
    {'a': tensor([0., 0.])}
    >>> record["a"].shape, record.state
    ((2,), None)
    """

    state: State | None = None
    """The tensors; None after the conversion to arrays, which may have been modified since."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state

    def copy(self) -> Self:
        """Shallow copy that shares the tensors."""
        copy = super().copy()
        copy.state = self.state
        return copy


def _materialize(name: str) -> Callable[..., Any]:
    inherited = getattr(ArrayRecord, name)

    def method(self: LazyArrayRecord, *args: Any) -> Any:
        if self.state is not None:
            state, self.state = self.state, None
            for key, value in state.items():
                self[key] = pack(value)
        return inherited(self, *args)

    return method


for _method in (
    *("__getitem__", "__setitem__", "__delitem__", "__iter__", "__len__", "__contains__", "__eq__", "__repr__"),
    *("keys", "values", "items"),
):
    setattr(LazyArrayRecord, _method, _materialize(_method))
