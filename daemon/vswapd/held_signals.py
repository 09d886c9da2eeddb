"""Signals that a daemon acts on: held from its first moment to its last, and never delivered.

They are taken one by one, by a thread that waits for them. So there is no moment, at the start, at
the end or in between, in which one of them could end the process by what it does by default, and no
other thread is ever interrupted. One that comes before somebody attends to them stays pending; so
does one that comes too late.

Invariants:
- Whoever holds them has no other thread yet: threads inherit what is held.
- A process that is forked, and does not act on them, ignores and releases them.

This module must not know what they mean to the daemon.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncio

_ENDING: Final = frozenset({signal.SIGTERM, signal.SIGINT})
HELD: Final = _ENDING | {signal.SIGHUP, signal.SIGXCPU}
"""Those that a daemon acts on."""


def hold() -> None:
    """Keep them away from this thread, and from those that it starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)


def release() -> None:
    """Let them do what they do in a process that does not attend to them."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)


def asked_to_end() -> bool:
    """Whether one has come, while nobody attends to them, that ends a daemon."""
    return bool(signal.sigpending() & _ENDING)


def asked_to_end_within(seconds: float) -> bool:
    """Wait for one that ends a daemon, while nobody attends to them; whether one has come."""
    return signal.sigtimedwait(_ENDING, seconds) is not None


def attend(
    loop: asyncio.AbstractEventLoop, actions: Mapping[signal.Signals, Callable[[], None]]
) -> None:
    """Act on what has come meanwhile, and on what comes, in an event loop, until it is closed.

    Args:
        loop: where the actions are called.
        actions: for each of HELD.
    """
    hold()

    def run() -> None:
        while True:
            number = signal.Signals(signal.sigwait(HELD))
            try:
                loop.call_soon_threadsafe(actions[number])
            except RuntimeError:
                return  # the loop is closed: it has come too late

    # It waits for ever: the process ends without it.
    threading.Thread(target=run, name="signals", daemon=True).start()
