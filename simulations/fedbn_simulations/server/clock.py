"""CPU and wall time of a run that takes turns with other runs of its process."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class Clock:
    """Seconds of this process that do not belong to a run.

    Attributes:
        cpu: CPU seconds.
        wall: seconds.
    """

    cpu: float = 0.0
    wall: float = 0.0


run_clock: ContextVar[Clock] = ContextVar("run_clock", default=Clock())  # noqa: B039 (nobody changes the default)


def cpu_seconds() -> float:
    """CPU seconds of this process, as `time.process_time`, without those of other runs."""
    return time.process_time() - run_clock.get().cpu


def wall_seconds() -> float:
    """Seconds, as `time.perf_counter`, without those of other runs."""
    return time.perf_counter() - run_clock.get().wall
