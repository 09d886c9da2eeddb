"""Whether the machine has processor time to spare, for work that can wait.

This module must not know what that work is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from vswapd.kept_file import KeptFile

_STAT: Final = Path("/proc/stat")
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


def cpu_times(file: KeptFile | None = None) -> CpuTimes:
    """What the system says now. Waiting for a disk is idle, too. Source: proc(5), /proc/stat.

    Args:
        file: that file, if it is to be looked at more than once.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it says something else.
    """
    text = (file or KeptFile(_STAT)).read()
    if not text:
        raise FileNotFoundError(f"{_STAT} is not there")
    ticks = [int(field) for field in text.partition(b"\n")[0].split()[1:]]
    if len(ticks) <= _IOWAIT:
        raise ValueError(f"{_STAT} has no times of idleness")
    idle = ticks[_IDLE] + ticks[_IOWAIT]
    # Guests' time, the fields after the eighth, is in user time already.
    return CpuTimes(idle / _TICKS, sum(ticks[:8]) / _TICKS)


class Busy:
    """Asked again and again: whether others have needed the processors since a second ago."""

    def __init__(
        self,
        clock: Callable[[], float],
        times: Callable[[], CpuTimes] | None = None,
        *,
        tell: Callable[[str, Exception], None] = lambda _what, _error: None,
    ) -> None:
        """Begin to look.

        Args:
            clock: seconds.
            times: what the system says; None: `cpu_times`, with its file kept open.
            tell: told of a look that failed; the answer is the last one then.
        """
        file = KeptFile(_STAT)
        self._clock = clock
        self._times: Final = times or (lambda: cpu_times(file))
        self._tell = tell
        self._before = self._look()
        self._looked_at = clock()
        self._busy = False

    def __call__(self) -> bool:
        """Whether work that can wait should."""
        now = self._clock()
        if now - self._looked_at >= _LOOK_S:
            times, before = self._look(), self._before
            self._looked_at = now
            if times is not None and before is not None:
                passed = times.total - before.total
                self._busy = passed > 0 and times.idle - before.idle < SPARE * passed
            self._before = times or before
        return self._busy

    def _look(self) -> CpuTimes | None:
        try:
            return self._times()
        except (OSError, ValueError) as error:
            self._tell("the processors' times cannot be looked at", error)
            return None
