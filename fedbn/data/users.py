"""Make users from rows: encode classes and users, split each user's rows, leave out tiny users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fedbn.data.columns import Rows, check_rows
from fedbn.data.examples import Examples, User
from fedbn.data.labels import Encode, encode_labels, encode_names, label_notices, name_notices
from fedbn.data.lazy import LazyRows, is_mapped, tensor_of
from fedbn.data.timesplit import Split, split_user
from fedbn.data.values import read_values, rescale
from fedbn.errors import UserError

POOLED = "all rows"
"""Name of the only user of data without users."""

MAX_NAMES = 5
"""Number of users that a notice lists."""


@dataclass(frozen=True)
class Users:
    """Users made from rows.

    Attributes:
        users: users with enough rows, sorted by name.
        classes: class names, by index.
        test_only: indices of the users of whom the data set has test rows only.
        notices: what was decided.
    """

    users: list[User]
    classes: tuple[str, ...]
    test_only: tuple[int, ...]
    notices: list[str]


def build_users(
    rows: Rows,
    name: str,
    test: float,
    gap: int,
    *,
    least: int = 0,
    by_class: bool = True,
    encode: Encode = encode_labels,
) -> Users:
    """Users with their rows split, and the class names.

    Raises:
        UserError: if the data cannot be used for training. The message starts with ``name``.
    """
    if not 0 < test < 1:
        raise UserError(f"test={test} must be a share between 0 and 1, for instance 0.25")
    if gap < 0:
        raise UserError(f"gap={gap} must not be negative; use 0 to drop no row")
    check_rows(rows, name)
    if not is_mapped(rows.x):
        rows = replace(rows, x=np.ascontiguousarray(rows.x, dtype=np.float32))
    return _build(rows, np.arange(len(rows.x)), name, test, gap, least, by_class, encode)


def _build(
    rows: Rows, at: np.ndarray, name: str, test: float, gap: int, least: int, by_class: bool, encode: Encode
) -> Users:
    """`build_users` for checked rows; ``at`` has the index in ``rows.x`` of each row of the other arrays."""
    y, classes = encode(rows.y, name, rows.classes)
    notices = [] if rows.classes else label_notices(classes, name)
    groups = y if y.ndim == 1 and y.dtype.kind == "i" else np.zeros(len(y), np.int64)
    names, owners = [POOLED], np.zeros(len(y), np.int64)
    if rows.user is None:
        notices.append(f"{name}: there is no column of users, so clients are made by --partition, and nobody is unseen")
    else:
        names, owners = encode_names(rows.user, f"{name}: user")
        notices += name_notices(names, name)
    recordings = np.zeros(len(y), np.int64)
    if rows.recording is not None:
        known = encode_names(rows.recording, f"{name}: recording")[1]
        for i in range(len(names)):
            recordings[owners == i] = _renumber(known[owners == i])
    stretch = recordings if rows.stretch is None else rows.stretch
    splits = {
        user: split_user(
            np.flatnonzero(owners == i), groups, recordings, stretch, rows.split, test=test, gap=gap, by_class=by_class
        )
        for i, user in enumerate(names)
    }
    sizes = dict(zip(names, np.bincount(owners, minlength=len(names)).tolist(), strict=True))
    tiny = [u for u, s in splits.items() if sizes[u] < least or len(s.train) < 2 or not len(s.test)]
    if len(tiny) == len(names):
        first = splits[tiny[0]]
        raise UserError(
            f"{name}: user {tiny[0]!r} has {sizes[tiny[0]]} rows, which leaves {len(first.train)} to train and "
            f"{len(first.test)} to test, and no other user has more than {max(sizes.values())}; 2 and 1 are needed"
            + (f", and {least} in total (least={least})" if least else "")
            + ". Check user=, or change test= or gap="
        )
    if tiny:
        # Again without them, because they may be the only ones with a class.
        left = np.flatnonzero(~np.isin(owners, [names.index(u) for u in tiny]))
        chosen = replace(rows, x=at).take(left)
        rest = _build(replace(chosen, x=rows.x), chosen.x, name, test, gap, least, by_class, encode)
        listed = list_names([f"{u} ({sizes[u]} row{'s' * (sizes[u] != 1)})" for u in tiny])
        notice = f"{name}: {len(tiny)} of {len(names)} users have too few rows and are left out: {listed}"
        return replace(rest, notices=[*rest.notices, notice])
    mapped = is_mapped(rows.x)
    x = tensor_of(rows.x)

    def examples(index: np.ndarray, part: int) -> Examples:
        # Without recordings, training and test rows are numbered like two recordings.
        numbers = recordings[index] if rows.recording is not None else np.full(len(index), part)
        chosen = torch.from_numpy(at[index])
        values = LazyRows(x, chosen, rows.scale) if mapped else x[chosen]
        return Examples(values, torch.from_numpy(y[index]), torch.from_numpy(numbers))

    users = [
        User(
            user,
            name,
            examples(s.train, 0),
            examples(s.test, 1),
            None if s.validation is None else examples(s.validation, 0),
        )
        for user, s in splits.items()
    ]
    test_only: tuple[int, ...] = ()
    if rows.split is not None:
        parts = [set(rows.split[owners == i].tolist()) for i in range(len(names))]
        test_only = tuple(i for i, p in enumerate(parts) if "test" in p and "train" not in p)
    notices += _split_notices(splits, name, test, gap, rows)
    scarce = {int(c) for s in splits.values() if s.kind == "class" for c in set(groups[s.train]) - set(groups[s.test])}
    if scarce:
        listed = list_names([classes[c] for c in sorted(scarce)])
        notices.append(f"{name}: class {listed} has too few rows for test data of some users")
    return Users(users, classes, test_only, notices)


def _split_notices(splits: dict[str, Split], name: str, test: float, gap: int, rows: Rows) -> list[str]:
    """How rows were split, where it was not simply in time or by recording."""
    notices = []
    of = {kind: [u for u, s in splits.items() if s.kind == kind] for kind in ("own", "recording", "time", "class")}
    if rows.split is not None:
        own = [splits[u] for u in of["own"]]
        counts = {
            "to train": sum(len(s.train) for s in own),
            "to test": sum(len(s.test) for s in own),
            "for tuning only": sum(len(s.validation) for s in own if s.validation is not None),
        }
        if own:
            listed = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
            notices.append(f"{name}: the data set's own parts are used ({listed})")
        if rest := [u for u in splits if u not in of["own"]]:
            notices.append(f"{name}: {len(rest)} users are in one part only and are split further ({list_names(rest)})")
    elif rows.recording is not None and of["recording"] and of["time"]:
        notices.append(
            f"{name}: {len(of['time'])} users have one recording and are split in time ({list_names(of['time'])})"
        )
    if by_class := of["class"]:
        who = (
            f"{len(by_class)} of {len(splits)} users ({list_names(by_class)})" if rows.user is not None else "the file"
        )
        notices.append(
            f"{name}: rows of {who} come in long runs of one class; test data are the last {test:.0%} of each "
            f"class, with a gap of {gap} row{'s' * (gap != 1)}"
        )
    return notices


def list_names(names: Sequence[str]) -> str:
    """The first names, for a notice."""
    return ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")


def _renumber(values: np.ndarray) -> np.ndarray:
    """Number recordings by their first occurrence.

    >>> _renumber(np.array([7, 7, 3, 7])).tolist()
    [0, 0, 1, 0]
    """
    _, first, codes = np.unique(values, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[codes].astype(np.int64)


def read_single_user(path: Path, classes: int, *, x: str = "x", y: str = "y", test: float = 0.25, gap: int = 1) -> User:
    """Read a file with the data of one user.

    Classes must be numbers from 0, because one user may not have all of them, and all users have to agree on them.

    Args:
        path: the file.
        classes: number of classes.
        x: column of values, as in scenario ``files``.
        y: column of class numbers.
        test: fraction of the rows for testing.
        gap: number of rows dropped before the test rows.

    Raises:
        UserError: as for `fedbn.data.folders.read` and `build_users`, or if classes are names.
    """
    from fedbn.data.folders import read

    columns = read(path)
    labels = columns.column(y, "y")
    if labels.dtype.kind not in "iuf":
        raise UserError(f"{path.name}: classes must be numbers 0 to {classes - 1} here, the same for every user")
    values = rescale(read_values(columns, x, path.name), 0, path.name)[0]
    rows = Rows(values, labels, np.zeros(len(labels), np.int64), None, tuple(map(str, range(classes))))
    return build_users(rows, path.name, test, gap).users[0]
