"""HARTH: people in daily life with accelerometers on the lower back and the right thigh, twelve activities, 50 Hz.

Logacjov, Bach, Kongsvold, Bårdstu, Mork, *HARTH: A Human Activity Recognition Dataset for Machine Learning*, Sensors 21
(2021) 7853, https://doi.org/10.3390/s21237853. Data: UCI Machine Learning Repository (22 people),
https://doi.org/10.24432/C5NC90, CC BY 4.0; the authors' repository ``ntnu-ai-lab/harth-ml-experiments`` has a newer
version (31 people) with the same layout.

Layout, from the description in the UCI repository: one file per person, ``S006.csv`` and so on, with the header
``timestamp,back_x,back_y,back_z,thigh_x,thigh_y,thigh_z,label``; accelerations in g, times as dates. Some files have
an additional column of row numbers. Codes of activities are those of the authors' README.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from fedbn.data.resampling import Samples
from fedbn.errors import UserError
from fedbn.scenarios.recorded import RecordedScenario, Recording

ACTIVITIES = {
    1: "walking",
    2: "running",
    3: "shuffling",
    4: "ascending stairs",
    5: "descending stairs",
    6: "standing",
    7: "sitting",
    8: "lying",
    13: "cycling, sitting",
    14: "cycling, standing",
    130: "cycling, sitting, inactive",
    140: "cycling, standing, inactive",
}


@dataclass(frozen=True)
class Harth(RecordedScenario):
    """22 users, 12 activities, acceleration ``[3, window]``; options as in `RecordedScenario`.

    Attributes:
        place: back or thigh.
    """

    name: ClassVar[str] = "harth"
    about: ClassVar[str] = "22 people, sensor on back or thigh, 12 activities (path=)"
    archive: ClassVar[str] = "harth"
    pattern: ClassVar[str] = "S*.csv"
    link: ClassVar[str] = "https://doi.org/10.24432/C5NC90"
    license: ClassVar[str] = "CC BY 4.0"
    citation: ClassVar[str] = "Logacjov, Bach, Kongsvold, Bårdstu, Mork, Sensors 21 (2021) 7853"
    classes: ClassVar[tuple[str, ...]] = tuple(ACTIVITIES.values())
    codes: ClassVar[Mapping[int, int]] = {code: i for i, code in enumerate(ACTIVITIES)}

    place: Literal["back", "thigh"] = "back"
    unseen: int = 4

    def read(self, files: Sequence[Path]) -> Iterator[Recording]:
        import pandas as pd

        axes = [f"{self.place}_{axis}" for axis in "xyz"]
        for file in files:
            table = self.table(file, ["timestamp", *axes, "label"])
            try:
                dates = pd.to_datetime(table["timestamp"], format="ISO8601")
            except ValueError as error:
                raise UserError(
                    f"{self.name}: {file.name} holds a timestamp that is no date; unpack the archive again"
                ) from error
            times = (dates - dates.iloc[0]).dt.total_seconds().to_numpy()
            labels = self.labels(table["label"].to_numpy(), file)
            yield Recording(file.stem, Samples(times, table[axes].to_numpy(np.float64), labels))
