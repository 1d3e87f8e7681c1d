"""Class indices from labels, and names of users from whatever identifies them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from fedbn.errors import UserError

MAX_NAMES = 8
"""Number of names that a notice lists."""

Encode = Callable[[np.ndarray, str, tuple[str, ...]], tuple[np.ndarray, tuple[str, ...]]]
"""Converts the column of targets, the file's name and its class names to targets ``[n, ...]`` and class names."""

NULLS = {"null", "none", "nil", "-", "?"}
"""Texts that are no class where all other labels are numbers."""


def encode_labels(values: np.ndarray, name: str, classes: tuple[str, ...] = ()) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class indices ``[n]`` int64, and the name of each class.

    Numbers are sorted as numbers and names as text, whatever the first number is and whether some are missing: 1, 2, 4
    become 0, 1, 2 with the names ``"1"``, ``"2"``, ``"4"``. One-hot rows ``[n, k]`` become the position of the one.

    Args:
        values: labels, one per row.
        name: file name, for messages.
        classes: names of all classes if the labels are already indices; then they are not changed.

    Raises:
        UserError: if the labels are no classes: missing, several per row, or real numbers.

    >>> encode_labels(np.array([4, 1, 2, 1, 2, 4]), "mine.csv")
    (array([2, 0, 1, 0, 1, 2]), ('1', '2', '4'))
    >>> encode_labels(np.array([[0, 1], [1, 0], [0, 1], [0, 1]]), "mine.csv")
    (array([1, 0, 1, 1]), ('0', '1'))
    """
    values = _one_per_row(plain(values), name)
    refuse_missing(values, f"{name}: label")
    if values.dtype.kind in "mMcV":
        raise UserError(f"{name}: labels have type {values.dtype}, but classes are needed; set y=NAME")
    numbers = _numbers(values, name)
    if numbers is None:
        names, codes = np.unique(values.astype(str), return_inverse=True)
        found = tuple(names.tolist())
        if classes and (wrong := [n for n in found if n not in classes]):
            raise UserError(f"{name}: label {wrong[0]!r} is not among the classes {', '.join(classes)}")
        if classes:
            return np.array([classes.index(n) for n in found])[codes], classes
    else:
        if classes:
            low, high = numbers.min(), numbers.max()
            if low < 0 or high >= len(classes):
                raise UserError(
                    f"{name}: labels run from {low} to {high}, but classes must be numbered 0 to {len(classes) - 1}"
                )
            return numbers, classes
        unique, codes = np.unique(numbers, return_inverse=True)
        found = ("False", "True") if values.dtype.kind == "b" and len(unique) == 2 else tuple(map(str, unique.tolist()))
    if len(found) < 2:
        raise UserError(f"{name}: all labels are {found[0]!r}, but at least two classes are needed; set y=NAME")
    if 2 * len(found) > len(values):
        raise UserError(
            f"{name}: labels have {len(found)} different values in {len(values)} rows, as for regression or an "
            "identifier, but classes are needed; choose --task regression, set y=NAME, or bin the values"
        )
    return codes.astype(np.int64), found


def encode_numbers(values: np.ndarray, name: str) -> np.ndarray:
    """Targets as float32 numbers ``[n, ...]``; a single column ``[n, 1]`` becomes ``[n]``.

    Args:
        values: numbers, or texts of numbers.
        name: file name, for messages.

    Raises:
        UserError: a value is missing, infinite or no number.

    >>> encode_numbers(np.array([["1.5"], ["2"]]), "mine.csv").tolist()
    [1.5, 2.0]
    """
    values = plain(values)
    try:
        numbers = np.array(values.tolist(), np.float64)
    except (ValueError, TypeError):
        raise UserError(f"{name}: targets must be numbers, the same number of them in every row; set y=NAME") from None
    bad = np.flatnonzero(~np.isfinite(numbers).reshape(len(numbers), -1).all(1))
    if len(bad):
        raise UserError(f"{name}: targets are missing or infinite in {len(bad)} rows (first: row {bad[0]}); drop them")
    numbers = numbers.astype(np.float32)
    return numbers.reshape(len(numbers)) if numbers[0].size == 1 else numbers


def encode_indices(
    values: np.ndarray, name: str, classes: tuple[str, ...] = (), ignored: int = -100
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class indices ``[n, ...]`` int64 of several positions per row, and the name of each class.

    Args:
        values: indices from 0, and ``ignored`` for positions that do not count.
        name: file name, for messages.
        classes: names of all classes; by default, the indices up to the highest one.
        ignored: index of positions that do not count.

    Raises:
        UserError: a value is no whole number, or negative.

    >>> encode_indices(np.array([[0, 2], [1, -100]]), "mine.npz")[1]
    ('0', '1', '2')
    """
    numbers = encode_numbers(values, name)
    indices = numbers.astype(np.int64)
    if (indices != numbers).any() or ((indices < 0) & (indices != ignored)).any():
        raise UserError(f"{name}: targets must be class indices 0, 1, ... or {ignored} for positions that do not count")
    return indices, classes or tuple(map(str, range(int(indices.max()) + 1)))


