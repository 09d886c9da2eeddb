"""Folios: the pages of one request, split and compressed, ready for any rung of the ladder.

What takes time of a store is here, and needs no lock: large folios are prepared in parts, and
joined.

This module must not know slots, or where the pages go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from vswap.protocol import MAX_BATCH
from vswapd.errors import BatchError
from vswapd_backends.base import PAGE_BYTES
from vswapd_backends.segment import payload_of
from vswapd_backends.zero import zero_pages
from vswapd_backends.zswap import Compressed, Pool

_PAGE_WORDS: Final = PAGE_BYTES // 8
_PAGE_SLICES: Final = [slice(i * PAGE_BYTES, (i + 1) * PAGE_BYTES) for i in range(MAX_BATCH)]
"""Made once: a slice per page and request would be 0.03 us."""


# Not frozen, nor is Compressed: making frozen ones takes 1 % of a store.
@dataclass(slots=True)
class Folio:
    """n pages."""

    pages: int
    zero: npt.NDArray[np.bool_] | None
    """Which pages are zero; None if none is."""
    compressed: Compressed | None
    """The others, in order; None if all are zero."""
    request: int | None = None
    """What its client calls the request, which must not be done twice; None: nobody will ask."""

    @property
    def zeros(self) -> int:
        """How many pages are zero."""
        return self.pages - (len(self.compressed) if self.compressed else 0)


def prepare(pool: Pool, pages: bytes | bytearray | memoryview) -> Folio:
    """Split off the zero pages and compress the rest. Pure; needs no lock.

    Args:
        pool: where they are meant to go: its codec compresses them.
        pages: n * PAGE_BYTES contiguous bytes, n at least 1.

    Raises:
        BatchError: no whole pages, or too many.
    """
    view = memoryview(pages).cast("B")
    count, rest = divmod(len(view), PAGE_BYTES)
    if rest or not 1 <= count <= MAX_BATCH:
        raise BatchError(
            f"a folio is n * {PAGE_BYTES} bytes, n from 1 to {MAX_BATCH}; these are {len(view)}"
        )
    zero = zero_pages(np.frombuffer(view, np.uint64).reshape(count, _PAGE_WORDS))
    spans = _PAGE_SLICES[:count]
    if zero is not None:
        spans = [spans[i] for i in np.flatnonzero(~zero).tolist()]
        if not spans:
            return Folio(count, zero, None)
    entries = pool.codec.compress(map(view.__getitem__, spans))
    # Lists: of 64 numbers numpy takes the maximum and the sum no faster than they are made.
    lengths = list(map(len, entries))
    if max(lengths) >= PAGE_BYTES:
        for index, length in enumerate(lengths):
            if length >= PAGE_BYTES:
                entries[index] = bytes(view[spans[index]])
                lengths[index] = PAGE_BYTES
    compressed = Compressed(
        pool.index, payload_of(entries), np.array(lengths, np.int64), sum(lengths)
    )
    return Folio(count, zero, compressed)


def join(parts: Sequence[Folio]) -> Folio:
    """One folio of the pages of several, in their order; all were prepared for the same pool."""
    zero = None
    if any(part.zero is not None for part in parts):
        zero = np.concatenate(
            [np.zeros(part.pages, np.bool_) if part.zero is None else part.zero for part in parts]
        )
    compressed = None
    full = [part.compressed for part in parts if part.compressed is not None]
    if full:
        assert len({part.pool for part in full}) == 1
        compressed = Compressed(
            full[0].pool,
            b"".join([part.payload for part in full]),
            np.concatenate([part.lengths for part in full]),
            sum(part.compressed_bytes for part in full),
        )
    return Folio(sum(part.pages for part in parts), zero, compressed)
