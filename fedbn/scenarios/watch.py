"""Watch: shoulder exercises of ten people with a smart watch on either arm (SPAR, the public part).

Burns, Leung, Hardisty, Whyne, Henry, McLachlin, *Shoulder physiotherapy exercise recognition*,
Physiological Measurement 39 (2018) 075007, https://arxiv.org/abs/1802.01489. Accelerometer (g) and
gyroscope (rad/s), three axes each, 50 Hz; seven exercises.

A client is one arm of one person, its domain the side: axes are mirrored between left and right, so the
skew is a strong *feature* skew. Every recording holds one exercise, so each is split in time: the first
half trains, the second half tests, with one window's length between the two left out.

Both arms of a person are held out together. A model that has trained on somebody's left arm has met
their speed and strength, and their right arm would not be unseen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.lib import format as npy

from fedbn.data.packages import SOURCES, Arrays, cached, fetch
from fedbn.data.population import Examples, Population, User, hold_out, shuffled
from fedbn.data.unpickle import unpickle
from fedbn.data.windows import hop, windows
from fedbn.errors import UserError
from fedbn.scenarios.base import Scenario

CLASSES = (
    "pendulum",
    "abduction",
    "forward elevation",
    "internal rotation",
    "external rotation",
    "trapezius extension",
    "upright row",
)
SIDES = ("left", "right")


@dataclass(frozen=True)
class Watch(Scenario):
    """20 clients (10 people x 2 arms), 7 exercises, windows ``[6, window]`` at 50 Hz.

    Attributes:
        unseen: people that never train; both arms of each are held out.
        window: samples per window.
        overlap: share of a window that the next one repeats, 0 to below 1.
        reserved: people left out altogether, those whom the first seeds would hold out: choose on the others, confirm
            on these.
    """

    name: ClassVar[str] = "watch"
    about: ClassVar[str] = "10 people x 2 arms, watch at the wrist, 7 exercises; second halves test"
    model: ClassVar[str] = "har-cnn"
    plan: ClassVar[dict[str, object]] = {
        "rounds": 20,
        "schedule": "cosine",
        "local_epochs": 1,
        "batch_size": 32,
        "lr": 0.05,
        "momentum": 0.9,
    }

    unseen: int = 2
    window: int = 128
    overlap: float = 0.5
    reserved: int = 0

    def load(self, seed: int) -> Population:
        step = hop(self.window, self.overlap)
        source = SOURCES["watch"]
        path = fetch(source)
        rows = cached("watch", 1, source.sha256, lambda: _parse(path))
        shortest = int(rows["length"].min())
        if 3 * self.window > shortest:
            raise UserError(
                f"window={self.window} is too long: the shortest recording has {shortest} samples, and two "
                f"halves with a window's gap need three windows; choose {shortest // 3} or less"
            )
        halves: dict[tuple[int, int], tuple[list[Examples], list[Examples]]] = {}
        signals = torch.split(torch.from_numpy(rows["signal"]), rows["length"].tolist())
        for signal, subject, side, label in zip(
            signals, rows["subject"].tolist(), rows["side"].tolist(), rows["label"].tolist(), strict=True
        ):
            client = halves.setdefault((subject, side), ([], []))
            recording = len(client[0])
            first = (len(signal) - self.window) // 2
            for half, part in zip(client, (signal[:first], signal[first + self.window :]), strict=True):
                x = windows(part, self.window, step)
                half.append(Examples(x, torch.full((len(x),), label), torch.full((len(x),), recording)))
        clients = sorted(halves)
        subjects = sorted({subject for subject, _ in clients})
        away = {subjects[i] for i in hold_out(len(subjects), self.unseen, seed, self.reserved)}
        reserved = {subjects[i] for i in shuffled(len(subjects))[: self.reserved]}
        return Population(
            users=tuple(
                User(
                    f"subject{subject:02d}-{SIDES[side]}",
                    SIDES[side],
                    Examples.concat(halves[subject, side][0]),
                    Examples.concat(halves[subject, side][1]),
                )
                for subject, side in clients
            ),
            unseen=tuple(i for i, (subject, _) in enumerate(clients) if subject in away),
            classes=CLASSES,
            skew="natural feature skew: left and right arm are mirror images, and people move differently",
            sources={source.label: source.sha256},
        ).without([i for i, (subject, _) in enumerate(clients) if subject in reserved])


def _parse(path: Path) -> Arrays:
    """All recordings end to end, ``signal [rows, 6]``; how long each is, and whose, which side and label."""
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
