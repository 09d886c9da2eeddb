"""Whether the machine has processor time to spare, for work that can wait.

This module must not know what that work is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final, NamedTuple

_STAT: Final = "/proc/stat"
_IDLE: Final = 3
_IOWAIT: Final = 4
_TICKS: Final = os.sysconf("SC_CLK_TCK")
SPARE: Final = 0.25
"""Share of all cores that has to have been idle since the last look: one of four."""
_LOOK_S: Final = 1.0
"""Between two looks; the system counts in steps of 10 ms."""


class CpuTimes(NamedTuple):
    """Seconds of all cores together since the system started."""

    idle: float
    total: float


def cpu_times() -> CpuTimes:
    """What the system says now. Waiting for a disk is idle, too. Source: proc(5), /proc/stat.

    Raises:
        OSError: there is no such file.
    """
    with open(_STAT, encoding="ascii") as file:
        ticks = [int(field) for field in file.readline().split()[1:]]
    idle = ticks[_IDLE] + ticks[_IOWAIT]
    # Guests' time, the fields after the eighth, is in user time already.
    return CpuTimes(idle / _TICKS, sum(ticks[:8]) / _TICKS)


class Busy:
    """Asked again and again: whether others have needed the processors since a second ago."""

    def __init__(
        self, clock: Callable[[], float], times: Callable[[], CpuTimes] = cpu_times
    ) -> None:
        self._clock = clock
        self._times = times
        self._before = times()
        self._looked_at = clock()
        self._busy = False

    def __call__(self) -> bool:
        """Whether work that can wait should."""
        now = self._clock()
        if now - self._looked_at >= _LOOK_S:
            times = self._times()
            passed = times.total - self._before.total
            idle = times.idle - self._before.idle
            self._busy = passed > 0 and idle < SPARE * passed
            self._before, self._looked_at = times, now
        return self._busy
