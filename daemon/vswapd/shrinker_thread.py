"""The shrinker's thread: sleeps until there is something to do, does it, and sleeps again.

Invariants:
- It sleeps on an event while `count` is 0, until it is poked or the shrinker's own next wake-up:
  no polling.
- An error in a scan is logged and counted, and the thread goes on after a pause that doubles; it is
  never swallowed and never ends the thread.

This module must not know what a scan does.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from vswapd.driver import Driver
from vswapd.shrinker import Shrinker

_LOG: Final = logging.getLogger(__name__)
_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 60.0


class ShrinkerThread:
    """See the module. `poke` may be called from anywhere, and is cheap."""

    def __init__(self, shrinker: Shrinker, driver: Driver, clock: Callable[[], float]) -> None:
        self._shrinker = shrinker
        self._driver = driver
        self._clock = clock
        self._event = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="vswapd-shrink", daemon=True)
        self.errors = 0
        """Scans that ended with an error of ours."""
        self.turns = 0
        """Counts and scans so far: what the watchdog looks at."""
        self.asleep = True

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def poke(self) -> None:
        """There may be something to do."""
        if not self._event.is_set():
            self._event.set()

    def stop(self) -> None:
        """End the thread after the scan it is in."""
        self._stopping = True
        self._event.set()
        self._thread.join()

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while not self._stopping:
            self._event.clear()
            try:
                self._work()
                pause = _FIRST_PAUSE
            except Exception:
                self.errors += 1
                _LOG.exception("the shrinker failed; it pauses for %.0f s", pause)
                self._sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _work(self) -> None:
        """Scan until nothing is left to do, then sleep."""
        while not self._stopping:
            self.turns += 1
            with self._driver.lock:
                count = self._shrinker.count()
                wakeup = self._shrinker.next_wakeup() if not count else None
            if not count:
                self._sleep(None if wakeup is None else max(0.0, wakeup - self._clock()))
                return
            self._driver.run(self._shrinker.scan(count))

    def _sleep(self, seconds: float | None) -> None:
        if self._stopping:
            return
        self.asleep = True
        self._event.wait(seconds)
        self.asleep = False
