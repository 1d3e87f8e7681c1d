"""Checks of the recordings of worn sensors: units and saturation."""

from __future__ import annotations

import torch
from torch import Tensor

from fedbn.data.population import Population

OTHER_UNIT = 3.0
"""Ratio of a user's gravity to the median of all users, or its inverse, that only another unit explains."""

STEADY = 0.25
"""Relative standard deviation of the length of mean accelerations below which they are gravity."""

SATURATED_SAMPLES = 0.1
"""Share of a channel's samples at one extreme value from which a window is saturated."""

SATURATION = 1.5
"""Absolute acceleration, relative to gravity, up to which a repeated extreme value is normal."""

SATURATED_WINDOWS = 0.1
"""Share of saturated windows of a user that is reported."""

MAX_NAMES = 5


def sensor_notices(population: Population) -> list[str]:
    """Notices about users whose accelerations have another unit, or whose sensors are saturated.

    Only populations that name the channels of their sensors (`Population.triples`) are checked.

    >>> from dataclasses import replace
    >>> from fedbn.scenarios.base import scenario
    >>> sensor_notices(scenario("digits8").load(0))
    []
    """
    if not population.triples:
        return []
    channels = list(population.triples[0])
    windows = {user.name: user.train.x[:, channels] for user in population.users if len(user.train) > 1}
    gravity = {name: g for name, x in windows.items() if (g := _gravity(x)) is not None}
    if not gravity:
        return []
    usual, notices = float(torch.tensor(list(gravity.values())).median()), []
    if others := [name for name, g in gravity.items() if not 1 / OTHER_UNIT < g / usual < OTHER_UNIT]:
        notices.append(
            f"gravity of {_names(others)} is {gravity[others[0]] / usual:.3g} times that of most users: convert all "
            "accelerations to one unit (1 g is 9.81 m/s2)"
        )
    shares = {name: float(_saturated(x, gravity.get(name, usual)).double().mean()) for name, x in windows.items()}
    if saturated := [name for name, share in shares.items() if share > SATURATED_WINDOWS]:
        notices.append(
            f"accelerations of {_names(saturated)} are saturated in more than {SATURATED_WINDOWS:.0%} of the windows: "
            "record with a larger range"
        )
    return notices


def _gravity(x: Tensor) -> float | None:
    """Median length of the mean accelerations of windows ``[n, 3, length]``; None if it varies too much."""
    length = x.mean(2).norm(dim=1).double()
    return float(length.median()) if length.std() < STEADY * length.median() else None


def _saturated(x: Tensor, gravity: float) -> Tensor:
    """Whether each window ``[n]`` of ``[n, 3, length]`` repeats an extreme value that gravity does not explain."""
    size = x.abs()
    top = size.amax(2, keepdim=True)
    repeats = (size == top).double().mean(2) >= SATURATED_SAMPLES
    return (repeats & (top[:, :, 0] > SATURATION * gravity)).any(1)


def _names(users: list[str]) -> str:
    more = len(users) - MAX_NAMES
    listed = ", ".join(users[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
    return f"user{'s' if len(users) > 1 else ''} {listed}"
