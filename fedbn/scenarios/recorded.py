"""Base class of the scenarios of wearable sensors whose data users download: resampled, cut into windows, split.

Each scenario names one device on the body, so that one rotation turns all of its sensors (`Population.triples`).
Values stay in physical units, g and rad/s, because rules and alignments adapt exactly what a standardization per user
would remove.
"""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fedbn.data.columns import Rows
from fedbn.data.cutting import cut_rows
from fedbn.data.examples import UNLABELED
from fedbn.data.packages import Arrays, cached, sha256
from fedbn.data.population import Population, build_population
from fedbn.data.resampling import Samples, resample
from fedbn.data.windows import hop
from fedbn.errors import UserError
from fedbn.scenarios.base import Scenario
from fedbn.scenarios.wearable import WearableScenario

VERSION = 1
"""Version of the arrays in the cache."""

GRAVITY = 9.80665
"""Standard gravity, m/s2."""


@dataclass(frozen=True)
class Recording:
    """One recording of a user.

    Attributes:
        user: name of the user.
        samples: acceleration (g), rotation (rad/s) if the device measures it, and labels.
    """

    user: str
    samples: Samples


@dataclass(frozen=True)
class RecordedScenario(Scenario):
    """Windows ``[channels, window]`` of acceleration (g), and of rotation (rad/s) if the device measures it.

    A window has one label in all of its samples. Later recordings of a user are the test data, or, if there is one,
    the last windows of each activity.

    Attributes:
        archive: name of the unpacked directory.
        pattern: the data files in it.
        link: where the archive is.
        license: license of the data.
        citation: reference to cite.
        codes: class index of each label in the files; `UNLABELED` for labels that are not used.
        skew: one sentence that describes the skew between users.
        path: the unpacked directory.
        place: device or place on the body.
        rate: samples per second after resampling.
        window: samples per window.
        overlap: fraction of a window that overlaps with the next one, in [0, 1).
        test: fraction of a user's recordings (or of the windows of each activity) for testing.
        unseen: number of people that never train.
    """

    model: ClassVar[str] = "har-cnn"
    plan: ClassVar[dict[str, object]] = WearableScenario.plan
    archive: ClassVar[str]
    pattern: ClassVar[str]
    link: ClassVar[str]
    license: ClassVar[str]
    citation: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    codes: ClassVar[Mapping[Any, int]]
    skew: ClassVar[str] = "natural feature skew: people move and wear the sensor differently; activities differ too"

    path: str = ""
    place: str = ""
    rate: float = 50.0
    window: int = 128
    overlap: float = 0.5
    test: float = 0.25
    unseen: int = 1

    @abstractmethod
    def read(self, files: Sequence[Path]) -> Iterator[Recording]:
        """Read the recordings; those of a user in the order of time."""

    def load(self, seed: int) -> Population:
        if not self.rate > 0:
            raise UserError(f"scenario {self.name!r}: rate={self.rate:g} must be above 0 samples per second")
        step = hop(self.window, self.overlap)
        files = self._files()
        digest = hashlib.sha256("\n".join(f"{p.name}:{sha256(p)}" for p in files).encode()).hexdigest()
        arrays = cached(self.name, VERSION, f"{digest} {self.place} {self.rate:g}", lambda: self._arrays(files))
        names = arrays["name"]
        # Missing labels are NaN, as in a table.
        y = np.where(arrays["label"] == UNLABELED, np.nan, arrays["label"])
        samples = Rows(arrays["value"], y, names[arrays["user"]], arrays["recording"], self.classes)
        rows, notices = cut_rows(samples, arrays["time"], self.window, self.overlap, "constant", self.name)
        population = build_population(
            replace(rows, y=rows.y.astype(np.int64)),
            name=self.name,
            test=self.test,
            gap=math.ceil(self.window / step) - 1,
            unseen=self.unseen,
            seed=seed,
            skew=self.skew,
            sources={self.archive: digest},
            notices=notices,
        )
        channels = population.shape[0]
        return replace(population, triples=tuple((i, i + 1, i + 2) for i in range(0, channels, 3)))

    def _files(self) -> list[Path]:
        files = sorted(Path(self.path).glob(self.pattern)) if self.path else []
        if not files:
            raise UserError(
                f"scenario {self.name!r} reads {self.archive}/{self.pattern}, and "
                f"{f'{self.path} has no such files' if self.path else 'no path is given'}: download the archive from "
                f"{self.link}, unpack it and set {self.name}:path=DIR"
            )
        return files

    def _arrays(self, files: Sequence[Path]) -> Arrays:
        """Resampled samples of all recordings one after the other, and their users and recordings."""
        found = [(r.user, resample(r.samples, self.rate)) for r in self.read(files)]
        names = sorted({user for user, _ in found})
        lengths = [len(s.times) for _, s in found]
        arrays = {key: np.concatenate([getattr(s, f"{key}s") for _, s in found]) for key in ("time", "value", "label")}
        return arrays | {
            "name": np.array(names),
            "user": np.repeat([names.index(user) for user, _ in found], lengths),
            "recording": np.repeat(np.arange(len(found)), lengths),
        }

    def labels(self, codes: np.ndarray, file: Path) -> np.ndarray:
        """Class index of each label of a file, int64.

        Raises:
            UserError: a label that the data set does not have.
        """
        distinct, inverse = np.unique(codes, return_inverse=True)
        for code in distinct.tolist():
            if code not in self.codes:
                raise UserError(
                    f"{self.name}: {file.name} holds the label {code!r}, which {self.archive} does not have; unpack "
                    "the archive again"
                )
        return np.array([self.codes[code] for code in distinct.tolist()], np.int64)[inverse]

    def table(self, file: Path, columns: Sequence[int] | Sequence[str], width: int = 0, **options: Any) -> Any:
        """Columns of a text table, by pandas.

        Args:
            file: the table.
            columns: names or numbers of the columns.
            width: number of columns that the file must have; 0 for any.
            options: as of ``pandas.read_csv``.

        Raises:
            UserError: no such table.
        """
        import pandas as pd

        try:
            frame = pd.read_csv(file, **options)
            if width and frame.shape[1] != width:
                raise ValueError(f"{frame.shape[1]} columns instead of {width}")
            return frame[list(columns)]
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{self.name}: {file.name} does not have the columns of {self.archive} ({reason}); unpack the archive "
                "again"
            ) from error
