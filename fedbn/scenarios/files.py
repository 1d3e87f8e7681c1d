"""Files: your own recordings, from a file.

One row is one example: values ``x``, a class ``y``, the ``user`` it is from and, if there is such a
column, the ``recording``. Rows of a user are taken to be in the order in which they were recorded.

With recordings, a user's later recordings test. Without, the last rows test, and ``gap`` rows before them
are left out, since neighbouring windows usually overlap: two windows with half their samples in common on
both sides of a split are a leak, and results look better than they are. Windows that overlap by more than
half need a larger gap.

Formats: ``.npz`` (arrays, no Python objects), ``.csv``, ``.parquet``, and a directory written by
``save_to_disk`` of Hugging Face ``datasets``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from fedbn.data.packages import sha256
from fedbn.errors import UserError, unknown
from fedbn.scenario import Examples, Population, Scenario, User, hold_out


@dataclass(frozen=True)
class Files(Scenario):
    """Your own data, e.g. ``files:path=walks.csv:x=acc:user=person:unseen=3``.

    Attributes:
        path: the file or directory.
        x: the array or column of values; or columns joined by ``+``; or the beginning of numbered columns
            (``x`` for x0, x1, ...).
        y: classes: numbers 0 to k-1, or names.
        user: whose the row is.
        recording: which recording of the user it is from; empty, or no such column: none are known.
        shape: of one example if ``x`` holds it flat, e.g. ``6+128`` for 6 channels of 128 samples.
        test: share of a user's recordings (or rows) that test, more than 0 and less than 1.
        gap: rows left out before the test rows where recordings are not known.
        unseen: users that never train.
    """

    name: ClassVar[str] = "files"
    about: ClassVar[str] = "your own .npz, .csv, .parquet or datasets directory"
    model: ClassVar[str] = "mlp"

    path: str = ""
    x: str = "x"
    y: str = "y"
    user: str = "user"
    recording: str = "recording"
    shape: tuple[int, ...] = ()
    test: float = 0.25
    gap: int = 1
    unseen: int = 1

    def load(self, seed: int) -> Population:
        if not self.path:
            raise UserError("scenario 'files' needs a path: files:path=FILE, with x, y and user columns in it")
        path = Path(self.path)
        columns = read(path)
        given = self.recording not in ("", "recording") or self.recording in columns.names
        rows = Rows(
            x=_shaped(_values(columns, self.x, path.name), self.shape, path.name),
            y=columns.column(self.y, "y"),
            user=columns.column(self.user, "user"),
            recording=columns.column(self.recording, "recording") if given else None,
            classes=columns.classes.get(self.y, ()),
        )
        return population(
            rows,
            name=path.name,
            test=self.test,
            gap=self.gap,
            unseen=self.unseen,
            seed=seed,
            skew=f"whatever skew the users of {path.name} have",
            sources={path.name: _content(path)},
        )


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


def population(
    rows: Rows,
    *,
    name: str,
    test: float,
    gap: int,
    unseen: int,
    seed: int,
    skew: str,
    sources: dict[str, str],
) -> Population:
    """Check rows, split each user's in time, hold users out.

    Raises:
        UserError: anything that could not be trained on; the message starts with ``name``.
    """
    users, classes = people(rows, name, test, gap)
    away = hold_out(len(users), unseen, seed)
    known = set(torch.cat([u.train.y for i, u in enumerate(users) if i not in away]).tolist())
    if missing := [c for i, c in enumerate(classes) if i not in known]:
        raise UserError(
            f"{name}: class {', '.join(missing)} is in no training row of the seen users (unseen: "
            f"{', '.join(users[i].name for i in away) or 'none'}); see more users, use another seed, or drop the class"
        )
    return Population(tuple(users), away, classes, skew, sources)


def people(rows: Rows, name: str, test: float, gap: int) -> tuple[list[User], tuple[str, ...]]:
    """Users with their rows split in time, and the names of the classes.

    Raises:
        UserError: as `population`.
    """
    if not 0 < test < 1:
        raise UserError(f"test={test} must be a share between 0 and 1, for instance 0.25")
    if gap < 0:
        raise UserError(f"gap={gap} must not be negative; 0 leaves no row out")
    _check(rows, name)
    y, classes = _labels(rows.y, name, rows.classes)
    x = torch.from_numpy(np.ascontiguousarray(rows.x, dtype=np.float32))
    names, whose = _identities(rows.user, f"{name}: user")
    recordings = None if rows.recording is None else _identities(rows.recording, f"{name}: recording")[1]
    numbers = np.zeros(len(y), np.int64)
    users = []
    for i, user in enumerate(names):
        mine = np.flatnonzero(whose == i)
        if recordings is None:
            parts = _by_time(mine, test, gap)
            numbers[parts[1]] = 1
        else:
            numbers[mine] = _in_order(recordings[mine])
            parts = _by_recording(mine, numbers[mine], test, f"{name}: user {user!r}")
        if len(parts[0]) < 2 or not len(parts[1]):
            raise UserError(
                f"{name}: user {user!r} has {len(mine)} rows, which leaves {len(parts[0])} to train and "
                f"{len(parts[1])} to test; 2 and 1 are needed. Leave the user out, or change test= or gap="
            )
        train, held = (Examples(x[p], torch.from_numpy(y[p]), torch.from_numpy(numbers[p])) for p in parts)
        users.append(User(user, name, train, held))
    return users, classes


def one_user(path: Path, classes: int, *, x: str = "x", y: str = "y", test: float = 0.25, gap: int = 1) -> User:
    """The only user of a file; classes are numbered, since one user need not have all of them.

    Args:
        path: the file.
        classes: how many there are.
        x: column of values, as in `Files`.
        y: column of class numbers.
        test: share of the rows that test.
        gap: rows left out before them.

    Raises:
        UserError: as `read` and `population`; or classes that are named rather than numbered.
    """
    columns = read(path)
    labels = columns.column(y, "y")
    if labels.dtype.kind not in "iuf":
        raise UserError(f"{path.name}: classes must be numbers 0 to {classes - 1} here, the same with every user")
    whose = np.zeros(len(labels), np.int64)
    rows = Rows(_values(columns, x, path.name), labels, whose, None, tuple(map(str, range(classes))))
    return people(rows, path.name, test, gap)[0][0]


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


def _labels(values: np.ndarray, name: str, classes: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """``[n]`` int64 and the names of the classes, sorted if the labels are names themselves."""
    refuse_missing(values, f"{name}: label")
    if values.dtype.kind in "OUS" and not all(isinstance(v, int | float) for v in values.tolist()):
        names, codes = np.unique(values.astype(str), return_inverse=True)
        return codes.astype(np.int64), tuple(names.tolist())
    numbers = values.astype(np.float64)
    if (numbers != np.floor(numbers)).any():
        row = int(np.flatnonzero(numbers != np.floor(numbers))[0])
        raise UserError(f"{name}: labels are class numbers 0 to k-1 or names, but row {row} holds {numbers[row]:g}")
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or (classes and high >= len(classes)):
        allowed = f"0 to {len(classes) - 1}" if classes else "0 to k-1"
        raise UserError(f"{name}: labels run from {low} to {high}, but classes are numbered {allowed}")
    y = numbers.astype(np.int64)
    present = np.unique(y)
    if not classes and len(present) <= high:
        gap = next(i for i in range(high + 1) if i not in present)
        raise UserError(
            f"{name}: labels run from {low} to {high}, but no row has class {gap}; number classes 0 to k-1 without "
            "gaps, or write names"
        )
    return y, classes or tuple(map(str, range(high + 1)))


def _identities(values: np.ndarray, what: str) -> tuple[list[str], np.ndarray]:
    """Names, sorted (numbers as numbers), and for each row the index of its name."""
    refuse_missing(values, what)
    if values.dtype.kind == "O":
        values = values.astype(str)
    names, codes = np.unique(values, return_inverse=True)
    return [str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in names.tolist()], codes


def _in_order(values: np.ndarray) -> np.ndarray:
    """Recordings numbered by when they first appear.

    >>> _in_order(np.array([7, 7, 3, 7])).tolist()
    [0, 0, 1, 0]
    """
    _, first, codes = np.unique(values, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[codes].astype(np.int64)


def _by_time(mine: np.ndarray, test: float, gap: int) -> tuple[np.ndarray, np.ndarray]:
    cut = len(mine) - max(1, round(test * len(mine)))
    return mine[: max(0, cut - gap)], mine[cut:]


def _by_recording(mine: np.ndarray, numbers: np.ndarray, test: float, who: str) -> tuple[np.ndarray, np.ndarray]:
    count = int(numbers.max()) + 1
    if count < 2:
        raise UserError(
            f"{who} has a single recording, so no later one is left to test on; record another, leave the user out, or "
            "split all users in time with an empty recording="
        )
    later = numbers >= count - min(count - 1, max(1, round(test * count)))
    return mine[~later], mine[later]
