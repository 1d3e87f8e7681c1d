"""PAMAP2: nine people with inertial units on hand, chest and ankle, twelve activities of a protocol, 100 Hz.

Reiss, Stricker, *Introducing a New Benchmarked Dataset for Activity Monitoring*, ISWC 2012, 108-109. Data: UCI Machine
Learning Repository, https://doi.org/10.24432/C5NW2H, CC BY 4.0.

Layout, from the archive's ``readme.pdf``: ``Protocol/subject101.dat`` to ``subject109.dat`` without a header, columns
separated by spaces, missing values as ``NaN``. There are 54 columns: time (s), activity, heart rate, and 17 for each
unit (hand, chest, ankle): temperature, acceleration in m/s2 at a scale of 16 g (3) and of 6 g (3), rotation in rad/s
(3), magnetic field (3), and an orientation (4) that is not valid. The 6 g scale saturates in running, so the 16 g scale
is used, as the authors recommend. Activity 0 is anything between the activities; it is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from fedbn.data.examples import UNLABELED
from fedbn.data.resampling import Samples
from fedbn.scenarios.recorded import GRAVITY, RecordedScenario, Recording

COLUMNS = 54
FIRST = {"hand": 3, "chest": 20, "ankle": 37}
"""First column (from 0) of each unit."""

ACTIVITIES = {
    1: "lying",
    2: "sitting",
    3: "standing",
    4: "walking",
    5: "running",
    6: "cycling",
    7: "Nordic walking",
    12: "ascending stairs",
    13: "descending stairs",
    16: "vacuum cleaning",
    17: "ironing",
    24: "rope jumping",
}
OTHERS = (0, 9, 10, 11, 18, 19, 20)
"""Transient, and the activities that are in the directory ``Optional`` only."""


@dataclass(frozen=True)
class Pamap2(RecordedScenario):
    """9 users, 12 activities, windows ``[6, window]``; options as in `RecordedScenario`.

    Attributes:
        place: hand, chest or ankle.
    """

    name: ClassVar[str] = "pamap2"
    about: ClassVar[str] = "9 people, unit on hand, chest or ankle, 12 activities (path=)"
    archive: ClassVar[str] = "PAMAP2_Dataset"
    pattern: ClassVar[str] = "Protocol/subject*.dat"
    link: ClassVar[str] = "https://doi.org/10.24432/C5NW2H"
    license: ClassVar[str] = "CC BY 4.0"
    citation: ClassVar[str] = "Reiss, Stricker, ISWC 2012, 108-109"
    classes: ClassVar[tuple[str, ...]] = tuple(ACTIVITIES.values())
    codes: ClassVar[Mapping[int, int]] = {code: i for i, code in enumerate(ACTIVITIES)} | dict.fromkeys(
        OTHERS, UNLABELED
    )

    place: Literal["hand", "chest", "ankle"] = "chest"
    unseen: int = 2

    def read(self, files: Sequence[Path]) -> Iterator[Recording]:
        first = FIRST[self.place]
        columns = [0, 1, *range(first + 1, first + 4), *range(first + 7, first + 10)]
        for file in files:
            table = self.table(file, columns, COLUMNS, sep=" ", header=None, dtype=np.float64).to_numpy()
            values = table[:, 2:] / [*[GRAVITY] * 3, *[1.0] * 3]
            yield Recording(file.stem, Samples(table[:, 0], values, self.labels(table[:, 1], file)))
