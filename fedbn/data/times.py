"""Times of rows: read a column of times, and put rows into the order of time."""

from __future__ import annotations

import numpy as np

from fedbn.data.columns import Columns, Rows
from fedbn.data.cutting import number
from fedbn.errors import UserError

NAMES = ("time", "t", "timestamp", "timestamps", "datetime")
"""Columns of times that need not be named."""

SHUFFLED = 0.1
"""If time goes back at more than this share of the rows, the rows are not in order; otherwise it starts again."""


def read_times(columns: Columns, column: str, name: str) -> np.ndarray | None:
    """Times of the rows as float64 (in any unit), or None if there are none.

    Args:
        columns: columns of the file.
        column: name; empty to use none, ``time`` for any of `NAMES` that exists.
        name: file name, for messages.

    Raises:
        UserError: if the column is named, but holds no times.
    """
    import pandas as pd

    named = column not in ("", "time")
    wanted = [column] if named else NAMES if column else ()
    found = next((c for c in wanted if columns.find(c)), None)
    if found is None and not named:
        return None
    values = columns.column(found or column, "time")
    try:
        if values.dtype.kind not in "biufM":
            values = pd.to_datetime(pd.Series(values), format="mixed", utc=True).to_numpy("datetime64[ns]")
        times = values.astype(np.int64 if values.dtype.kind == "M" else np.float64).astype(np.float64)
        if values.ndim != 1 or not np.isfinite(times).all() or (values.dtype.kind == "M" and np.isnat(values).any()):
            raise ValueError
    except (ValueError, TypeError):
        if not named:
            return None
        raise UserError(f"{name}: {column!r} holds no times; give numbers or dates, or leave out time=") from None
    return times


def sort_in_time(rows: Rows, times: np.ndarray, name: str) -> tuple[Rows, np.ndarray, list[str]]:
    """Sort the rows of each user and recording in time, if they are not in order.

    Where time goes back only now and then, it starts again, and rows are left as they are.

    Returns:
        The rows, their times, and a notice if they were sorted.
    """
    n = len(times)
    owner, recording = number(rows.user, n), number(rows.recording, n)
    order = np.lexsort((recording, owner))
    inside = (np.diff(owner[order]) == 0) & (np.diff(recording[order]) == 0)
    back = inside & (np.diff(times[order]) < 0)
    if back.sum() <= SHUFFLED * inside.sum():
        return rows, times, []
    order = np.lexsort((times, recording, owner))
    return rows.take(order), times[order], [f"{name}: rows are not in order of time and are sorted (time= leaves them)"]
