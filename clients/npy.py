"""Tensors as Flower arrays and back, fast: NumPy's file format without parsing its header each time.

Flower's arrays hold ``numpy.save``'s bytes. Its header is Python text, which ``numpy.load`` parses anew for every
array and slower than a small model trains. Headers are few, so they are made once; bytes that begin otherwise are
left to Flower. https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO

import numpy as np
import torch
from flwr.app import Array
from torch import Tensor


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
    """
    header = _header(array.dtype, array.shape)
    if array.stype != "numpy.ndarray" or not array.data.startswith(header):
        return torch.from_numpy(array.numpy())
    values = np.ndarray(array.shape, array.dtype, array.data, len(header))
    return torch.from_numpy(values.copy())
