"""Counters of the engine. Each line says when its number rises; none of them ever falls.

Python integers: no width to overflow. They are only changed under the engine lock, so no increment
is lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vswap.protocol import Reason


def _no_rejects() -> dict[str, int]:
    return {reason.word: 0 for reason in Reason}


@dataclass(slots=True)
class Stats:
    """What has happened since the engine was made."""

    store_pages: int = 0
    """A page of a folio was stored (zero pages too)."""
    load_pages: int = 0
    """A page was handed out by a load that succeeded."""
    free_pages: int = 0
    """A slot was freed, by its client or with its space."""
    writeback_pages: int = 0
    """A word was flipped from ZSWAP to PHYS."""
    writeback_bytes: int = 0
    """Bytes were written to a device by writeback, by the shrinker or on demand."""
    reclaim_bytes: int = 0
    """Bytes were written to a device because a store needed room."""
    fallback_pages: int = 0
    """A page went straight to a device, the pool having refused it."""
    fallback_bytes: int = 0
    """Bytes were written to a device for such pages."""
    swapoff_bytes: int = 0
    """Bytes were written to a device because another one was being drained."""
    device_compact_bytes: int = 0
    """Bytes were written to a device to put sparse extents together."""
    compact_bytes: int = 0
    """Compressed bytes were copied inside the pool, by compaction or a second chance."""
    recompress_pages: int = 0
    """A page went into the dense pool."""
    recompress_saved_bytes: int = 0
    """Compressed bytes that such pages became smaller by."""
    recompress_seconds: float = 0.0
    """Processor time that trying to took."""
    swapin_pages: int = 0
    """A page was loaded from a device."""
    lost_pages: int = 0
    """A load failed for a page whose bytes could not be had or were not the right ones."""
    housekeeping_errors: int = 0
    """Something besides a request went wrong (see `housekeeping`), and was told in the journal."""
    rejects: dict[str, int] = field(default_factory=_no_rejects)
    """By reason: a page of a rejected folio was not taken."""
