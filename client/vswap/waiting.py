"""Waits for a daemon: how long they may last, and what is said of them meanwhile.

Theory: a program that hangs without a word sends its user looking in the wrong place. So whatever
waits for a daemon, wherever, does it in steps of a `Wait`: at the end of the first one the logger
`vswap` gets a warning, at the end of the last one the wait is over. A program that has not
configured logging has the warning on standard error: Python sees to that, as long as a library
brings no handler of its own.

Invariants:
- A wait of more than NOTICE_S is told once, as a warning; that it went on, as information.
- A limit that this module has let through can be handed to any call that waits.

This module must not know sockets or event loops, or what is waited for.
"""

from __future__ import annotations

import logging
import math
import numbers
import time
from collections.abc import Callable
from typing import Final

from vswap.errors import BadArgument

LOG: Final = logging.getLogger("vswap")
NOTICE_S: Final = 1.0
"""A wait that lasts so long is worth a word."""
LONGEST_S: Final = 1_000_000.0
"""The longest limit that there is: poll(2) takes 2**31 ms, which is 2.1 million seconds."""
_LEAST_S: Final = 0.001
"""No step is shorter: a limit of zero stands for no limit in setsockopt(2)."""


def check_timeout(timeout: object) -> float | None:
    """A limit on silence in seconds; None: for ever.

    Raises:
        BadArgument: it is neither.
    """
    if timeout is None:
        return None
    seconds = _seconds(timeout)
    if seconds is None or not 0 < seconds <= LONGEST_S:
        raise BadArgument(
            f"timeout is a number of seconds, more than 0 and at most {LONGEST_S:,.0f}, or None to"
            f" wait for ever, not {timeout!r}"
        )
    return seconds


def check_patience(patience: object) -> float:
    """A limit on the time that a daemon may be away, in seconds.

    Raises:
        BadArgument: it is none.
    """
    seconds = _seconds(patience)
    if seconds is None or not 0 <= seconds <= LONGEST_S:
        raise BadArgument(
            f"patience is a number of seconds, 0 to {LONGEST_S:,.0f}, not {patience!r}"
        )
    return seconds


def _seconds(found: object) -> float | None:
    """A real number as one that every call takes; None: it is none."""
    # True is a number to Python, and never meant as one here.
    if isinstance(found, bool) or not isinstance(found, numbers.Real):
        return None
    try:
        seconds = float(found)
    except OverflowError:
        return math.inf
    return seconds


class Wait:
    """One wait for a daemon.

    Args:
        limit_s: Seconds after which it is over; None: never.
        text: What to say of it, asked for when it is said.
        whole: Whether the limit counts from the beginning, whatever signs of life there are.
        extend: Asked when the limit is reached: whether to wait on all the same.
        passed_s: Seconds that it has lasted already.
    """

    def __init__(
        self,
        limit_s: float | None,
        text: Callable[[], str],
        *,
        whole: bool = False,
        extend: Callable[[], bool] | None = None,
        passed_s: float = 0.0,
    ) -> None:
        self._limit_s = limit_s
        self._text = text
        self._whole = whole
        self._extend = extend
        self._first = self._since = time.monotonic() - passed_s
        self._told = False

    @property
    def text(self) -> str:
        """What there is to say of it."""
        return self._text()

    @property
    def left_s(self) -> float | None:
        """Seconds until the limit is reached, 0 or more; None: there is none."""
        if self._limit_s is None:
            return None
        return max(0.0, self._since + self._limit_s - time.monotonic())

    @property
    def notice_s(self) -> float:
        """Seconds until there is something to be said, 0 or more."""
        return max(0.0, self._first + NOTICE_S - time.monotonic())

    def step_s(self) -> float | None:
        """How long to wait before `over` is asked again, more than 0; None: for ever."""
        steps = [] if self._told else [self.notice_s]
        if self._limit_s is not None:
            steps.append(self._since + self._limit_s - time.monotonic())
        return max(_LEAST_S, min(steps)) if steps else None

    def over(self) -> bool:
        """Whether the limit is reached; says what is to be said by now."""
        if not self._told and not self.notice_s:
            self.tell()
        if self.left_s != 0.0:
            return False
        if self._extend is None or not self._extend():
            return True
        self._since = time.monotonic()
        return False

    def tell(self) -> None:
        """Say that there is a wait, if nobody has."""
        if not self._told:
            self._told = True
            LOG.warning("%s", self._text())

    def sign(self) -> None:
        """There was a sign of life: a limit on silence counts from now."""
        if not self._whole:
            self._since = time.monotonic()

    def end(self) -> None:
        """What was waited for has come."""
        if self._told:
            self._told = False
            LOG.info("vswapd answers again, after %.1f s", time.monotonic() - self._first)
