"""Text in memory that outlives the process, replaced as a whole or not at all.

    half 0 | half 1     each: length u32 | check u32 | UTF-8
    word                0: nothing was kept yet; else 2 | the half that holds

Invariants:
- The half that is not in force is written, and then named by one word: whoever reads finds what was
  kept last, or what was kept before it, wherever the process that wrote was killed.

This module must not know what the text says.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

from vswapd_backends.base import I64

_HEAD: Final = struct.Struct("<II")


class TooLongError(Exception):
    """The text has no room; what was kept before still is."""


class KeptText:
    """See the module."""

    def __init__(self, word: I64, area: memoryview) -> None:
        """Over memory that may hold text already.

        Args:
            word: what names the half in force; shape (1,).
            area: the two halves, zeros at first.
        """
        self._word = word
        self._area = area
        self._half_bytes = len(area) // 2

    def keep(self, text: str) -> None:
        """Replace the text.

        Raises:
            TooLongError: it has no room.
        """
        encoded = text.encode()
        if len(encoded) > self._half_bytes - _HEAD.size:
            raise TooLongError(f"{len(encoded)} bytes of text, where {self._half_bytes} have room")
        half = 1 - (self._word.item() & 1)
        at = half * self._half_bytes
        head = _HEAD.pack(len(encoded), zlib.crc32(encoded))
        self._area[at : at + len(head) + len(encoded)] = head + encoded
        self._word[0] = 2 | half

    def text(self) -> str | None:
        """What was kept last; None: nothing."""
        word = self._word.item()
        if not word:
            return None
        at = (word & 1) * self._half_bytes
        length, check = _HEAD.unpack_from(self._area, at)
        begin = at + _HEAD.size
        encoded = bytes(self._area[begin : begin + length])
        assert zlib.crc32(encoded) == check
        return encoded.decode()
