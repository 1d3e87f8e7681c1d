"""Files: your own recordings, from a file or a directory.

One row is one example: values ``x``, a class ``y``, the ``user`` and, if the column exists, the ``recording``. The rows
of a user must be in the order of recording. With ``window``, one row is one sample of a stream, and examples are
windows of consecutive samples.

Test data are, in this order of precedence: the parts train, validation and test that the data set has itself (a column
``split``, arrays ``x_train`` and ``x_test``, directories ``train`` and ``test``), later recordings, or the last rows,
with ``gap`` rows before them dropped, because neighboring windows usually overlap. Two windows that share half of
their samples on both sides of a split are a leak and make results look better than they are. Where the last rows lack
classes, because rows come class by class, the last rows of each class are the test data.

Formats: ``.npz`` (arrays, no Python objects), ``.csv`` and other text tables, ``.parquet``, directories of these files
(one per user), and a directory written by ``save_to_disk`` of Hugging Face ``datasets``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from fedbn.data.columns import Columns, Rows, check_rows, split_names, split_of
from fedbn.data.population import Population, build_population
from fedbn.data.readers import content_digest
from fedbn.data.values import channels_first, fit_length, read_values, rescale, reshape_rows
from fedbn.errors import UserError
from fedbn.scenarios.base import Scenario
from fedbn.tasks import Task, parse_task

OTHER_SPLITS = ("subset", "set", "partition", "phase")
"""Columns that are read like ``split`` if all their values are names of parts."""


@dataclass(frozen=True)
class Files(Scenario):
    """Your own data, e.g. ``files:path=walks.csv:x=acc:user=person:unseen=3``.

    Attributes:
        path: file or directory.
        x: array or column of values, columns joined by ``+``, a range ``first..last``, or prefix of numbered columns
            (``x`` for x0, x1, ...).
        y: column of targets: classes as numbers, names or one-hot, or what the task needs, such as real numbers.
        user: column of users. If it is empty or does not exist, a partition has to make clients of all rows.
        recording: column of the user's recordings. If it is empty or does not exist, recordings are unknown.
        split: column that says train, validation or test. If it is empty or does not exist, rows are split.
        time: column of times, by which rows are sorted and gaps in streams are found. If it is empty or does not
            exist, times are unknown.
        shape: shape of one example if ``x`` is flat, e.g. ``6+128`` for 6 channels of 128 samples.
        layout: whether channels are the first or last axis of an example.
        scale: number by which values are divided; 0 for the largest value of 8-bit arrays and 16-bit images.
        length: samples per series: longer ones are cut at the end, shorter ones are padded with zeros.
        window: samples per window if each row is one sample of a stream; 0 if rows are examples.
        overlap: fraction of a window that overlaps with the next one, in [0, 1).
        labels: a window has its most frequent label (``majority``), or windows do not cross labels (``constant``).
        least: smallest number of examples of a user. Users with fewer, or too few to split, are left out.
        test: fraction of a user's recordings (or rows) for testing, in (0, 1).
        gap: number of rows dropped before the test rows if recordings are unknown; with ``window``, those that overlap
            test windows are dropped.
        unseen: number of users that never train.
        triples: channels of the axes x, y, z of each sensor of a worn device, acceleration with gravity first, e.g.
            ``0+1+2+3+4+5``. Needed by the alignment ``rotation``, and for checks of units and saturation.
    """

    name: ClassVar[str] = "files"
    about: ClassVar[str] = "your own .npz, .csv, .parquet or datasets directory"
    model: ClassVar[str] = "mlp"

    path: str = ""
    x: str = "x"
    y: str = "y"
    user: str = "user"
    recording: str = "recording"
    split: str = "split"
    time: str = "time"
    shape: tuple[int, ...] = ()
    layout: Literal["auto", "first", "last"] = "auto"
    scale: float = 0.0
    length: int = 0
    window: int = 0
    overlap: float = 0.5
    labels: Literal["majority", "constant"] = "majority"
    least: int = 0
    test: float = 0.25
    gap: int = 1
    unseen: int = 1
    triples: tuple[int, ...] = ()

    def load(self, seed: int) -> Population:
        return self.load_for(parse_task(self.task), seed)

    def load_for(self, task: Task, seed: int) -> Population:
        # Imported here because listing the scenarios does not need pandas.
        from fedbn.data.folders import read

        if not self.path:
            raise UserError("scenario 'files' needs a path: files:path=FILE, with columns x, y and user")
        if self.scale < 0 or self.length < 0 or self.window < 0 or self.least < 0:
            raise UserError("scale=, length=, window= and least= must not be negative")
        if self.window and not task.has_posterior:
            raise UserError(
                f"window= gives a window its most frequent label, which task {task.name!r} does not have: cut the "
                "windows yourself, and give one row per window"
            )
        path = Path(self.path)
        rows, gap, notices = self._rows(read(path), path.name)
        population = build_population(
            rows,
            name=path.name,
            test=self.test,
            gap=gap,
            unseen=self.unseen,
            seed=seed,
            skew=f"natural differences between the users of {path.name}",
            sources={path.name: content_digest(path)},
            least=self.least,
            encode=task.encode,
            notices=notices,
        )
        return replace(population, triples=self._triples(population.shape))

    def _triples(self, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
        chosen = self.triples
        if chosen and (len(shape) != 2 or len(chosen) % 3 or len({*chosen} & {*range(shape[0])}) != len(chosen)):
            raise UserError(
                f"triples={'+'.join(map(str, chosen))} must name three channels of each sensor once, numbered from 0, "
                f"of windows [channels, length]; examples have shape {list(shape)}"
            )
        return tuple((chosen[i], chosen[i + 1], chosen[i + 2]) for i in range(0, len(chosen), 3))

    def _rows(self, columns: Columns, name: str) -> tuple[Rows, int, list[str]]:
        """Examples, the rows to drop between training and test data, and notices."""
        from fedbn.data.cutting import cut_rows
        from fedbn.data.times import read_times, sort_in_time

        notices = list(columns.notices)
        x, found = self._values(columns, name)
        notices += found
        split = self._split(columns, name)
        label = self.y if columns.find(self.y) else "+".join(columns.numbered(self.y)) or self.y
        y = [columns.column(part, "y") for part in ([label] if columns.find(label) else label.split("+"))]
        recording = self._optional(columns, self.recording, "recording")
        user = self._optional(columns, self.user, "user")
        classes = columns.classes.get(self.y, ())
        rows = Rows(x, y[0] if len(y) == 1 else np.stack(y, axis=1), user, recording, classes, split)
        check_rows(rows, name)
        times = read_times(columns, self.time, name)
        if times is not None:
            if len(times) != len(rows.x):
                raise UserError(f"{name}: times have {len(times)} rows, x has {len(rows.x)}; leave them out with time=")
            rows, times, found = sort_in_time(rows, times, name)
            notices += found
        if not self.window:
            return rows, self.gap, notices
        rows, found = cut_rows(rows, times, self.window, self.overlap, self.labels, name)
        # The windows before a window that share samples with it.
        step = max(1, round(self.window * (1 - self.overlap)))
        return rows, math.ceil(self.window / step) - 1, notices + found

    def _values(self, columns: Columns, name: str) -> tuple[np.ndarray, list[str]]:
        x = reshape_rows(read_values(columns, self.x, name, self.length), self.shape, name)
        if self.window:
            return x.astype(np.float32) / np.float32(self.scale or 1), []
        x, moved = channels_first(x, self.layout, name)
        if self.length and x.ndim > 1:
            x = fit_length(x, self.length)
        x, scaled = rescale(x, self.scale, name)
        return x, moved + scaled

    def _split(self, columns: Columns, name: str) -> np.ndarray | None:
        """Part of the data set of each row, from ``split`` or a column with another usual name and such values."""
        values, column = self._optional(columns, self.split, "split"), self.split
        for other in OTHER_SPLITS if values is None and column else ():
            if columns.find(other) and all(split_of(str(v)) for v in set(columns.column(other, "split").tolist())):
                values, column = columns.column(other, "split"), other
        if values is None:
            return None
        return split_names(values, name, column)

    def _optional(self, columns: Columns, column: str, option: str) -> np.ndarray | None:
        """A column; None if it is empty, or does not exist under its default name."""
        if not column or (column == option and not columns.find(column)):
            return None
        return columns.column(column, option)