def label_notices(classes: Sequence[str], name: str) -> list[str]:
    """What the class indices stand for, unless the labels are already the indices.

    >>> label_notices(("1", "2"), "mine.csv"), label_notices(("0", "1"), "mine.csv")
    (['mine.csv: labels 1, 2 are classes 0, 1'], [])
    """
    notices = []
    if tuple(classes) != tuple(map(str, range(len(classes)))):
        more = f", ... ({len(classes)} classes)" if len(classes) > MAX_NAMES else ""
        listed = ", ".join(classes[:MAX_NAMES])
        notices.append(
            f"{name}: labels {listed} are classes {', '.join(map(str, range(len(classes[:MAX_NAMES]))))}{more}"
        )
    return notices + _similar(classes, f"{name}: labels", "classes")


def _one_per_row(values: np.ndarray, name: str) -> np.ndarray:
    """Labels ``[n]`` from ``[n]``, ``[n, 1]`` or one-hot rows ``[n, k]``."""
    if values.dtype == object and values.ndim == 1 and any(isinstance(v, list | tuple | np.ndarray) for v in values):
        lengths = {len(v) if isinstance(v, list | tuple | np.ndarray) else 0 for v in values}
        if len(lengths) > 1:
            raise UserError(
                f"{name}: labels are lists of different lengths (multi-label); give one class per row, "
                "or 0/1 columns and --task multilabel"
            )
        values = np.stack([np.asarray(v) for v in values])
    if values.ndim == 1:
        return values
    if values.ndim == 2 and values.shape[1] == 1:
        return values[:, 0]
    shape = list(values.shape)
    if values.ndim > 2:
        raise UserError(
            f"{name}: labels have shape {shape}, as for segmentation; choose --task segmentation, or give one class "
            "per row"
        )
    if values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
        raise UserError(
            f"{name}: labels have shape {shape}, as for regression with several outputs; choose --task regression, or "
            "give one class per row"
        )
    wrong = np.flatnonzero(values.sum(1) != 1)
    if len(wrong):
        raise UserError(
            f"{name}: labels have shape {shape} and row {wrong[0]} has {int(values[wrong[0]].sum())} classes "
            "(multi-label), but classification needs one class per row; choose --task multilabel"
        )
    return values.argmax(1)


