"""Read examples from npz, csv and parquet files and from saved `datasets` directories."""

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
    """What a file holds, not yet interpreted.

    Attributes:
        names: of arrays or columns.
        get: one of them; the first axis is the row.
        classes: for columns of class numbers whose file knows the names: these.
    """

    names: Sequence[str]
    get: Callable[[str], np.ndarray]
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def column(self, name: str, option: str) -> np.ndarray:
        """One column, or the error that suggests the nearest name."""
        if name not in self.names:
            raise unknown(f"column for {option} (set it with {option}=NAME)", name, self.names)
        values = self.get(name)
        if not values.ndim:
            raise UserError(f"{name!r} is a single value, but {option} is one value a row; set {option}=NAME")
        return values


@dataclass(frozen=True)
class Rows:
    """Examples of all users, in recorded order; ``[n]`` each and ``x`` of ``[n, *shape]``."""

    x: np.ndarray
    y: np.ndarray
    user: np.ndarray
    recording: np.ndarray | None
    classes: tuple[str, ...] = ()


def read(path: Path) -> Columns:
    """Open a file by its ending.

    Raises:
        UserError: no such file, unknown ending, or a content that is not what the ending says.
    """
    if not path.exists():
        raise UserError(f"there is no file {str(path)!r}; check path=, which is relative to where you are")
    readers = {".npz": _npz, ".csv": _csv, ".parquet": _parquet}
    reader = _saved if path.is_dir() else readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{path.name}: data are read from .npz, .csv, .parquet or a directory of datasets.save_to_disk, "
            f"not from {path.suffix or 'a file without ending'!r}; convert the file"
        )
    try:
        return reader(path)
    except UserError:
        raise
    except Exception as error:  # every parser has its own kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path.name} cannot be read ({reason}); write it again or check its ending") from error


def _npz(path: Path) -> Columns:
    with np.load(path, allow_pickle=False) as file:
        arrays = {}
        for name in file.files:
            try:
                arrays[name] = file[name]
            except ValueError:
                raise UserError(
                    f"{path.name}: array {name!r} holds Python objects, for instance rows of differing length; bring "
                    "rows to one length and save plain numbers or strings"
                ) from None
    return Columns(list(arrays), arrays.__getitem__)


def _csv(path: Path) -> Columns:
    import pandas as pd

    frame = pd.read_csv(path)
    return Columns(list(frame.columns), lambda name: frame[name].to_numpy())


def _parquet(path: Path) -> Columns:
    import pandas as pd

    frame = pd.read_parquet(path)
    return Columns(list(frame.columns), lambda name: frame[name].to_numpy())


def _saved(path: Path) -> Columns:
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
            # The NumPy format fails on missing lists without a word on where; as objects they are found.
            if stored.null_count:
                return pd.Series(stored.to_pylist(), dtype=object).to_numpy()
            return np.asarray(table.with_format("numpy")[name][:])
        try:
            images = stack(table.with_format(None)[name][:], name, path.name)
        except OSError as error:
            raise UserError(f"{path.name}: {name!r} holds an image that cannot be decoded; save it again") from error
        return images[:, None] / 255 if images.ndim == 3 else images.transpose(0, 3, 1, 2) / 255

    return Columns(table.column_names, get, classes)


def _values(columns: Columns, wanted: str, name: str) -> np.ndarray:
    """``[n, ...]`` float32 from one array, from columns joined by ``+``, or from numbered columns."""
    if wanted in columns.names:
        chosen = [wanted]
    elif "+" in wanted:
        chosen = wanted.split("+")
    else:
        numbered = [c for c in columns.names if re.fullmatch(re.escape(wanted) + r"_?\d+", c)]
        chosen = sorted(numbered, key=lambda c: int(re.findall(r"\d+$", c)[0])) or [wanted]
    parts = [_numbers(columns.column(c, "x"), c, name) for c in chosen]
    return parts[0] if len(parts) == 1 and parts[0].ndim > 1 else np.stack(parts, axis=1)


