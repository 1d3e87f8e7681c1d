"""Columns of a file, and the rows of examples that are made from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedbn.data.labels import refuse_missing
from fedbn.errors import UserError, unknown

SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training", "trn"),
    "validation": ("validation", "valid", "val", "dev", "development"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
}
"""Spellings of the parts of a data set."""


CHECKED_VALUES = 2**24
"""Number of values that are checked at once."""


@dataclass(frozen=True)
class Columns:
    """The raw columns of a file.

    Attributes:
        names: names of the arrays or columns.
        get: loads a column by name; its first axis is the row.
        classes: class names of columns of class numbers, if the file stores them.
        notices: what had to be guessed in reading.
        hint: end of the error about an unknown column.
    """

    names: Sequence[str]
    get: Callable[[str], np.ndarray]
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    hint: str = ""

    def find(self, name: str) -> str | None:
        """The column of that name; upper and lower case are equal if only one column matches."""
        if name in self.names:
            return name
        similar = [n for n in self.names if n.lower() == name.lower()]
        return similar[0] if len(similar) == 1 else None

    def column(self, name: str, option: str) -> np.ndarray:
        """Load a column; for an unknown name, the error suggests the closest one."""
        found = self.find(name)
        if found is None:
            several = ", x=A+B or x=FIRST..LAST" if option == "x" else ""
            error = unknown(f"column for {option}", name, self.names)
            raise UserError(f"{error}. Set it with {option}=NAME{several}{self.hint}")
        values = self.get(found)
        if not values.ndim:
            raise UserError(f"{name!r} is a single value, but {option} needs one value per row; set {option}=NAME")
        return values

    def numbered(self, prefix: str) -> list[str]:
        """The columns prefix0, prefix1, ... (or prefix_0, ...) in the order of their numbers."""
        found = [c for c in self.names if re.fullmatch(re.escape(prefix) + r"_?\d+", c)]
        return sorted(found, key=lambda c: int(re.findall(r"\d+$", c)[0]))


@dataclass(frozen=True)
class Rows:
    """Examples of all users in the order of recording: ``x`` is ``[n, *shape]``, the others are ``[n]``.

    Attributes:
        x: values.
        y: labels; ``[n, k]`` if they are one-hot.
        user: users; None if they are unknown.
        recording: recordings; None if they are unknown.
        classes: names of the classes if labels are their indices.
        split: part of the data set (a key of `SPLITS`) of each row; None if the data set has no parts.
        stretch: stretch of a recording that each row was cut from; rows of different stretches do not overlap. None if
            rows are not cut.
        scale: number by which the values of a memory-mapped ``x`` are divided when they are read.
    """

    x: np.ndarray
    y: np.ndarray
    user: np.ndarray | None
    recording: np.ndarray | None
    classes: tuple[str, ...] = ()
    split: np.ndarray | None = None
    stretch: np.ndarray | None = None
    scale: float = 1.0

    @staticmethod
    def concat(parts: Sequence[Rows]) -> Rows:
        """Concatenate parts without recordings that have the same classes."""
        x, y, user = (np.concatenate([getattr(p, name) for p in parts]) for name in ("x", "y", "user"))
        split = None
        if any(p.split is not None for p in parts):
            split = np.concatenate([np.full(len(p.x), "train") if p.split is None else p.split for p in parts])
        return Rows(x, y, user, None, parts[0].classes, split)

    def take(self, index: np.ndarray) -> Rows:
        """Select the rows ``index``, in that order."""
        arrays = {name: getattr(self, name) for name in ("x", "y", "user", "recording", "split", "stretch")}
        return replace(self, **{name: values[index] for name, values in arrays.items() if values is not None})


def split_of(name: str) -> str | None:
    """The part of a data set that a name stands for; None if it stands for none.

    >>> split_of("Training"), split_of("dev"), split_of("walk")
    ('train', 'validation', None)
    """
    text = name.strip().lower()
    return next((split for split, spellings in SPLITS.items() if text in spellings), None)


def split_names(values: np.ndarray, name: str, column: str) -> np.ndarray:
    """The part of the data set (a key of `SPLITS`) of each row, from its name in any usual spelling.

    Raises:
        UserError: a name is missing or stands for no part.

    >>> split_names(np.array(["Training", "dev"]), "mine.csv", "split").tolist()
    ['train', 'validation']
    """
    refuse_missing(values.reshape(len(values), -1)[:, 0], f"{name}: {column}")
    texts = [v.decode("latin-1") if isinstance(v, bytes) else str(v) for v in values.ravel().tolist()]
    parts = {text: split_of(text) for text in set(texts)}
    if unknown_names := sorted(text for text, part in parts.items() if part is None):
        raise UserError(
            f"{name}: column {column!r} holds {unknown_names[0]!r}, which is not train, validation or test; rename it, "
            "or leave the column out with split="
        )
    return np.array([parts[text] for text in texts])


def join(parts: Mapping[str, Columns], column: str, name: str) -> Columns:
    """Columns with the rows of several parts, and the part of each row in ``column``.

    Raises:
        UserError: for a column that is not in all parts.
    """
    first = next(iter(parts.values()))
    names = list(dict.fromkeys(n for part in parts.values() for n in part.names))

    def get(wanted: str) -> np.ndarray:
        if wanted == column:
            return np.repeat(list(parts), [len(part.get(part.names[0])) for part in parts.values()])
        if lacking := [key for key, part in parts.items() if wanted not in part.names]:
            raise UserError(f"{name}: {lacking[0]} has no column {wanted!r}; the columns of all parts must be equal")
        return concatenate([part.get(wanted) for part in parts.values()], wanted, name)

    notices = tuple(dict.fromkeys(n for part in parts.values() for n in part.notices))
    return Columns([*names, *([] if column in names else [column])], get, first.classes, notices, first.hint)


def concatenate(parts: Sequence[np.ndarray], column: str, name: str) -> np.ndarray:
    """Concatenate the rows of one column in several files.

    Raises:
        UserError: if the shapes of their rows differ.
    """
    shapes = {p.shape[1:] for p in parts}
    if len(shapes) > 1:
        listed = ", ".join(str(list(s)) for s in sorted(shapes))
        raise UserError(f"{name}: parts of {column!r} have rows of shapes {listed}; bring them to one shape")
    if any(p.dtype.kind in "OSU" for p in parts) and not all(p.dtype.kind in "OSU" for p in parts):
        parts = [p.astype(object) for p in parts]
    return np.concatenate(parts)


def parts_of(x: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Successive rows of an array and the index of their first, because a file may not fit in memory.

    >>> [(start, part.tolist()) for start, part in parts_of(np.arange(2)[:, None])]
    [(0, [[0], [1]])]
    """
    step = max(1, CHECKED_VALUES // max(1, x[:1].size))
    return ((start, x[start : start + step]) for start in range(0, len(x), step))


def check_rows(rows: Rows, name: str) -> None:
    """Raise unless all arrays have the same length, and ``x`` is finite and not empty."""
    arrays = {key: getattr(rows, key) for key in ("x", "y", "user", "recording", "split")}
    lengths = {key: len(values) for key, values in arrays.items() if values is not None}
    if len(set(lengths.values())) > 1:
        raise UserError(
            f"{name}: {', '.join(f'{k} has {n} rows' for k, n in lengths.items())}; they need the same number"
        )
    if not len(rows.x):
        raise UserError(f"{name} has no rows; save some")
    if not rows.x[0].size:
        raise UserError(f"{name}: an example of x has no values (shape {list(rows.x.shape[1:])}); save some")
    count, first = 0, []
    for start, part in parts_of(rows.x):
        with np.errstate(over="ignore"):
            bad = ~np.isfinite(part.astype(np.float32, copy=False))
        if not count and bad.any():
            first = (np.argwhere(bad)[0] + [start, *[0] * (bad.ndim - 1)]).tolist()
        count += int(bad.sum())
    if count:
        raise UserError(
            f"{name}: x holds {count} NaN or infinite values (first: row {first[0]}, position "
            f"{', '.join(map(str, first[1:]))}); remove or impute them"
        )
