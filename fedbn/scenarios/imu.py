r"""IMU: a *synthetic* accelerometer and gyroscope with a known orientation. All signals are generated.

A model of posture and gait, for tests and demonstrations where the truth must be known. In the frame of the body (x to
the front, y to the left, z up) a person i in activity k has the acceleration (g) and the rotation (rad/s)

.. math:: a(t) = G_{ik}\,e_z + \sum_{h=1}^{2} c_{kh} A_i \cos(2\pi h f_{ik} t + \varphi_{ih}) + \varepsilon, \qquad
          w(t) = d_k A_i \cos(\pi f_{ik} t + \psi_i) + \eta

with :math:`G` the posture, which turns gravity about the left axis (standing 0, sitting about 35, lying about 85
degrees, each person's own); :math:`f` the frequency of steps (walking about 1.8 Hz, running 2.6 Hz, stairs 1.6 Hz, per
person and bout); :math:`A_i` how strongly a person moves (log-normal); :math:`c, d` amplitudes of an activity along
each axis, where the body turns once in two steps; and white noise. The sensor measures :math:`Q_i a` and
:math:`Q_i w`: :math:`Q_i` is a turn about a random axis by a normal angle, the feature skew between users
(`Imu.placements`). Each person has two recordings, in which every activity has two bouts of 10 to 30 seconds; the
second is for testing.

The model has the kinematics that orientation and frequency need, and no more. Accuracies on it say nothing about
people.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedbn.data.population import Examples, Population, User, hold_out
from fedbn.data.shift import rotate
from fedbn.data.windows import hop, windows
from fedbn.errors import UserError
from fedbn.scenarios.base import Scenario
from fedbn.scenarios.wearable import TRIPLES, WearableScenario
from fedbn.seeds import generator, numpy_generator

RATE = 50
"""Samples per second."""

BOUTS = 2
"""Bouts of each activity in a recording."""


@dataclass(frozen=True)
class Motion:
    """An activity.

    Attributes:
        pitch: mean and spread over people of the angle of the trunk, degrees.
        steps: mean frequency of steps, Hz; 0 without steps.
        first, second: amplitudes of acceleration at this frequency and twice it, along x, y, z, in g.
        turn: amplitudes of rotation at half this frequency about x, y, z, in rad/s.
    """

    pitch: tuple[float, float] = (0.0, 4.0)
    steps: float = 0.0
    first: tuple[float, float, float] = (0.0, 0.0, 0.0)
    second: tuple[float, float, float] = (0.0, 0.0, 0.0)
    turn: tuple[float, float, float] = (0.0, 0.0, 0.0)


MOTIONS = {
    "walking": Motion((2, 4), 1.8, (0.12, 0.08, 0.25), (0.06, 0.05, 0.10), (0.4, 0.2, 0.6)),
    "running": Motion((8, 4), 2.6, (0.30, 0.15, 0.90), (0.10, 0.08, 0.25), (0.8, 0.5, 1.2)),
    "stairs": Motion((10, 4), 1.6, (0.18, 0.12, 0.22), (0.05, 0.05, 0.08), (0.5, 0.7, 0.4)),
    "standing": Motion(),
    "sitting": Motion((35, 8)),
    "lying": Motion((85, 6)),
}


@dataclass(frozen=True)
class Imu(Scenario):
    """Made-up people with 6 activities, windows ``[6, window]`` of acceleration (g) and rotation (rad/s) at 50 Hz.

    Attributes:
        unseen: number of people that never train.
        users: number of people.
        placement: standard deviation of the angle by which a person's sensor is turned, in radians.
        noise: standard deviation of the noise, in g and in rad/s.
        window: samples per window.
        overlap: fraction of a window that overlaps with the next one, in [0, 1).

    >>> population = Imu(users=3, unseen=1).load(0)
    >>> population.shape, [user.name for user in population.users]
    ((6, 128), ['person01', 'person02', 'person03'])
    """

    name: ClassVar[str] = "imu"
    about: ClassVar[str] = "synthetic motion sensors, 12 made-up people, 6 activities"
    model: ClassVar[str] = "har-cnn"
    plan: ClassVar[dict[str, object]] = WearableScenario.plan | {"rounds": 12}

    unseen: int = 4
    users: int = 12
    placement: float = 0.6
    noise: float = 0.03
    window: int = 128
    overlap: float = 0.5

    def load(self, seed: int) -> Population:
        if not 2 <= self.users <= 1000:
            raise UserError(f"users={self.users}: choose 2 to 1000")
        if self.placement < 0 or self.noise < 0:
            raise UserError("placement= and noise= must not be negative")
        if self.window > 10 * RATE:
            raise UserError(f"window={self.window} is longer than the shortest bout, {10 * RATE} samples; choose less")
        step = hop(self.window, self.overlap)
        users = [self._user(number, turn, step) for number, turn in enumerate(self.placements(), 1)]
        content = hashlib.sha256()
        for user in users:
            content.update(user.train.x.numpy().tobytes() + user.test.x.numpy().tobytes())
        return Population(
            users=tuple(users),
            unseen=hold_out(self.users, self.unseen, seed),
            classes=tuple(MOTIONS),
            skew="synthetic feature skew: each person's sensor is turned, and people move differently; labels balanced",
            sources={"generated/imu": content.hexdigest()},
            triples=TRIPLES,
        )

    def placements(self) -> Tensor:
        """The true rotation from the body to the sensor of each person, ``[users, 3, 3]``.

        >>> turns = Imu(users=3).placements()
        >>> torch.allclose(turns @ turns.mT, torch.eye(3).expand(3, 3, 3), atol=1e-6)
        True
        """
        turns = []
        for number in range(1, self.users + 1):
            draw = generator(0, "imu placement", str(number))
            axis = F.normalize(torch.randn(3, generator=draw), dim=0)
            angle = torch.randn((), generator=draw) * self.placement
            turns.append(rotate(axis, angle)(torch.eye(3)[:, :, None])[:, :, 0].T)
        return torch.stack(turns)

    def _user(self, number: int, turn: Tensor, step: int) -> User:
        draw = numpy_generator(0, "imu", str(number))
        strength = draw.lognormal(0, 0.15)
        pace = draw.normal(1, 0.06)
        phases = draw.uniform(0, 2 * np.pi, (3, 3))
        pitches = {k: np.deg2rad(draw.normal(*motion.pitch)) for k, motion in MOTIONS.items()}
        parts = []
        for recording in range(2):
            order = [k for _ in range(BOUTS) for k in draw.permutation(list(MOTIONS))]
            examples = []
            for k in order:
                seconds = np.arange(int(RATE * draw.uniform(10, 30))) / RATE
                signal = _bout(MOTIONS[k], seconds, pitches[k], strength, pace * draw.normal(1, 0.03), phases)
                turned = signal.reshape(-1, 2, 3) @ turn.double().numpy().T
                noisy = (turned + draw.normal(0, self.noise, turned.shape)).reshape(-1, 6).astype(np.float32)
                x = windows(torch.from_numpy(noisy), self.window, step)
                label = torch.full((len(x),), list(MOTIONS).index(k))
                examples.append(Examples(x, label, torch.full((len(x),), recording)))
            parts.append(Examples.concat(examples))
        return User(f"person{number:02d}", "imu", *parts)


def _bout(
    motion: Motion, seconds: np.ndarray, pitch: float, strength: float, pace: float, phases: np.ndarray
) -> np.ndarray:
    """Acceleration and rotation in the frame of the body, ``[samples, 6]``."""
    angle = 2 * np.pi * motion.steps * pace * seconds[:, None]
    waves = (
        np.array(c) * np.cos(h * angle + p)
        for c, h, p in zip((motion.first, motion.second, motion.turn), (1, 2, 0.5), phases, strict=True)
    )
    first, second, turn = (strength * wave for wave in waves)
    gravity = np.array([np.sin(pitch), 0.0, np.cos(pitch)])
    return np.concatenate([gravity + first + second, turn], axis=1)
