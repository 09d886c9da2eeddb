"""A lock that is given back wherever a signal strikes, and that no thread waits for itself with.

A handler of a signal may raise (KeyboardInterrupt does), and the main thread then goes on wherever
it is caught. From Python 3.14 on `with lock:` is not enough against that: a signal can strike when
the lock has been taken and the block has not begun, and then nothing gives it back
(https://github.com/python/cpython/issues/148874).

Invariants:
- After `run` the lock is not the calling thread's, whatever `run` ended with.

This module must not know what is locked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

_Args = TypeVarTuple("_Args")
_Result = TypeVar("_Result")


class Lock:
    """Runs one piece of work at a time.

    Args:
        work: What it runs, for the error: "a call on this connection".
    """

    __slots__ = ("_busy", "_lock", "_work")

    def __init__(self, work: str) -> None:
        self._work = work
        # One that knows its owner: only so can be told whether it was taken before the signal.
        self._lock = threading.RLock()
        self._busy = False

    def run(self, work: Callable[[*_Args], _Result], *args: *_Args) -> _Result:
        """What `work(*args)` returns; threads wait for each other.

        Raises:
            RuntimeError: this thread is at such work already, and a handler of a signal wants more.
        """
        # Python looks for signals where a call has returned, a function begins, or a loop goes on.
        # The look behind `acquire` belongs to the first `try`. From there to the second one, and
        # from the end of that to `release`, nothing is called, so nothing strikes.
        try:
            self._lock.acquire()
        except BaseException:
            try:  # noqa: SIM105 - suppress() is a function, in which a second signal could strike
                self._lock.release()
            except RuntimeError:
                pass  # it was not taken
            raise
        try:
            if self._busy:
                raise RuntimeError(f"{self._work} is running in this very thread")
            self._busy = True
            try:
                return work(*args)
            finally:
                self._busy = False
        finally:
            self._lock.release()
