"""Watch: shoulder exercises of ten people with a smart watch on either arm (SPAR, the public part).

Burns, Leung, Hardisty, Whyne, Henry, McLachlin, *Shoulder physiotherapy exercise recognition*,
Physiological Measurement 39 (2018) 075007, https://arxiv.org/abs/1802.01489. Accelerometer (g) and gyroscope (rad/s),
three axes each, 50 Hz; seven exercises.

A client is one arm of one person, and its domain is the side. Axes are mirrored between left and right, so there is a
strong *feature* skew. Every recording contains one exercise and is split in time: the first half is training data, the
second half is test data, with a gap of one window length between the two.

Both arms of a person are held out together. A model that was trained on a person's left arm has seen their speed and
strength, so their right arm would not be unseen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.lib import format as npy

from fedbn.data.packages import Arrays
from fedbn.data.population import Examples, User
from fedbn.data.unpickle import unpickle
from fedbn.data.windows import windows
from fedbn.errors import UserError
from fedbn.scenarios.wearable import WearableScenario

SIDES = ("left", "right")


@dataclass(frozen=True)
class Watch(WearableScenario):
    """20 clients (10 people x 2 arms), 7 exercises, windows ``[6, window]``; options as in `WearableScenario`.

    ``unseen`` and ``reserved`` count people; both arms of each are held out.
    """

    name: ClassVar[str] = "watch"
    about: ClassVar[str] = "10 people x 2 arms, watch, 7 exercises; split by time"
    source: ClassVar[str] = "watch"
    classes: ClassVar[tuple[str, ...]] = (
        "pendulum",
        "abduction",
        "forward elevation",
        "internal rotation",
        "external rotation",
        "trapezius extension",
        "upright row",
    )
    skew: ClassVar[str] = "natural feature skew: left and right arm are mirror images, and people move differently"

    def split(self, rows: Arrays, step: int) -> list[tuple[int, User]]:
        shortest = int(rows["length"].min())
        if 3 * self.window > shortest:
            raise UserError(
                f"window={self.window} is too long: the shortest recording has {shortest} samples, and two "
                f"halves with a window's gap need three windows; choose {shortest // 3} or less"
            )
        clients: dict[tuple[int, int], tuple[list[Examples], list[Examples]]] = {}
        signals = torch.split(torch.from_numpy(rows["signal"]), rows["length"].tolist())
        for signal, subject, side, label in zip(
            signals, rows["subject"].tolist(), rows["side"].tolist(), rows["label"].tolist(), strict=True
        ):
            halves = clients.setdefault((subject, side), ([], []))
            recording = len(halves[0])
            end = (len(signal) - self.window) // 2
            for half, part in zip(halves, (signal[:end], signal[end + self.window :]), strict=True):
                x = windows(part, self.window, step)
                half.append(Examples(x, torch.full((len(x),), label), torch.full((len(x),), recording)))
        return [
            (subject, User(f"subject{subject:02d}-{SIDES[side]}", SIDES[side], *map(Examples.concat, halves)))
            for (subject, side), halves in sorted(clients.items())
        ]

    @staticmethod
    def parse(path: Path) -> Arrays:
        """All recordings concatenated, ``signal [rows, 6]``, and length, subject, side and label of each recording."""
        with path.open("rb") as file:
            npy.read_magic(file)
            npy.read_array_header_1_0(file)
            data = unpickle(file, path.name).item()
        return {
            "signal": np.concatenate([np.asarray(x, np.float32) for x in data["X"]]),
            "length": np.array([len(x) for x in data["X"]], np.int64),
            "subject": np.asarray(data["subject"], np.int64),
            "side": np.asarray(data["side"], np.int64),
            "label": np.asarray(data["y"], np.int64),
        }
