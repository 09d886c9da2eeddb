"""Memory that O_DIRECT can read into and write from.

A fresh anonymous map faults in page by page: 130 us for 256 KiB, more than writing them takes.
Arrays come from the heap, whose pages are there already: 4 us, 2 us for 4 KiB (medians). Buffers
that live only as long as one call are kept per thread.

This module must not know devices.
"""

from __future__ import annotations

import threading

import numpy as np

from vswapd_blockdev.device import BLOCK_BYTES, EXTENT_BYTES


def aligned(length: int) -> memoryview:
    """`length` bytes of its own that begin at a multiple of BLOCK_BYTES; not zeroed."""
    room = np.empty(length + BLOCK_BYTES, np.uint8)
    start = -int(room.ctypes.data) % BLOCK_BYTES
    return room.data[start : start + length]


class Scratch(threading.local):
    """One aligned buffer per thread, an extent and a block long, for use within one call."""

    def __init__(self) -> None:
        self.buffer = aligned(EXTENT_BYTES + BLOCK_BYTES)
