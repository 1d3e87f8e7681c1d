"""Read examples from npz, csv and parquet files and from directories saved by `datasets`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedbn.data.packages import sha256
from fedbn.errors import UserError, unknown


@dataclass(frozen=True)
class Columns:
    """The raw columns of a file.

    Attributes:
        names: names of the arrays or columns.
        get: loads a column by name; its first axis is the row.
        classes: class names of columns of class numbers, if the file stores them.
    """

    names: Sequence[str]
    get: Callable[[str], np.ndarray]
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def column(self, name: str, option: str) -> np.ndarray:
        """Load a column; for an unknown name, the error suggests the closest one."""
        if name not in self.names:
            raise unknown(f"column for {option} (set it with {option}=NAME)", name, self.names)
        values = self.get(name)
        if not values.ndim:
            raise UserError(f"{name!r} is a single value, but {option} needs one value per row; set {option}=NAME")
        return values


@dataclass(frozen=True)
class Rows:
    """Examples of all users in the order of recording: ``x`` is ``[n, *shape]``, the others are ``[n]``."""

    x: np.ndarray
    y: np.ndarray
    user: np.ndarray
    recording: np.ndarray | None
    classes: tuple[str, ...] = ()

    @staticmethod
    def concat(parts: Sequence[Rows]) -> Rows:
        """Concatenate parts without recordings that have the same classes."""
        x, y, user = (np.concatenate([getattr(p, name) for p in parts]) for name in ("x", "y", "user"))
        return Rows(x, y, user, None, parts[0].classes)


def read(path: Path) -> Columns:
    """Open a file in the format given by its suffix.

    Raises:
        UserError: if the file does not exist, its suffix is unknown, or its content does not match the suffix.
    """
    if not path.exists():
        raise UserError(f"there is no file {str(path)!r}; check path=, which is relative to the current directory")
    readers = {".npz": _npz, ".csv": _table, ".parquet": _table}
    reader = _saved_dataset if path.is_dir() else readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{path.name}: data are read from .npz, .csv, .parquet or a directory of datasets.save_to_disk, "
            f"not from {path.suffix or 'a file without suffix'!r}; convert the file"
        )
    try:
        return reader(path)
    except UserError:
        raise
    except Exception as error:  # every parser has its own exceptions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path.name} cannot be read ({reason}); write it again or check its suffix") from error


def _npz(path: Path) -> Columns:
    with np.load(path, allow_pickle=False) as file:
        arrays = {}
        for name in file.files:
            try:
                arrays[name] = file[name]
            except ValueError:
                raise UserError(
                    f"{path.name}: array {name!r} holds Python objects, for instance rows of different lengths; bring "
                    "all rows to one length and save plain numbers or strings"
                ) from None
    return Columns(list(arrays), arrays.__getitem__)


def _table(path: Path) -> Columns:
    import pandas as pd

    frame = pd.read_csv(path) if path.suffix.lower() == ".csv" else pd.read_parquet(path)
    return Columns(list(frame.columns), lambda name: frame[name].to_numpy())


def _saved_dataset(path: Path) -> Columns:
    import datasets
    import pandas as pd

    data = datasets.load_from_disk(str(path))
    if isinstance(data, datasets.DatasetDict):
        if len(data) != 1:
            raise UserError(f"{path.name} holds {len(data)} splits; name one: path={path / next(iter(data))}")
        data = next(iter(data.values()))
    table = data
    classes = {n: tuple(f.names) for n, f in table.features.items() if isinstance(f, datasets.ClassLabel)}

    def get(name: str) -> np.ndarray:
        if not isinstance(table.features[name], datasets.Image):
            stored = table.with_format("arrow")[name][:]
            # The NumPy format fails on missing lists without their position; as objects they can be located.
            if stored.null_count:
                return pd.Series(stored.to_pylist(), dtype=object).to_numpy()
            return np.asarray(table.with_format("numpy")[name][:])
        try:
            images = stack(table.with_format(None)[name][:], name, path.name)
        except OSError as error:
            raise UserError(f"{path.name}: {name!r} holds an image that cannot be decoded; save it again") from error
        return images[:, None] / 255 if images.ndim == 3 else images.transpose(0, 3, 1, 2) / 255

    return Columns(table.column_names, get, classes)


def read_values(columns: Columns, column: str, name: str) -> np.ndarray:
    """Read ``[n, ...]`` float32 from one array, from columns joined by ``+``, or from numbered columns."""
    if column in columns.names:
        selected = [column]
    elif "+" in column:
        selected = column.split("+")
    else:
        numbered = [c for c in columns.names if re.fullmatch(re.escape(column) + r"_?\d+", c)]
        selected = sorted(numbered, key=lambda c: int(re.findall(r"\d+$", c)[0])) or [column]
    parts = [_as_float32(columns.column(c, "x"), c, name) for c in selected]
    return parts[0] if len(parts) == 1 and parts[0].ndim > 1 else np.stack(parts, axis=1)


def _as_float32(values: np.ndarray, column: str, name: str) -> np.ndarray:
    """A column as float32; a column of sequences becomes a matrix."""
    if values.dtype == object and any(isinstance(v, list | tuple | np.ndarray) for v in values):
        values = stack(values, column, name)
    # NumPy would silently convert dates to numbers and drop imaginary parts.
    if values.dtype.kind in "cmMV":
        raise UserError(f"{name}: {column!r} is not numeric but has type {values.dtype}; save real numbers")
    try:
        # Values beyond the range of float32 become infinite; `check_rows` reports their position.
        with np.errstate(over="ignore"):
            return values.astype(np.float32)
    except (ValueError, TypeError):
        for row, value in enumerate(values):
            try:
                np.array([value], object).astype(np.float32)  # a text array would lose NUL at the end
            except (ValueError, TypeError):
                raise UserError(f"{name}: {column!r} is not numeric: {value!r} in row {row}; save numbers") from None
        raise


def stack(values: Sequence[Any] | np.ndarray, column: str, name: str) -> np.ndarray:
    """Stack sequences or images, one per row, into one array ``[n, ...]``.

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
    if different is not None:
        raise UserError(
            f"{name}: rows of {column!r} differ in shape (row 0 has {list(rows[0].shape)}, row {different} has "
            f"{list(rows[different].shape)}); bring them to one shape"
        )
    return np.stack(rows)  # type: ignore[call-overload]


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


