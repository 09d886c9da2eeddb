"""Whether the daemon is alive: asked of what serves requests, not of a timer.

Invariants:
- A beat is told only after it has gone through the event loop and taken the engine's lock as every
  request does, and if the shrinker's thread has moved on since the last one, or sleeps, or waits
  for a device.
- Where a beat cannot be told, the log says why.

This module must not know what is done with a beat.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from vswapd.driver import Driver
from vswapd.shrinker_thread import ShrinkerThread

_LOG: Final = logging.getLogger(__name__)
_BEATS: Final = 4
"""Per period: one that comes late, or is missed, does not kill."""
_LOCK_S: Final = 1.0
"""How long the loop waits for the lock. No step under it takes a tenth of that; if it is held for
so long requests stand still in any case."""


class Watchdog:
    """Feels the daemon's pulse."""

    def __init__(self, driver: Driver, shrinker: ShrinkerThread, tell: Callable[[], None]) -> None:
        self._driver = driver
        self._shrinker = shrinker
        self._tell = tell
        self._last: int | None = None

    async def run(self, period_s: float) -> None:
        """Tell of a beat `_BEATS` times per period, for ever, as long as there is one."""
        while True:
            self.beat(min(_LOCK_S, period_s / _BEATS))
            await asyncio.sleep(period_s / _BEATS)

    def beat(self, patience_s: float = _LOCK_S) -> bool:
        """One beat; False if there was none. Called from the event loop."""
        if not self._driver.lock.acquire(patience_s):
            _LOG.error("watchdog: the engine's lock is held for more than %g s", patience_s)
            return False
        self._driver.lock.release()
        try:
            steps = self._shrinker.steps()
        except RuntimeError as error:
            _LOG.critical("watchdog: %s", error)
            return False
        if steps is not None and steps == self._last:
            _LOG.error("watchdog: the shrinker has been in one step since the last beat")
            return False
        self._last = steps
        self._tell()
        return True
