"""Pages in compressed form, made as a store makes them, for tests of what lies below the engine.

This module must not know any one test.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vswapd_backends.base import PAGE_BYTES
from vswapd_backends.segment import payload_of
from vswapd_backends.zswap import Compressed, Zswap


def compress(zswap: Zswap, pages: Sequence[bytes], spec: str | None = None) -> Compressed:
    """Pages ready to be appended (with `spec`, not the current codec); noise stays raw."""
    pool = zswap.current if spec is None else zswap.pool_of(spec)
    entries = [
        entry if len(entry) < PAGE_BYTES else raw
        for entry, raw in zip(pool.codec.compress(pages), pages, strict=True)
    ]
    lengths = np.array([len(entry) for entry in entries], np.int64)
    return Compressed(pool.index, payload_of(entries), lengths, int(lengths.sum()))
