"""Files: your own recordings, from a file.

One row is one example: values ``x``, a class ``y``, the ``user`` and, if the column exists, the ``recording``. The rows
of a user must be in the order of recording.

With recordings, a user's later recordings are the test data. Without recordings, the last rows are the test data, and
``gap`` rows before them are dropped, because neighboring windows usually overlap. Two windows that share half of their
samples on both sides of a split are a leak and make results look better than they are. Windows that overlap by more
than half need a larger gap.

Formats: ``.npz`` (arrays, no Python objects), ``.csv``, ``.parquet``, and a directory written by ``save_to_disk`` of
Hugging Face ``datasets``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from fedbn.data.population import Examples, Population, User, hold_out
from fedbn.data.readers import Rows, check_rows, content_digest, read, read_values, refuse_missing, reshape_rows
from fedbn.errors import UserError
from fedbn.scenarios.base import Scenario


@dataclass(frozen=True)
class Files(Scenario):
    """Your own data, e.g. ``files:path=walks.csv:x=acc:user=person:unseen=3``.

    Attributes:
        path: file or directory.
        x: array or column of values, columns joined by ``+``, or prefix of numbered columns (``x`` for x0, x1, ...).
        y: column of classes: numbers 0 to k-1, or names.
        user: column of users.
        recording: column of the user's recordings. If it is empty or does not exist, recordings are unknown.
        shape: shape of one example if ``x`` is flat, e.g. ``6+128`` for 6 channels of 128 samples.
        test: fraction of a user's recordings (or rows) for testing, in (0, 1).
        gap: number of rows dropped before the test rows if recordings are unknown.
        unseen: number of users that never train.
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
            raise UserError("scenario 'files' needs a path: files:path=FILE, with columns x, y and user")
        path = Path(self.path)
        name, columns = path.name, read(path)
        has_recordings = self.recording not in ("", "recording") or self.recording in columns.names
        rows = Rows(
            x=reshape_rows(read_values(columns, self.x, name), self.shape, name),
            y=columns.column(self.y, "y"),
            user=columns.column(self.user, "user"),
            recording=columns.column(self.recording, "recording") if has_recordings else None,
            classes=columns.classes.get(self.y, ()),
        )
        skew, sources = f"whatever skew the users of {name} have", {name: content_digest(path)}
        return build_population(
            rows, name=name, test=self.test, gap=self.gap, unseen=self.unseen, seed=seed, skew=skew, sources=sources
        )


def build_population(
    rows: Rows, *, name: str, test: float, gap: int, unseen: int, seed: int, skew: str, sources: dict[str, str]
) -> Population:
    """Check the rows, split each user's rows in time, and hold out users.

    Raises:
        UserError: if the data cannot be used for training. The message starts with ``name``.
    """
    users, classes = build_users(rows, name, test, gap)
    held_out = hold_out(len(users), unseen, seed)
    present = set(torch.cat([u.train.y for i, u in enumerate(users) if i not in held_out]).tolist())
    if missing := [c for i, c in enumerate(classes) if i not in present]:
        raise UserError(
            f"{name}: class {', '.join(missing)} is in no training row of the seen users (unseen: "
            f"{', '.join(users[i].name for i in held_out) or 'none'}); hold out fewer users, use another "
            "seed, or drop the class"
        )
    return Population(tuple(users), held_out, classes, skew, sources)


