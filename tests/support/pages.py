"""Pages in compressed form, pages in every state, and a codec that remembers its pages.

This module must not know any one test.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from support.engine import Rig, pages_of
from vswapd.groups import Space
from vswapd.swap_table import Tag
from vswapd_backends.base import PAGE_BYTES, U64
from vswapd_backends.codec import Buffer, Codec
from vswapd_backends.segment import payload_of
from vswapd_backends.zswap import Compressed, Zswap

STATES: Final = (Tag.UNBACKED, Tag.ZERO, Tag.ZSWAP, Tag.PHYS)
"""What an allocated slot can be."""


def compress(zswap: Zswap, pages: Sequence[bytes], spec: str | None = None) -> Compressed:
    """Pages ready to be appended (with `spec`, not the current codec); noise stays raw."""
    pool = zswap.current if spec is None else zswap.pool_of(spec)
    entries = [
        entry if len(entry) < PAGE_BYTES else raw
        for entry, raw in zip(pool.codec.compress(pages), pages, strict=True)
    ]
    lengths = np.array([len(entry) for entry in entries], np.int64)
    return Compressed(pool.index, payload_of(entries), lengths, int(lengths.sum()))


def put_in_state(
    rig: Rig, space: Space, state: Tag, slots: U64 | None = None, *, seed: int = 0
) -> U64:
    """Four slots (those given, or new ones) in a state, without another page moving."""
    kind = "zero" if state is Tag.ZERO else "text"
    if state is Tag.PHYS:
        rig.set(pool_enabled=False)
    if state is Tag.UNBACKED:
        slots = rig.put(space, pages_of("zero", 4)) if slots is None else slots
        rig.set(store_enabled=False)
    stored = rig.store(space, pages_of(kind, 4, seed), slots)
    rig.set(pool_enabled=True, store_enabled=True)
    assert rig.tags(stored.slots) == [state] * 4
    return stored.slots


class Counting:
    """A codec that keeps what it was asked to compress."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.spec = codec.spec
        self.asked: list[bytes] = []

    def compress(self, pages: Iterable[Buffer]) -> list[bytes]:
        asked = [bytes(found) for found in pages]
        self.asked += asked
        return self._codec.compress(asked)

    def decompress(self, entries: Sequence[Buffer]) -> list[bytes]:
        return self._codec.decompress(entries)


def counting(rig: Rig) -> Counting:
    """Make the current codec remember what it is asked."""
    pool = rig.engine.core.zswap.current
    codec = Counting(pool.codec)
    pool.codec = codec
    return codec