def _numbers(values: np.ndarray, name: str) -> np.ndarray | None:
    """Labels as integers, or None if they are names."""
    import pandas as pd

    if values.dtype.kind in "iub":
        return values.astype(np.int64) if values.max() <= np.iinfo(np.int64).max else None
    if values.dtype.kind == "O" and all(type(v) is int for v in values.tolist()):
        exact = np.array(values.tolist())
        return _numbers(exact, name) if exact.dtype.kind in "iu" else None
    texts = values.dtype.kind != "f" and not all(isinstance(v, int | float | np.number) for v in values.tolist())
    if texts:
        numbers = pd.to_numeric(pd.Series(values.astype(str)), errors="coerce").to_numpy(np.float64)
        others = {str(v).lower() for v in values[np.isnan(numbers)]}
        if others and others <= NULLS and len(others) < len(set(values.tolist())):
            row = int(np.flatnonzero(np.isnan(numbers))[0])
            raise UserError(
                f"{name}: label is '{values[row]}' in row {row} and a number elsewhere; fill or drop the row"
            )
        if others:
            return None
    else:
        numbers = values.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise UserError(f"{name}: label is infinite in row {int(np.flatnonzero(~np.isfinite(numbers))[0])}; correct it")
    if (real := np.flatnonzero(numbers != np.floor(numbers))).size:
        raise UserError(
            f"{name}: labels are real numbers ({numbers[real[0]]:g} in row {real[0]}), as for regression, but classes "
            "are needed; choose --task regression, set y=NAME, or bin the values"
        )
    return numbers.astype(np.int64)


def encode_names(values: np.ndarray, what: str) -> tuple[list[str], np.ndarray]:
    """Sorted unique names, and the index of each row's name.

    Numbers are sorted as numbers. Bytes are decoded, and spaces around a name are dropped.

    Args:
        values: names, numbers or bytes, one per row.
        what: what they name, for messages.

    Raises:
        UserError: if a name is missing, or a number was rounded.

    >>> encode_names(np.array([b"bob", b"ana "]), "user")
    (['ana', 'bob'], array([1, 0]))
    """
    values = plain(values)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    refuse_missing(values, what)
    if values.dtype.kind == "O":
        integers = all(isinstance(v, int) for v in values.tolist())
        values = values if integers else values.astype(str)
    if values.dtype.kind == "f" and (abs(values) >= 2.0**53).any():
        raise UserError(f"{what} is a number that is too large to be exact; save it as text")
    names, codes = np.unique(values, return_inverse=True)
    return [str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in names.tolist()], codes


def name_notices(names: Sequence[str], name: str) -> list[str]:
    """Notices about users whose names hardly differ."""
    return _similar(names, f"{name}: users", "users")


def _similar(names: Sequence[str], what: str, kind: str) -> list[str]:
    counts = Counter(n.casefold() for n in names)
    if alike := [n for n in names if counts[n.casefold()] > 1][:2]:
        return [f"{what} {alike[0]!r} and {alike[1]!r} differ only in case; they count as different {kind}"]
    return []


def plain(values: np.ndarray) -> np.ndarray:
    """Texts without spaces around them; bytes are decoded. Other values do not change."""
    if values.dtype.kind == "S":
        values = values.astype(object)
    if values.dtype.kind == "U":
        return np.char.strip(values)
    if values.dtype.kind != "O":
        return values
    flat = [_plain(v) for v in values.ravel().tolist()]
    out = np.empty(len(flat), object)
    for i, value in enumerate(flat):  # values may be lists
        out[i] = value
    return out.reshape(values.shape)


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        try:
            return value.decode().strip()
        except UnicodeDecodeError:
            return value.decode("latin-1").strip()
    return value.strip() if isinstance(value, str) else value


def refuse_missing(values: np.ndarray, what: str) -> None:
    """Raise unless ``values`` is ``[n]`` without missing values; ``what`` names it in the error."""
    import pandas as pd

    if values.ndim != 1:
        raise UserError(f"{what} must be one value per row, not an array of shape {list(values.shape)}")
    empty = [isinstance(v, str) and not v for v in values] if values.dtype.kind in "OUT" else False
    missing = np.flatnonzero(pd.isna(values) | empty)
    if len(missing):
        raise UserError(f"{what} is missing in {len(missing)} rows (first: row {missing[0]}); fill or drop them")