def build_users(rows: Rows, name: str, test: float, gap: int) -> tuple[list[User], tuple[str, ...]]:
    """Users with their rows split in time, and the class names.

    Raises:
        UserError: as for `build_population`.
    """
    if not 0 < test < 1:
        raise UserError(f"test={test} must be a share between 0 and 1, for instance 0.25")
    if gap < 0:
        raise UserError(f"gap={gap} must not be negative; use 0 to drop no row")
    check_rows(rows, name)
    y, classes = _encode_labels(rows.y, name, rows.classes)
    x = torch.from_numpy(np.ascontiguousarray(rows.x, dtype=np.float32))
    names, owners = _encode(rows.user, f"{name}: user")
    recordings = None if rows.recording is None else _encode(rows.recording, f"{name}: recording")[1]
    numbers = np.zeros(len(y), np.int64)
    users = []
    for i, user in enumerate(names):
        index = np.flatnonzero(owners == i)
        if recordings is None:
            parts = _split_by_time(index, test, gap)
            numbers[parts[1]] = 1
        else:
            numbers[index] = _renumber(recordings[index])
            parts = _split_by_recording(index, numbers[index], test, f"{name}: user {user!r}")
        if len(parts[0]) < 2 or not len(parts[1]):
            raise UserError(
                f"{name}: user {user!r} has {len(index)} rows, which leaves {len(parts[0])} to train and "
                f"{len(parts[1])} to test; 2 and 1 are needed. Remove the user, or change test= or gap="
            )
        train, test_part = (Examples(x[p], torch.from_numpy(y[p]), torch.from_numpy(numbers[p])) for p in parts)
        users.append(User(user, name, train, test_part))
    return users, classes


def read_single_user(path: Path, classes: int, *, x: str = "x", y: str = "y", test: float = 0.25, gap: int = 1) -> User:
    """Read a file with the data of one user.

    Classes must be numbers, because one user may not have all of them.

    Args:
        path: the file.
        classes: number of classes.
        x: column of values, as in `Files`.
        y: column of class numbers.
        test: fraction of the rows for testing.
        gap: number of rows dropped before the test rows.

    Raises:
        UserError: as for `read` and `build_population`, or if classes are names.
    """
    columns = read(path)
    labels = columns.column(y, "y")
    if labels.dtype.kind not in "iuf":
        raise UserError(f"{path.name}: classes must be numbers 0 to {classes - 1} here, the same for every user")
    owners = np.zeros(len(labels), np.int64)
    rows = Rows(read_values(columns, x, path.name), labels, owners, None, tuple(map(str, range(classes))))
    return build_users(rows, path.name, test, gap)[0][0]


def _encode_labels(values: np.ndarray, name: str, classes: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class indices ``[n]`` int64 and class names; names are sorted if the labels are names."""
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
        raise UserError(f"{name}: labels run from {low} to {high}, but classes must be numbered {allowed}")
    y = numbers.astype(np.int64)
    present = np.unique(y)
    if not classes and len(present) <= high:
        gap = next(i for i in range(high + 1) if i not in present)
        raise UserError(
            f"{name}: labels run from {low} to {high}, but no row has class {gap}; number classes 0 to k-1 without "
            "gaps, or use names"
        )
    return y, classes or tuple(map(str, range(high + 1)))


def _encode(values: np.ndarray, what: str) -> tuple[list[str], np.ndarray]:
    """Sorted unique names (numbers are sorted as numbers), and the index of each row's name."""
    refuse_missing(values, what)
    if values.dtype.kind == "O":
        values = values.astype(str)
    names, codes = np.unique(values, return_inverse=True)
    return [str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in names.tolist()], codes


def _renumber(values: np.ndarray) -> np.ndarray:
    """Number recordings by their first occurrence.

    >>> _renumber(np.array([7, 7, 3, 7])).tolist()
    [0, 0, 1, 0]
    """
    _, first, codes = np.unique(values, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[codes].astype(np.int64)


def _split_by_time(index: np.ndarray, test: float, gap: int) -> tuple[np.ndarray, np.ndarray]:
    cut = len(index) - max(1, round(test * len(index)))
    return index[: max(0, cut - gap)], index[cut:]


def _split_by_recording(
    index: np.ndarray, numbers: np.ndarray, test: float, user: str
) -> tuple[np.ndarray, np.ndarray]:
    count = int(numbers.max()) + 1
    if count < 2:
        raise UserError(
            f"{user} has a single recording, so none is left for testing; add a recording, remove the user, or "
            "split all users in time with an empty recording="
        )
    later = numbers >= count - min(count - 1, max(1, round(test * count)))
    return index[~later], index[later]
