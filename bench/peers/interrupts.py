"""Ctrl-C and SIGTERM, which must not come between making something and noting that it is there.

Invariants:
- Inside of `held` neither interrupts; one that came meanwhile does when the block has ended.
- Processes that are started inside of it are interrupted as usual: no signal is blocked.

This module must not know what is made.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class _State:
    depth = 0
    pending = False


def _interrupt(number: int, frame: FrameType | None) -> None:
    del number, frame
    if _State.depth:
        _State.pending = True
    else:
        raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Both signals are a KeyboardInterrupt in this block, at a time that suits."""
    before = [signal.signal(number, _interrupt) for number in _SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(_SIGNALS, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """No interrupt in this block.

    Raises:
        KeyboardInterrupt: behind the block, if there was one in it.
    """
    _State.depth += 1
    try:
        yield
    finally:
        _State.depth -= 1
        if _State.pending and not _State.depth:
            _State.pending = False
            raise KeyboardInterrupt
