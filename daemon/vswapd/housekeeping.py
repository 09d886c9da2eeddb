"""What the engine does besides: looks, wake-ups, memory given back. It never undoes a request.

It runs where words have been published, or a page was read, already. So what goes wrong in it
is counted and told of here, and goes no further; what was not done is done at another time.

Invariants:
- Whether a word is published, and what the sums say, does not depend on what runs in here.
- Nothing is swallowed: with nobody to tell (an engine by itself, in tests) an error is raised.

This module must not know what is done, or how it is told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vswapd.stats import Stats

Report = Callable[[str, Exception], None]
"""Told what failed, and how; any thread may call."""


class Housekeeping:
    """The border behind which errors stay."""

    def __init__(self, stats: Stats) -> None:
        self._stats: Final = stats
        self.report: Report | None = None
        """None: errors are raised."""

    def do(self, what: str, work: Callable[[], object]) -> None:
        """Do it.

        Args:
            what: a few words for the journal: "memory could not be looked at".
            work: what is to be done; if it fails, all that counts is as it was.
        """
        try:
            work()
        except Exception as error:  # noqa: BLE001 - a border: the request is not to feel it
            self.failed(what, error)

    def failed(self, what: str, error: Exception) -> None:
        """Count an error, and tell of it.

        Raises:
            Exception: the error, if there is nobody to tell.
        """
        self._stats.housekeeping_errors += 1
        if self.report is None:
            raise error
        self.report(what, error)
