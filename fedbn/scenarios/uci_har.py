"""UCI-HAR: thirty people with a phone at the waist, from the unpacked archive.

Anguita, Ghio, Oneto, Parra, Reyes-Ortiz, *A Public Domain Dataset for Human Activity Recognition Using
Smartphones*, ESANN 2013. Windows of 128 samples at 50 Hz that overlap by half: total acceleration (g), body
acceleration (g) and rotation (rad/s), three axes each. The training and test parts of the archive contain different
people; they are merged here, and the seed determines who is unseen.

The archive does not mark where a recording ends, so each person's rows are split in the order of the files. One window
between the two sides is dropped, because neighboring windows share half of their samples.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from fedbn.data.columns import Rows
from fedbn.data.population import Population, build_population
from fedbn.errors import UserError
from fedbn.scenarios.base import Scenario

CLASSES = ("walking", "upstairs", "downstairs", "sitting", "standing", "lying")
SIGNALS = tuple(f"{kind}_{axis}" for kind in ("total_acc", "body_acc", "body_gyro") for axis in "xyz")


@dataclass(frozen=True)
class UciHar(Scenario):
    """30 users, 6 activities, windows ``[9, 128]``: total acceleration, body acceleration, rotation.

    Attributes:
        path: the unpacked directory ``UCI HAR Dataset`` with ``train`` and ``test``.
        test: fraction of a person's windows for testing (the last windows).
        unseen: number of users that never train.
    """

    name: ClassVar[str] = "uci-har"
    about: ClassVar[str] = "30 people, phone at the waist, 6 activities (path=)"
    model: ClassVar[str] = "har-cnn"

    path: str = ""
    test: float = 0.5
    unseen: int = 6

    def load(self, seed: int) -> Population:
        directory = Path(self.path)
        if not self.path or not all((directory / part).is_dir() for part in ("train", "test")):
            raise UserError(
                "scenario 'uci-har' reads the directory 'UCI HAR Dataset' from the archive's zip file, with train and "
                f"test in it, not {self.path or 'no path'!r}: unpack the file and set uci-har:path=DIR; "
                "scenario hapt has the same people's raw signals and needs no download"
            )
        rows = Rows.concat([_read_part(directory, part) for part in ("train", "test")])
        skew = "natural feature skew: gait and how the phone sits differ by person; labels nearly balanced"
        digest = hashlib.sha256(rows.x.tobytes() + rows.y.tobytes() + np.asarray(rows.user).tobytes()).hexdigest()
        sources = {self.name: digest}
        population = build_population(
            rows,
            name=self.name,
            test=self.test,
            gap=1,
            unseen=self.unseen,
            seed=seed,
            skew=skew,
            sources=sources,
        )
        return replace(population, triples=((0, 1, 2), (3, 4, 5), (6, 7, 8)))


def _read_part(directory: Path, part: str) -> Rows:
    y = _read_table(directory / part / f"y_{part}.txt", 1)[:, 0]
    user = _read_table(directory / part / f"subject_{part}.txt", 1)[:, 0].astype(np.int64)
    inertial = directory / part / "Inertial Signals"
    signals = [_read_table(inertial / f"{name}_{part}.txt", 128) for name in SIGNALS]
    lengths = {len(y), len(user), *(len(s) for s in signals)}
    if len(lengths) > 1:
        raise UserError(f"uci-har: the files of {part} differ in length ({sorted(lengths)}); unpack the archive again")
    return Rows(np.stack(signals, axis=1).astype(np.float32), y - 1, user, None, CLASSES)


def _read_table(path: Path, columns: int) -> np.ndarray:
    """Read a text file of numbers as ``[n, columns]``."""
    try:
        values = np.loadtxt(path, ndmin=2)
    except (OSError, ValueError) as error:
        raise UserError(f"uci-har: {path} is missing or is not a table ({error}); unpack the archive again") from error
    if values.shape[1] != columns:
        raise UserError(f"uci-har: {path} has {values.shape[1]} columns, not {columns}; unpack the archive again")
    return values
