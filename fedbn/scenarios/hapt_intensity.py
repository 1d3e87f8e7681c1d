r"""HAPT intensity: how strongly a person moves, estimated from the gyroscope alone.

The task is regression. The target is the mean amplitude deviation of the acceleration in a window,
:math:`\frac1n\sum_i|r_i-\bar r|` with the norm :math:`r_i` of sample i, a common measure of the intensity of physical
activity: Vähä-Ypyä, Vasankari, Husu, Suni, Sievänen, *A universal, accurate intensity-based classification of different
physical activities using raw data of accelerometer*, Clinical Physiology and Functional Imaging 35 (2015) 64-70,
https://doi.org/10.1111/cpf.12127. The model sees the rotation only, and how rotation and acceleration are related
depends on the gait and on how the phone is carried. People, recordings and windows are those of `Hapt`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedbn.data.packages import Arrays
from fedbn.data.population import Examples, User
from fedbn.scenarios.hapt import Hapt


@dataclass(frozen=True)
class HaptIntensity(Hapt):
    """30 users, rotation (rad/s) ``[3, window]``, targets in thousandths of g; options as in `WearableScenario`."""

    name: ClassVar[str] = "hapt-intensity"
    about: ClassVar[str] = "regression: intensity of movement of the people of hapt"
    task: ClassVar[str] = "regression"
    plan: ClassVar[dict[str, object]] = Hapt.plan | {"rounds": 8, "global_test": 120}
    rates: ClassVar[dict[str, float]] = {}
    classes: ClassVar[tuple[str, ...]] = ()
    skew: ClassVar[str] = "natural feature skew: gait and how the phone sits differ by person; activities balanced"

    def split(self, rows: Arrays, step: int) -> list[tuple[int, User]]:
        users = super().split(rows, step)
        return [
            (
                i,
                replace(
                    u,
                    train=_rotation(u.train),
                    test=_rotation(u.test),
                    stream=None if u.stream is None else _rotation(u.stream),
                ),
            )
            for i, u in users
        ]


def amplitude_deviation(acceleration: Tensor) -> Tensor:
    """Mean amplitude deviation ``[n]`` of acceleration ``[n, 3, window]``, in its units.

    >>> import torch
    >>> float(amplitude_deviation(torch.tensor([[[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])))
    1.0
    """
    norm = acceleration.norm(dim=1)
    return (norm - norm.mean(1, keepdim=True)).abs().mean(1)


def _rotation(examples: Examples) -> Examples:
    acceleration, rotation = examples.x.split(3, 1)
    return Examples(rotation.contiguous(), 1000 * amplitude_deviation(acceleration), examples.recording)
