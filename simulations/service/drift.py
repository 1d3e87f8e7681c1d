r"""Drift detection for the users of a service and of the page, for all users of a call at once.

As in `fedbn.online.drift.monitor`, the channel means :math:`m` of a window are compared with those of windows before it
that were given the same class, whose mean is :math:`M` and variance :math:`V`. What a detector sees is
:math:`\overline{\log(1+(m-M)^2/V)}` over channels: on seen people's later recordings it told turns of the sensor from
changes of activity more often than :math:`z/(1+z)` did, which saturates (``python -m benchmarks.drift``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedbn.online.drift.detectors import Alarm, Detector
from fedbn.online.drift.signal import FEWEST

Floats = NDArray[np.float64]

FLOOR = 1e-2
"""Least variance of a channel's mean between windows, relative to the source's."""


def channel_means(x: Tensor) -> Floats:
    """``[b, C]`` for windows or activations ``[b, C, ...]``."""
    found: Floats = (x.flatten(2).mean(2) if x.dim() > 2 else x).double().numpy()
    return found


@dataclass
class _Watched:
    """One user.

    Attributes:
        row: in the tables.
        alarm: the detector.
        alarms: how often it has spoken since the last calibration.
    """

    row: int
    alarm: Alarm
    alarms: int = 0


class BatchedMonitor:
    """What windows of each user and class look like, as one table, and a detector for each user.

    Args:
        detector: makes each user's.
        scale: ``[C]`` variance of each channel under the source.
        classes: K.
        capacity: users remembered; whoever was not met for longest begins anew.
    """

    def __init__(self, detector: Detector, scale: Floats, classes: int, capacity: int) -> None:
        self.detector, self.capacity = detector, capacity
        self.floor = FLOOR * scale
        self.spoken = 0
        self._users: OrderedDict[str, _Watched] = OrderedDict()
        self._free: list[int] = []
        self._n = np.zeros((0, classes))
        self._mean = np.zeros((0, classes, len(scale)))
        self._m2 = np.zeros_like(self._mean)

    def of(self, user: str) -> _Watched:
        """A user, who is new if not remembered."""
        found = self._users.get(user)
        if found is None:
            if len(self._users) >= self.capacity:
                self.forget(next(iter(self._users)))
            if not self._free:
                self._grow()
            found = self._users[user] = _Watched(self._free.pop(), self.detector.new())
        else:
            self._users.move_to_end(user)
        return found

    def forget(self, user: str) -> None:
        """Begin anew with a user."""
        if (found := self._users.pop(user, None)) is not None:
            self._n[found.row] = 0
            self._free.append(found.row)

    def see(self, users: Sequence[str], looks: Floats, labels: Sequence[int]) -> list[tuple[float | None, bool]]:
        """Show each user one window: its distance z from those of its class before it, and whether the detector speaks.

        Args:
            users: different ones, no more than there is room for.
            looks: ``[U, C]`` channel means of the window, or of its activations.
            labels: ``[U]`` what the windows seem to be.
        """
        watched = [self.of(user) for user in users]
        at = (np.array([w.row for w in watched]), np.asarray(labels))
        n, mean, m2 = self._n[at], self._mean[at], self._m2[at]
        variance = np.maximum(m2 / np.maximum(n - 1, 1)[:, None], self.floor)
        far = (looks - mean) ** 2 / variance
        z, surprise = far.mean(1), np.log1p(far).mean(1)
        out: list[tuple[float | None, bool]] = []
        told = zip(watched, n.tolist(), z.tolist(), surprise.tolist(), strict=True)
        for i, (who, met, value, shown) in enumerate(told):
            spoke = False
            if met >= FEWEST:
                who.alarm.update(shown)
                spoke = who.alarm.drift_detected
            if spoke:
                who.alarm, who.alarms = self.detector.new(), who.alarms + 1
                self.spoken += 1
                self._n[who.row] = 0
                n[i] = 0
            out.append((value if met >= FEWEST else None, spoke))
        fresh = n[:, None] == 0
        mean, m2 = np.where(fresh, 0, mean), np.where(fresh, 0, m2)
        after = mean + (looks - mean) / (n + 1)[:, None]
        self._n[at], self._mean[at] = n + 1, after
        self._m2[at] = m2 + (looks - mean) * (looks - after)
        return out

    def _grow(self) -> None:
        used = len(self._n)
        more = min(max(64, used), self.capacity - used)
        self._free = list(range(used + more - 1, used - 1, -1))
        self._n, self._mean, self._m2 = (
            np.concatenate([t, np.zeros((more, *t.shape[1:]))]) for t in (self._n, self._mean, self._m2)
        )
