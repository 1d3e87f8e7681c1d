r"""Drift detection for many users at once, as the service needs it.

As in `fedbn.online.drift.monitor`, the channel means :math:`m` of a window are compared with those of earlier windows
that were predicted as the same class, with mean :math:`M` and variance :math:`V`. The signal of a detector is
:math:`\overline{\log(1+(m-M)^2/V)}` over channels. On later recordings of seen users it separated rotations of the
sensor from changes of activity more often than :math:`z/(1+z)`, which saturates (``python -m benchmarks.drift``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fedbn.online.drift.detectors import Alarm, Detector
from fedbn.online.drift.signal import MIN_WINDOWS, Floats, GroupStatistics

FLOOR = 1e-2
"""Least variance of a channel's mean between windows, relative to the source's."""


@dataclass
class DetectorState:
    """Detector of one user.

    Attributes:
        row: the user's row in the tables.
        alarm: the detector.
        num_alarms: number of alarms since the last calibration.
    """

    row: int
    alarm: Alarm
    num_alarms: int = 0


class BatchedMonitor:
    """One drift detector per user; the statistics of all users and classes are one table.

    Args:
        detector: creates the detector of each user.
        scale: ``[C]`` variance of each channel under the source.
        classes: number of classes.
        capacity: number of users. The least recently used ones are evicted and start again.

    Attributes:
        num_alarms: number of alarms of all users.
    """

    def __init__(self, detector: Detector, scale: Floats, classes: int, capacity: int) -> None:
        self.detector, self.classes, self.capacity = detector, classes, capacity
        self.num_alarms = 0
        self._users: OrderedDict[str, DetectorState] = OrderedDict()
        self._free: list[int] = []
        self._statistics = GroupStatistics(0, scale, FLOOR)

    def user(self, name: str) -> DetectorState:
        """The detector of a user, created on first use."""
        if (state := self._users.get(name)) is not None:
            self._users.move_to_end(name)
            return state
        if len(self._users) >= self.capacity:
            self.forget(next(iter(self._users)))
        if not self._free:
            used = len(self._statistics.n) // self.classes
            more = min(max(64, used), self.capacity - used)
            self._statistics.grow(more * self.classes)
            self._free = list(range(used + more - 1, used - 1, -1))
        state = self._users[name] = DetectorState(self._free.pop(), self.detector.new())
        return state

    def forget(self, name: str) -> None:
        """Remove a user."""
        if (state := self._users.pop(name, None)) is not None:
            self._clear(state.row)
            self._free.append(state.row)

    def observe(self, users: Sequence[str], x: Floats, labels: ArrayLike) -> list[tuple[float | None, bool]]:
        """Process one window per user.

        Args:
            users: different users, at most ``capacity``.
            x: ``[U, C]`` channel means of the windows or of their activations.
            labels: ``[U]`` predicted classes.

        Returns:
            Per user, the distance z from earlier windows of the class (None while there are too few) and whether the
            detector raised an alarm. After an alarm, the user's statistics start again with this window.
        """
        states = [self.user(name) for name in users]
        group = np.array([state.row for state in states]) * self.classes + np.asarray(labels)
        deviations = self._statistics.deviations(x, group)
        n, z, signal = self._statistics.n[group], deviations.mean(1), np.log1p(deviations).mean(1)
        results: list[tuple[float | None, bool]] = []
        for state, count, distance, value in zip(states, n.tolist(), z.tolist(), signal.tolist(), strict=True):
            if count < MIN_WINDOWS:
                results.append((None, False))
                continue
            state.alarm.update(value)
            results.append((distance, state.alarm.drift_detected))
            if state.alarm.drift_detected:
                state.alarm, state.num_alarms = self.detector.new(), state.num_alarms + 1
                self.num_alarms += 1
                self._clear(state.row)
        self._statistics.update(x, group)
        return results

    def _clear(self, row: int) -> None:
        self._statistics.clear(slice(row * self.classes, (row + 1) * self.classes))