def content_digest(path: Path) -> str:
    """SHA-256 of a file, or of all data files in a directory."""
    if path.is_file():
        return sha256(path)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return hashlib.sha256("".join(sha256(p) for p in files if p.suffix == ".arrow").encode()).hexdigest()


def check_rows(rows: Rows, name: str) -> None:
    """Raise unless all arrays have the same length, and ``x`` is finite and not empty."""
    lengths = {"x": len(rows.x), "y": len(rows.y), "user": len(rows.user)}
    if rows.recording is not None:
        lengths["recording"] = len(rows.recording)
    if len(set(lengths.values())) > 1:
        raise UserError(
            f"{name}: {', '.join(f'{k} has {n} rows' for k, n in lengths.items())}; they need the same number"
        )
    if not len(rows.x):
        raise UserError(f"{name} has no rows; save some")
    if not rows.x[0].size:
        raise UserError(f"{name}: an example of x has no values (shape {list(rows.x.shape[1:])}); save some")
    bad = ~np.isfinite(rows.x)
    if bad.any():
        index = [int(i) for i in np.argwhere(bad)[0]]
        raise UserError(
            f"{name}: x holds {int(bad.sum())} NaN or infinite values (first: row {index[0]}, position "
            f"{', '.join(map(str, index[1:]))}); remove or impute them"
        )


def refuse_missing(values: np.ndarray, what: str) -> None:
    """Raise unless ``values`` is ``[n]`` without missing values; ``what`` names it in the error."""
    import pandas as pd

    if values.ndim != 1:
        raise UserError(f"{what} must be one value per row, not an array of shape {list(values.shape)}")
    missing = np.flatnonzero(pd.isna(values))
    if len(missing):
        raise UserError(f"{what} is missing in {len(missing)} rows (first: row {missing[0]}); fill or drop them")
