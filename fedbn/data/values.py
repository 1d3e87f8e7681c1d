"""Values of examples: read them from columns and bring them to one shape, axis order and scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from fedbn.data.columns import Columns, parts_of
from fedbn.data.labels import refuse_missing
from fedbn.data.lazy import is_mapped
from fedbn.errors import UserError

Layout = Literal["auto", "first", "last"]

SCALES = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}
"""Largest value of pixels by type."""


def read_values(columns: Columns, column: str, name: str, length: int = 0) -> np.ndarray:
    """Read ``[n, ...]`` from one array or from columns: joined by ``+``, numbered, or ``first..last``.

    Args:
        columns: columns of the file.
        column: name of the array, or of columns of numbers.
        name: file name, for messages.
        length: number of samples to which series of different lengths are cut or padded; 0 to refuse them.

    Returns:
        float32, pixels of 8 or 16 bits, or a memory-mapped array as it is.

    Raises:
        UserError: if a column is unknown or not numeric, or rows differ in shape.
    """
    parts = [_numeric(columns.column(c, "x"), c, name, length) for c in _selected(columns, column)]
    if len(parts) == 1 and parts[0].ndim > 1:
        return parts[0]
    return np.stack([part.astype(np.float32) for part in parts], axis=1)


def _selected(columns: Columns, column: str) -> list[str]:
    if columns.find(column):
        return [column]
    if ".." in column:
        ends = column.split("..")
        if len(ends) == 2 and all(columns.find(end) for end in ends):
            first, last = (list(columns.names).index(str(columns.find(end))) for end in ends)
            if first > last:
                raise UserError(f"x={column}: {ends[1]!r} comes before {ends[0]!r}; write x={ends[1]}..{ends[0]}")
            return list(columns.names[first : last + 1])
    if "+" in column:
        return [c for part in column.split("+") for c in _selected(columns, part)]
    return columns.numbered(column) or [column]


def _numeric(values: np.ndarray, column: str, name: str, length: int) -> np.ndarray:
    """A column as numbers; a column of sequences becomes a matrix."""
    if values.dtype == object and any(isinstance(v, list | tuple | np.ndarray) for v in values):
        values = stack(values, column, name, length)
    # NumPy would silently convert dates to numbers and drop imaginary parts.
    if values.dtype.kind in "cmMV":
        raise UserError(f"{name}: {column!r} is not numeric but has type {values.dtype}; save real numbers")
    if values.dtype in SCALES or is_mapped(values):
        return values
    try:
        # Values beyond the range of float32 become infinite; `check_rows` reports their position.
        with np.errstate(over="ignore"):
            return values.astype(np.float32, copy=False)
    except (ValueError, TypeError):
        for row, value in enumerate(values):
            try:
                np.asarray(value, object).astype(np.float32)
            except (ValueError, TypeError):
                raise UserError(f"{name}: {column!r} is not numeric: {value!r} in row {row}; save numbers") from None
        raise


def stack(values: Sequence[Any] | np.ndarray, column: str, name: str, length: int = 0) -> np.ndarray:
    """Stack sequences or images, one per row, into one array ``[n, ...]``.

    Args:
        values: one sequence per row.
        column: name of the column, for messages.
        name: file name, for messages.
        length: number of samples to which series of different lengths are cut or padded; 0 to refuse them.

    Raises:
        UserError: if a row is missing or ragged, or its shape differs from that of the first row.
    """
    rows = np.empty(len(values), object)
    for i, value in enumerate(values):
        try:
            rows[i] = None if value is None else _nested(value)
        except ValueError:
            raise UserError(f"{name}: row {i} of {column!r} is ragged; bring its parts to one length") from None
    refuse_missing(rows, f"{name}: {column!r}")
    different = next((i for i, row in enumerate(rows) if row.shape != rows[0].shape), None)
    if different is None:
        return np.stack(rows)  # type: ignore[call-overload]
    axis = _series_axis(rows)
    if axis is not None and length:
        return np.stack([fit_length(np.moveaxis(row, axis, -1)[None], length)[0] for row in rows])
    fix = "bring them to one shape"
    if axis is not None:
        longest = max(row.shape[axis] for row in rows)
        fix = f"bring them to one shape, or set length={longest} to pad them with zeros at the end (or cut them there)"
    raise UserError(
        f"{name}: rows of {column!r} differ in shape (row 0 has {list(rows[0].shape)}, row {different} has "
        f"{list(rows[different].shape)}); {fix}"
    )


def _series_axis(rows: np.ndarray) -> int | None:
    """The only axis along which the rows of series differ in size; None if they are no series."""
    dims = {row.ndim for row in rows}
    if dims not in ({1}, {2}):
        return None
    sizes = np.array([row.shape for row in rows])
    (varying,) = np.nonzero((sizes != sizes[0]).any(0))
    return int(varying[0]) if len(varying) == 1 else None


def fit_length(x: np.ndarray, length: int) -> np.ndarray:
    """Cut the last axis to ``length``, or pad it with zeros at the end.

    >>> fit_length(np.ones((1, 2)), 3), fit_length(np.ones((1, 2)), 1)
    (array([[1., 1., 0.]]), array([[1.]]))
    """
    cut = x[..., :length]
    return np.pad(cut, [(0, 0)] * (x.ndim - 1) + [(0, length - cut.shape[-1])])


def _nested(value: Any) -> np.ndarray:
    """Convert nested sequences to an array; Parquet returns arrays of arrays.

    >>> parts = np.empty(2, object)
    >>> parts[0] = parts[1] = np.zeros(3)
    >>> _nested(parts).shape
    (2, 3)
    """
    array = np.asarray(value)
    if array.dtype == object and array.ndim == 1 and any(isinstance(v, np.ndarray) for v in array):
        return np.stack([_nested(v) for v in array])
    return array


def reshape_rows(x: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Reshape every row of ``x`` to ``shape``, unless ``shape`` is empty."""
    if not shape:
        return x
    size = int(np.prod(x.shape[1:]))
    if min(shape) < 1 or int(np.prod(shape)) != size:
        raise UserError(
            f"{name}: shape={'+'.join(map(str, shape))} needs {int(np.prod(shape))} values per example, but rows have "
            f"{size}; correct the shape"
        )
    return x.reshape(len(x), *shape)