def _numbers(values: np.ndarray, column: str, name: str) -> np.ndarray:
    """A column as float32; a column of sequences becomes a matrix."""
    if values.dtype == object and any(isinstance(v, list | tuple | np.ndarray) for v in values):
        values = stack(values, column, name)
    # NumPy would turn dates into numbers and drop imaginary parts without a word.
    if values.dtype.kind in "cmMV":
        raise UserError(f"{name}: {column!r} is not numeric but of type {values.dtype}; save real numbers")
    try:
        # Values beyond float32 become infinite, which is reported with its place further on.
        with np.errstate(over="ignore"):
            return values.astype(np.float32)
    except (ValueError, TypeError):
        for row, value in enumerate(values):
            try:
                np.asarray(value).astype(np.float32)
            except (ValueError, TypeError):
                raise UserError(f"{name}: {column!r} is not numeric: {value!r} in row {row}") from None
        raise


def stack(values: Sequence[Any] | np.ndarray, column: str, name: str) -> np.ndarray:
    """Sequences or images, one a row, as one array ``[n, ...]``.

    Raises:
        UserError: a row is missing, ragged in itself, or of another shape than the first.
    """
    rows = np.empty(len(values), object)
    for i, value in enumerate(values):
        try:
            rows[i] = None if value is None else _nested(value)
        except ValueError:
            raise UserError(f"{name}: row {i} of {column!r} is ragged; bring its parts to one length") from None
    refuse_missing(rows, f"{name}: {column!r}")
    odd = next((i for i, row in enumerate(rows) if row.shape != rows[0].shape), None)
    if odd is not None:
        raise UserError(
            f"{name}: rows of {column!r} differ in shape (row 0 has {list(rows[0].shape)}, row {odd} has "
            f"{list(rows[odd].shape)}); bring them to one shape"
        )
    return np.stack(rows)  # type: ignore[call-overload]


def _nested(value: Any) -> np.ndarray:
    """A sequence of sequences as an array; Parquet gives them as arrays of arrays.

    >>> parts = np.empty(2, object)
    >>> parts[0] = parts[1] = np.zeros(3)
    >>> _nested(parts).shape
    (2, 3)
    """
    array = np.asarray(value)
    if array.dtype == object and array.ndim == 1 and any(isinstance(v, np.ndarray) for v in array):
        return np.stack([_nested(v) for v in array])
    return array


def _shaped(x: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    if not shape:
        return x
    size = int(np.prod(x.shape[1:]))
    if min(shape) < 1 or int(np.prod(shape)) != size:
        raise UserError(
            f"{name}: shape={'+'.join(map(str, shape))} makes {int(np.prod(shape))} values an example, rows have {size}"
        )
    return x.reshape(len(x), *shape)


def _content(path: Path) -> str:
    """Digest of a file, or of all data files of a directory."""
    if path.is_file():
        return sha256(path)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return hashlib.sha256("".join(sha256(p) for p in files if p.suffix == ".arrow").encode()).hexdigest()


def _check(rows: Rows, name: str) -> None:
    """Equal lengths, some data, finite values."""
    lengths = {"x": len(rows.x), "y": len(rows.y), "user": len(rows.user)}
    if rows.recording is not None:
        lengths["recording"] = len(rows.recording)
    if len(set(lengths.values())) > 1:
        raise UserError(
            f"{name}: {', '.join(f'{k} has {n} rows' for k, n in lengths.items())}; a row is an example in all of them"
        )
    if not len(rows.x):
        raise UserError(f"{name} has no rows")
    if not rows.x[0].size:
        raise UserError(f"{name}: an example of x has no values (shape {list(rows.x.shape[1:])}); save some")
    bad = ~np.isfinite(rows.x)
    if bad.any():
        place = [int(i) for i in np.argwhere(bad)[0]]
        raise UserError(
            f"{name}: x holds {int(bad.sum())} NaN or infinite values (first: row {place[0]}, position "
            f"{', '.join(map(str, place[1:]))}); remove or impute them"
        )


def refuse_missing(values: np.ndarray, what: str) -> None:
    """Raise unless ``values`` is ``[n]`` and present in every row; ``what`` names it."""
    import pandas as pd

    if values.ndim != 1:
        raise UserError(f"{what} must be one value a row, not an array of shape {list(values.shape)}")
    missing = np.flatnonzero(pd.isna(values))
    if len(missing):
        raise UserError(f"{what} is missing in {len(missing)} rows (first: row {missing[0]}); fill or drop them")
