"""Files: your own recordings, from a file.

One row is one example: values ``x``, a class ``y``, the ``user`` it is from and, if there is such a
column, the ``recording``. Rows of a user are taken to be in the order in which they were recorded.

With recordings, a user's later recordings test. Without, the last rows test, and ``gap`` rows before them
are left out, since neighboring windows usually overlap: two windows with half their samples in common on
both sides of a split are a leak, and results look better than they are. Windows that overlap by more than
half need a larger gap.

Formats: ``.npz`` (arrays, no Python objects), ``.csv``, ``.parquet``, and a directory written by
``save_to_disk`` of Hugging Face ``datasets``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from fedbn.data.population import Examples, Population, User, hold_out
from fedbn.data.readers import Rows, _check, _content, _shaped, _values, read, refuse_missing
from fedbn.errors import UserError
from fedbn.scenarios.base import Scenario


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
