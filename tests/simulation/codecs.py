"""Codecs that remember: a simulation compresses the same few thousand pages again and again.

Invariants:
- A page is known by all of its bytes: one that the engine has spoilt is compressed as it is.

This module must not know who compresses what, or why.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

from vswapd_backends.codec import Buffer, Codec

_PAGES: Final[dict[bytes, bytes]] = {}
"""Each page that was ever compressed, once."""
_ENTRIES: Final[defaultdict[str, dict[bytes, bytes]]] = defaultdict(dict)
"""By the codec's spec and the page: what it is compressed to."""


class Remembering:
    """A codec that compresses no page twice; see `vswapd_backends.codec.Codec`."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._entries = _ENTRIES[codec.spec]

    @property
    def spec(self) -> str:
        """See Codec."""
        return self._codec.spec

    def compress(self, pages: Iterable[Buffer]) -> list[bytes]:
        """See Codec."""
        return list(map(self._one, pages))

    def _one(self, page: Buffer) -> bytes:
        key = bytes(page)
        # The same object each time: its hash is known, and it compares equal at once.
        key = _PAGES.setdefault(key, key)
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = self._codec.compress([key])[0]
        return entry

    def decompress(self, entries: Sequence[Buffer]) -> list[bytes]:
        """See Codec."""
        return self._codec.decompress(entries)