def channels_first(x: np.ndarray, layout: Layout, name: str) -> tuple[np.ndarray, list[str]]:
    """Move the channels of images and series to the first axis of an example.

    With ``auto``, channels are last if the last axis of images has at most four values and the first has more, if only
    the first two axes are equal, or if series have at most 16 values on the last axis and at least four times as many
    on the first. Gray images without a channel axis (8 bits, or square) get one.

    Args:
        x: ``[n, *shape]``.
        layout: where the channels are.
        name: file name, for notices.

    Returns:
        The values, and notices about what was recognized.

    >>> images, notices = channels_first(np.zeros((5, 32, 30, 3)), "auto", "mine.npz")
    >>> images.shape, notices
    ((5, 3, 32, 30), ['mine.npz: x [32, 30, 3] has channels last and becomes [3, 32, 30] (layout=first leaves it)'])
    """
    shape = list(x.shape[1:])
    kind = "last" if layout == "last" and len(shape) > 1 else "first"
    notices = []
    if layout == "auto" and len(shape) == 3:
        first, second, last = shape
        kind = "last" if first > 4 and (last <= 4 or first == second != last) else "first"
    elif layout == "auto" and len(shape) == 2:
        first, last = shape
        if x.dtype == np.uint8 or first == last >= 8:
            notice = f"{name}: x {shape} holds gray images and becomes {[1, *shape]} (layout=first leaves it)"
            return x[:, None], [notice]
        kind = "last" if last <= 16 and first >= 4 * last else "first"
        if kind == "first" and first > last:
            notices = [f"{name}: x {shape} is read as {first} channels of {last} samples (layout=last: the reverse)"]
    if kind == "first":
        return x, notices
    moved = np.moveaxis(x, -1, 1)
    if layout == "auto":
        became = list(moved.shape[1:])
        notices = [f"{name}: x {shape} has channels last and becomes {became} (layout=first leaves it)"]
    return moved, notices


def rescale(x: np.ndarray, scale: float, name: str) -> tuple[np.ndarray, list[str]]:
    """Divide values by ``scale`` and convert them to float32.

    With scale 0, arrays of 8 bits are divided by 255 and images of 16 bits by 65535, as images are, unless they are
    binary.

    Args:
        x: ``[n, *shape]``.
        scale: divisor; 0 to choose it by the type of ``x``.
        name: file name, for notices.

    Returns:
        The values, and notices about a scale that was chosen.

    >>> rescale(np.array([[51]], np.uint8), 0, "mine.npz")
    (array([[0.2]], dtype=float32), ['mine.npz: x has 8 bits and is divided by 255 (scale=1 leaves it)'])
    """
    divisor, notices = divisor_of(x, scale, name)
    values = x.astype(np.float32, copy=False)
    return values if divisor == 1 else values / np.float32(divisor), notices


def divisor_of(x: np.ndarray, scale: float, name: str) -> tuple[float, list[str]]:
    """The number by which `rescale` divides values, and notices about it; reads parts of the array only."""
    if scale or not x.size:
        return scale or 1.0, []
    top = SCALES.get(x.dtype, 0.0)
    if top and x.max() > 1 and (x.dtype == np.uint8 or x.ndim == 4):
        bits = 8 * x.dtype.itemsize
        return top, [f"{name}: x has {bits} bits and is divided by {top:g} (scale=1 leaves it)"]
    whole = x.ndim == 4 and all(part.min() >= 0 and (part == np.floor(part)).all() for _, part in parts_of(x))
    if whole and 16 < (top := float(x.max())) <= 255:
        return 1.0, [f"{name}: x holds whole numbers to {top:g} and is not scaled (scale=255 divides pixels)"]
    return 1.0, []
