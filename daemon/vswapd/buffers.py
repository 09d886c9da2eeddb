"""Memory for requests and replies: how much all connections may take together, and reuse of it.

Requests have three lanes, by their size. Small are those of which every connection can have one
under way at the same time: who begins as many requests as he can, and lets them lie, holds up no
small ones. Large are those that no client of ours makes: where memory is so little that hardly any
are small, large ones still hold up each other only.

Invariants:
- Nobody waits in the lane of the small ones, as long as each connection has one request at most,
  and no more are open than clients may have (operators may have as many again).
- A lane never hands out more than its size, but for one request that is larger than the lane when
  nothing else is out: there is always progress.
- Who waits is served in the order of asking.
- A request asks once, for its body and its reply together, before its body is received: nobody
  holds memory while waiting for more.

This module must not know connections or frames.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

LARGE: Final = 1 << 20
"""Bytes from which on a request is large: 256 pages. Clients of ours send 128 at most."""
_SHARES: Final = (3, 2, 3)
"""Of the budget, for small requests, for those between, and for large ones: in eighths. Of the
default, 256 MiB, with 4 shards, and 64 connections: requests of 95 pages are small."""
_KEPT_BYTES: Final = 4 << 20
"""Most bytes of buffers that are kept for reuse. A buffer of 64 pages that is warm saves 0.3 us per
page against a fresh one, whose pages the kernel must clear."""
_CLASSES: Final = 8
"""Sizes of buffers per power of two: at most an eighth of a buffer is unused."""
_SMALLEST: Final = 4096


class Lane:
    """One part of the budget."""

    def __init__(self, size: int) -> None:
        self.size: Final = size
        self.used = 0
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()

    @property
    def crowded(self) -> bool:
        """Whether somebody waits."""
        return bool(self._waiting)

    def take(self, amount: int, granted: Callable[[], None]) -> bool:
        """Take `amount` bytes; if that cannot be now, `granted` is called when it was done."""
        if not self._waiting and self._fits(amount):
            self.used += amount
            return True
        self._waiting.append((amount, granted))
        return False

    def give(self, amount: int) -> None:
        """Return what was taken."""
        self.used -= amount
        assert self.used >= 0
        while self._waiting and self._fits(self._waiting[0][0]):
            amount, granted = self._waiting.popleft()
            self.used += amount
            granted()

    def _fits(self, amount: int) -> bool:
        return self.used + amount <= self.size or not self.used


class Buffers:
    """The budget of all connections, and buffers that were used before."""

    def __init__(self, size: int, connections: int) -> None:
        """A budget of `size` bytes for so many connections at most."""
        small, between, large = (Lane(size * share // sum(_SHARES)) for share in _SHARES)
        self._lanes: Final = (small, between, large)
        self._most_small: Final = min(LARGE, small.size // connections)
        self._kept: dict[int, list[bytearray]] = {}
        self._kept_bytes = 0

    def lane(self, amount: int) -> Lane:
        """Where a request of so many bytes, reply included, is accounted."""
        return self._lanes[(amount > self._most_small) + (amount > LARGE)]

    @property
    def crowded(self) -> bool:
        """Whether somebody waits."""
        return any(lane.crowded for lane in self._lanes)

    @property
    def used(self) -> int:
        """Bytes that are out."""
        return sum(lane.used for lane in self._lanes)

    def take(self, nbytes: int) -> bytearray:
        """A buffer of at least `nbytes`, full of anything; the caller has taken them in a lane."""
        size = _rounded(nbytes)
        kept = self._kept.get(size)
        if kept:
            self._kept_bytes -= size
            return kept.pop()
        return bytearray(size)

    def give(self, buffer: bytearray) -> None:
        """Take a buffer back. Nobody may look at it any more."""
        size = len(buffer)
        if self._kept_bytes + size <= _KEPT_BYTES:
            self._kept_bytes += size
            self._kept.setdefault(size, []).append(buffer)


def _rounded(nbytes: int) -> int:
    if nbytes <= _SMALLEST:
        return _SMALLEST
    unit = max(_SMALLEST, (1 << (nbytes - 1).bit_length()) // (2 * _CLASSES))
    return -(-nbytes // unit) * unit
