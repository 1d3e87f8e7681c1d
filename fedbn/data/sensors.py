"""Checks of the recordings of worn sensors: units and saturation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedbn.data.population import Population, User

OTHER_UNIT = 3.0
"""Ratio of a user's gravity to the median of all users, or its inverse, that only another unit explains."""

IMPOSSIBLE = 5.0
"""The same ratio for the median absolute acceleration of a few windows, in which a user may move strongly."""

STEADY = 0.25
"""Relative standard deviation of the length of mean accelerations below which they are gravity."""

SATURATED_SAMPLES = 0.1
"""Share of a channel's samples at one extreme value from which a window is saturated."""

SATURATION = 1.5
"""Absolute acceleration, relative to gravity, up to which a repeated extreme value is normal."""

SATURATED_WINDOWS = 0.1
"""Share of saturated windows of a user that is reported."""

MAX_NAMES = 5


@dataclass(frozen=True)
class SensorLimits:
    """What a window of a worn sensor must satisfy.

    Attributes:
        channels: axes of the acceleration.
        gravity: in the unit of the training data.
    """

    channels: tuple[int, int, int]
    gravity: float

    def problem(self, x: Tensor) -> str:
        """A sentence about windows ``[n, *shape]`` of one user in another unit or without gravity; empty if right.

        >>> SensorLimits((0, 1, 2), 1.0).problem(torch.full((1, 3, 8), 5.66))[:55]
        'the acceleration of these windows is 9.8 times gravity:'
        """
        ratio = float(x[:, list(self.channels)].norm(dim=1).median()) / self.gravity
        if 1 / IMPOSSIBLE < ratio < IMPOSSIBLE:
            return ""
        return (
            f"the acceleration of these windows is {ratio:.3g} times gravity: include gravity, and use the unit of the "
            "training data (1 g is 9.81 m/s2)"
        )

    def saturated(self, x: Tensor) -> Tensor:
        """Whether each window ``[n]`` of ``[n, *shape]`` repeats an extreme value that gravity does not explain."""
        return clipped(x[:, list(self.channels)], SATURATION * self.gravity).any(1)


def sensor_limits(population: Population) -> SensorLimits | None:
    """Limits from the training data of a population; None if it does not name its sensors, or measures no gravity.

    >>> from fedbn.scenarios.base import scenario
    >>> round(sensor_limits(scenario("imu:users=3:unseen=1").load(0)).gravity, 1)
    1.0
    >>> sensor_limits(scenario("digits8").load(0))
    """
    if not population.triples:
        return None
    channels = population.triples[0]
    found = [_gravity(user.train.x[:, list(channels)]) for user in population.users]
    gravity = [value for value in found if value is not None]
    return SensorLimits(channels, float(torch.tensor(gravity).median())) if gravity else None


def sensor_notices(population: Population) -> list[str]:
    """Notices about users whose accelerations have another unit, or whose sensors are saturated, in any recording.

    Only populations that name the channels of their sensors (`Population.triples`) are checked.

    >>> from fedbn.scenarios.base import scenario
    >>> sensor_notices(scenario("digits8").load(0))
    []
    """
    limits = sensor_limits(population)
    if limits is None:
        return []
    ratios: dict[str, float] = {}
    saturated = []
    for user in population.users:
        for x in _recordings(user, limits.channels):
            ratio = (_gravity(x) or limits.gravity) / limits.gravity
            if not 1 / OTHER_UNIT < ratio < OTHER_UNIT:
                ratios.setdefault(user.name, ratio)
            share = float(clipped(x, SATURATION * limits.gravity * ratio).any(1).double().mean())
            if share > SATURATED_WINDOWS and user.name not in saturated:
                saturated.append(user.name)
    notices = []
    if ratios:
        notices.append(
            f"gravity of {_names(list(ratios))} is {next(iter(ratios.values())):.3g} times that of most users: convert "
            "all accelerations to one unit (1 g is 9.81 m/s2)"
        )
    if saturated:
        notices.append(
            f"accelerations of {_names(saturated)} are saturated in more than {SATURATED_WINDOWS:.0%} of the windows: "
            "record with a larger range"
        )
    return notices


def clipped(x: Tensor, limit: Tensor | float) -> Tensor:
    """Whether each channel ``[B, C]`` of windows ``[B, C, length]`` is saturated.

    Args:
        x: the windows.
        limit: absolute value up to which a repeated extreme value is normal, 0-d or ``[C]``.

    >>> clipped(torch.tensor([[[0.0, 2, 2, 2], [0.0, 1, 2, 3]]]), torch.tensor(1.0))
    tensor([[ True, False]])
    """
    size = np.abs(x.numpy(force=True))  # for one window, NumPy is several times as fast
    top = size.max(2, initial=0)
    large = top > (limit.numpy(force=True) if isinstance(limit, Tensor) else limit)
    if large.any():
        repeats = (size == top[:, :, None]).mean(2)
        large &= (repeats >= SATURATED_SAMPLES) & (repeats * x.shape[2] > 1)
    return torch.from_numpy(large).to(x.device)


def _recordings(user: User, channels: Sequence[int]) -> list[Tensor]:
    """Accelerations ``[n, 3, length]`` of the training recordings and of the later ones."""
    parts = (user.train, user.test if user.stream is None else user.stream)
    return [part.x[:, list(channels)] for part in parts if len(part) > 1]


def _gravity(x: Tensor) -> float | None:
    """Median length of the mean accelerations of windows ``[n, 3, length]``; None if it varies too much."""
    length = x.mean(2).norm(dim=1).double()
    return float(length.median()) if len(length) > 1 and length.std() < STEADY * length.median() else None


def _names(users: list[str]) -> str:
    more = len(users) - MAX_NAMES
    listed = ", ".join(users[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
    return f"user{'s' if len(users) > 1 else ''} {listed}"
