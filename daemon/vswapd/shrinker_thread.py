"""The shrinker's thread: sleeps until there is something to do, does it, and sleeps again.

Invariants:
- While `count` is 0 it sleeps, until it is poked or until the shrinker's own next wake-up: there is
  no polling.
- A failed scan is logged and counted, and the thread goes on after a pause that doubles; nothing
  ends the thread but `stop`.

This module must not know what a scan does.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from vswapd.driver import Driver, Progress
from vswapd.shrinker import Shrinker

_LOG: Final = logging.getLogger(__name__)
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 64.0
_SCAN_BYTES: Final = 32 << 20
"""Most that one scan is asked for: count, and with it the reason that the status shows, is made
anew after it."""


class ShrinkerThread:
    """See the module. `poke` may be called from anywhere, and is cheap."""

    def __init__(self, shrinker: Shrinker, driver: Driver, clock: Callable[[], float]) -> None:
        self._shrinker = shrinker
        self._driver = driver
        self._clock = clock
        self._news = threading.Event()
        self._progress = Progress()
        self._asleep = True
        self._thread = threading.Thread(target=self._run, name="vswapd-shrinker")
        self.errors = 0
        """Scans that ended with a mistake of ours."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def poke(self) -> None:
        """There may be something to do."""
        if not self._news.is_set():
            self._news.set()

    def stop(self) -> None:
        """End the thread after the step it is in; blocks until then."""
        self._progress.stop = True
        self._news.set()
        if self._thread.ident is not None:
            self._thread.join()

    def steps(self) -> int | None:
        """A number that grows while it works; None while it does not have to.

        It does not have to grow while the thread sleeps, or waits for a device: a disk that hangs
        is no reason to have the daemon killed, which would lose the pages in RAM as well.

        Raises:
            RuntimeError: the thread has ended, and should not have.
        """
        if not self._thread.is_alive():
            raise RuntimeError("the shrinker's thread has ended")
        return None if self._asleep or self._progress.waiting else self._progress.steps

    def _run(self) -> None:
        pause = _FIRST_PAUSE_S
        while not self._progress.stop:
            self._news.clear()
            try:
                sleep = self._work()
                pause = _FIRST_PAUSE_S
            except Exception:  # noqa: BLE001 - the thread must go on, and it is told
                self.errors += 1
                _LOG.exception("the shrinker failed by a mistake of ours; it pauses %g s", pause)
                sleep = pause
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            if not self._progress.stop:
                self._asleep = True
                self._news.wait(sleep)
                self._asleep = False

    def _work(self) -> float | None:
        """Scan until nothing is left to do; returns how long to sleep then, None: until poked."""
        while not self._progress.stop:
            self._progress.steps += 1
            with self._driver.lock:
                count = self._shrinker.count()
                wakeup = None if count else self._shrinker.next_wakeup()
            if not count:
                return None if wakeup is None else max(0.0, wakeup - self._clock())
            self._driver.run(self._shrinker.scan(min(count, _SCAN_BYTES)), self._progress)
            self._driver.step_back()
        return None
