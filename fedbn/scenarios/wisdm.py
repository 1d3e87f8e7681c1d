"""WISDM: 51 people with a phone in the pocket and a watch, eighteen activities of three minutes each, 20 Hz.

Weiss, Yoneda, Hayajneh, *Smartphone and Smartwatch-Based Biometrics Using Activities of Daily Living*, IEEE Access 7
(2019) 133190-133202. Data: UCI Machine Learning Repository, https://doi.org/10.24432/C5HK59, CC BY 4.0.

Layout, from the description in the archive: ``raw/phone/accel/data_1600_accel_phone.txt`` and the same for ``gyro`` and
``watch``, without a header. A line is ``1600,A,252207666810782,-0.36476135,8.793503,1.0550842;``: person, code of the
activity, time, and three axes (m/s2, rad/s). ``activity_key.txt`` lists the codes A to S without N. Times are counted
in nanoseconds, as the steps of about 50 ms at 20 Hz show. Both sensors of a device have their own times; rotation is
interpolated at the times of acceleration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from fedbn.data.resampling import MAX_GAP, Samples
from fedbn.errors import UserError
from fedbn.scenarios.recorded import GRAVITY, RecordedScenario, Recording

Table = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Classes ``[n]``, times in seconds ``[n]``, axes ``[n, 3]``."""

ACTIVITIES = {
    "A": "walking",
    "B": "jogging",
    "C": "stairs",
    "D": "sitting",
    "E": "standing",
    "F": "typing",
    "G": "brushing teeth",
    "H": "eating soup",
    "I": "eating chips",
    "J": "eating pasta",
    "K": "drinking",
    "L": "eating a sandwich",
    "M": "kicking a ball",
    "O": "catching a ball",
    "P": "dribbling",
    "Q": "writing",
    "R": "clapping",
    "S": "folding clothes",
}


@dataclass(frozen=True)
class Wisdm(RecordedScenario):
    """51 users, 18 activities, windows ``[6, window]``; options as in `RecordedScenario`.

    Attributes:
        place: phone or watch.
    """

    name: ClassVar[str] = "wisdm"
    about: ClassVar[str] = "51 people, phone in the pocket or watch, 18 activities (path=)"
    archive: ClassVar[str] = "wisdm-dataset"
    pattern: ClassVar[str] = "raw/*/*/data_*.txt"
    link: ClassVar[str] = "https://doi.org/10.24432/C5HK59"
    license: ClassVar[str] = "CC BY 4.0"
    citation: ClassVar[str] = "Weiss, Yoneda, Hayajneh, IEEE Access 7 (2019) 133190-133202"
    classes: ClassVar[tuple[str, ...]] = tuple(ACTIVITIES.values())
    codes: ClassVar[Mapping[str, int]] = {code: i for i, code in enumerate(ACTIVITIES)}

    place: Literal["phone", "watch"] = "phone"
    rate: float = 20.0
    window: int = 64
    unseen: int = 10

    def read(self, files: Sequence[Path]) -> Iterator[Recording]:
        for file in files:
            if file.match(f"{self.place}/accel/*"):
                partner = file.parent.parent / "gyro" / file.name.replace("accel", "gyro")
                if not partner.is_file():
                    raise UserError(f"{self.name}: {partner.name} is missing; unpack the archive again")
                yield self._recording(self._read(file), self._read(partner), file)

    def _read(self, file: Path) -> Table:
        table = self.table(file, range(1, 6), 6, header=None, dtype=str)
        try:
            axes = np.stack([table[i].str.rstrip(";").to_numpy(np.float64) for i in (3, 4, 5)], axis=1)
            times = table[2].to_numpy(np.int64) / 1e9
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{self.name}: {file.name} has a line that is no sample ({error}); unpack it again"
            ) from error
        return self.labels(table[1].str.strip().to_numpy(str), file), times, axes

    def _recording(self, acceleration: Table, rotation: Table, file: Path) -> Recording:
        """The activities of a person one after the other, each sorted in time."""
        parts = []
        for label in dict.fromkeys(acceleration[0].tolist()):
            (t, a), (u, w) = (_activity(table, label) for table in (acceleration, rotation))
            if not len(u):
                continue
            after = np.searchsorted(u, t).clip(0, len(u) - 1)
            both = np.minimum(abs(u[after] - t), abs(u[after - 1] - t)) <= MAX_GAP
            turned = np.stack([np.interp(t[both], u, axis) for axis in w.T], axis=1)
            values = np.concatenate([a[both] / GRAVITY, turned], axis=1)
            parts.append(Samples(t[both], values, np.full(int(both.sum()), label)))
        if not sum(len(part.times) for part in parts):
            raise UserError(f"{self.name}: {file.name} and its rotations share no times; unpack the archive again")
        joined = (np.concatenate([getattr(part, key) for part in parts]) for key in ("times", "values", "labels"))
        return Recording(file.name.split("_")[1], Samples(*joined))


def _activity(table: Table, label: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted times and values of an activity, without repeated times."""
    rows = table[0] == label
    times, first = np.unique(table[1][rows], return_index=True)
    return times, table[2][rows][first]
