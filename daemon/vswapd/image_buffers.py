"""Memory for images that are on their way to a device, reused.

Whoever takes a buffer finds another image's bytes in it: `ImageBuilder` lets none of them out.

This module must not know what an image is, or when it is written.
"""

from __future__ import annotations

from typing import Final

from vswapd_backends.base import SEGMENT_BYTES
from vswapd_blockdev.buffers import huge


class ImageBuffers:
    """Block-aligned buffers of a few sizes. A fresh one costs 64 page faults per extent."""

    def __init__(self, sizes: tuple[int, ...], keep: int) -> None:
        """Hand out buffers.

        Args:
            sizes: in extents, each at most what `huge` gives.
            keep: how many of each size are kept when they are given back.
        """
        self._keep = keep
        self._free: Final[dict[int, list[memoryview]]] = {size: [] for size in sizes}

    def take(self, extents: int = 1) -> memoryview:
        """A buffer of so many extents."""
        free = self._free[extents]
        return free.pop() if free else huge(extents * SEGMENT_BYTES)

    def give(self, buffer: memoryview) -> None:
        """Take a buffer back."""
        free = self._free[len(buffer) // SEGMENT_BYTES]
        if len(free) < self._keep:
            free.append(buffer)
