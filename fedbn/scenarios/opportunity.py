"""Opportunity: four people in a kitchen with inertial units on back and arms, four modes of locomotion, 30 Hz.

Roggen et al., *Collecting complex activity datasets in highly rich networked sensor environments*, INSS 2010;
Chavarriaga et al., *The Opportunity challenge*, Pattern Recognition Letters 34 (2013) 2033-2042. Data: UCI Machine
Learning Repository, https://doi.org/10.24432/C5M027.

Layout, from the archive's ``column_names.txt``: ``dataset/S1-ADL1.dat`` to ``S4-ADL5.dat``, ``S1-Drill.dat`` and so on,
without a header, 250 columns separated by spaces, missing values as ``NaN``. Column 1 is the time in milliseconds.
Columns 38, 51, 64, 77 and 90 are the first of the units on back, right upper and lower arm, left upper and lower arm:
acceleration in thousandths of g (3), then rotation times 1000 in a unit that the file does not name (3). It is read as
rad/s, which fits the speed of arms in walking. Column 244 is locomotion: 1 stand, 2 walk, 4 sit, 5 lie, 0 none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from fedbn.data.examples import UNLABELED
from fedbn.data.resampling import Samples
from fedbn.scenarios.recorded import RecordedScenario, Recording

COLUMNS = 250
FIRST = {"back": 37, "right-upper-arm": 50, "right-lower-arm": 63, "left-upper-arm": 76, "left-lower-arm": 89}
"""First column (from 0) of each unit."""

LOCOMOTION = 243
"""Column (from 0) of the label."""


@dataclass(frozen=True)
class Opportunity(RecordedScenario):
    """4 users, 4 modes of locomotion, windows ``[6, window]``; options as in `RecordedScenario`.

    The last two of a person's six recordings, ADL4 and ADL5, are the test data, as in the challenge.

    Attributes:
        place: back, right-upper-arm, right-lower-arm, left-upper-arm or left-lower-arm.
    """

    name: ClassVar[str] = "opportunity"
    about: ClassVar[str] = "4 people in a kitchen, 4 modes of locomotion (path=)"
    archive: ClassVar[str] = "OpportunityUCIDataset"
    pattern: ClassVar[str] = "dataset/S*-*.dat"
    link: ClassVar[str] = "https://doi.org/10.24432/C5M027"
    license: ClassVar[str] = "as stated on the page of the archive"
    citation: ClassVar[str] = "Roggen et al., INSS 2010; Chavarriaga et al., Pattern Recognition Letters 34 (2013) 2033"
    classes: ClassVar[tuple[str, ...]] = ("standing", "walking", "sitting", "lying")
    codes: ClassVar[Mapping[int, int]] = {0: UNLABELED, 1: 0, 2: 1, 4: 2, 5: 3}

    place: Literal["back", "right-upper-arm", "right-lower-arm", "left-upper-arm", "left-lower-arm"] = "back"
    rate: float = 30.0
    window: int = 64

    def read(self, files: Sequence[Path]) -> Iterator[Recording]:
        first = FIRST[self.place]
        columns = [0, LOCOMOTION, *range(first, first + 6)]
        for file in sorted(files, key=_order):
            table = self.table(file, columns, COLUMNS, sep=r"\s+", header=None, dtype=np.float64).to_numpy()
            labels = self.labels(np.nan_to_num(table[:, 1]), file)
            yield Recording(_subject(file), Samples(table[:, 0] / 1000, table[:, 2:] / 1000, labels))


def _subject(file: Path) -> str:
    return file.stem.partition("-")[0]


def _order(file: Path) -> tuple[str, int]:
    """The drill first, then activities of daily living in order."""
    run = re.search(r"ADL(\d+)$", file.stem)
    return _subject(file), int(run[1]) if run else 0
