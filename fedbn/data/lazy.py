"""Rows that stay in a memory-mapped file and become float32 when they are read."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten


class LazyRows(Tensor):
    """Rows ``[n, *shape]`` of an array of any numeric type, which are float32 for every operation.

    Indices of rows, such as those of a batch, read these rows only. Slices and parts along the first axis stay lazy.
    Any other operation reads all rows.

    Attributes:
        array: all rows of the array ``[N, *shape]``, of any type and any order of axes in memory.
        rows: indices ``[n]`` of these rows.
        scale: number by which values are divided.

    >>> pixels = LazyRows(torch.tensor([[0], [51], [255]], dtype=torch.uint8), torch.tensor([2, 1]), 255.0)
    >>> pixels.shape, pixels.dtype, pixels[torch.tensor([1])]
    (torch.Size([2, 1]), torch.float32, tensor([[0.2000]]))
    >>> type(pixels[:1]).__name__, type(pixels + 1).__name__
    ('LazyRows', 'Tensor')
    """

    array: Tensor
    rows: Tensor
    scale: float

    @staticmethod
    def __new__(cls: type[LazyRows], array: Tensor, rows: Tensor, scale: float = 1.0) -> LazyRows:
        make: Any = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        made: LazyRows = make(cls, (len(rows), *array.shape[1:]), dtype=torch.float32, device=array.device)
        made.array, made.rows, made.scale = array, rows, scale
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        first, kwargs = args[0], kwargs or {}
        if func is aten.detach.default:
            return LazyRows(first.array, first.rows, first.scale)
        if isinstance(first, LazyRows) and _is_along_rows(func, args):
            found = func(first.rows, *args[1:], **kwargs)
            if func in (aten.index.Tensor, aten.select.int):
                return first._read(found)
            parts = [LazyRows(first.array, rows, first.scale) for rows in ([found] if func is SLICE else found)]
            return parts[0] if func is SLICE else parts
        args, kwargs = tree_map_only(LazyRows, lambda lazy: lazy._read(lazy.rows), (args, kwargs))
        return func(*args, **kwargs)

    def subset(self, index: Tensor) -> LazyRows:
        """The rows ``index``, which are not read."""
        return LazyRows(self.array, self.rows[index], self.scale)

    def _read(self, rows: Tensor) -> Tensor:
        values = self.array[rows].to(torch.float32).contiguous()
        return values if self.scale == 1 else values / self.scale

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., LazyRows], tuple[Any, ...]]:
        return LazyRows, (self.array, self.rows, self.scale)


SLICE = aten.slice.Tensor


def _is_along_rows(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation selects rows by their first axis."""
    if func is aten.index.Tensor:
        return len(args[1]) == 1
    if func in (SLICE, aten.select.int):
        return len(args) < 2 or args[1] == 0
    return func in (aten.split.Tensor, aten.split_with_sizes.default) and (len(args) < 3 or args[2] == 0)


def is_mapped(values: np.ndarray) -> bool:
    """Whether rows of an array can be read from a file one by one.

    >>> is_mapped(np.zeros(3))
    False
    """
    kind = values.dtype.kind in "biuf" and values.dtype.isnative and values.dtype.itemsize <= 8
    return isinstance(values, np.memmap) and kind and all(stride >= 0 for stride in values.strides)


def tensor_of(values: np.ndarray) -> Tensor:
    """The tensor of an array, without a copy."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # data are never modified
        return torch.from_numpy(values)
