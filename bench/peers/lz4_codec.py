"""The codec of clients that have to compress for themselves: lz4, a call per page.

Invariants:
- A page that does not shrink is kept as it is; its length says so.

This module must not know where the compressed pages go.
"""

from __future__ import annotations

from collections.abc import Iterable

import lz4.block

from bench.peers.contract import PAGE_BYTES, Buffer

_compress = lz4.block.compress
_decompress = lz4.block.decompress


def shrunk(page: Buffer) -> bytes:
    """A page as it is kept."""
    blob: bytes = _compress(page, store_size=False)
    return blob if len(blob) < PAGE_BYTES else bytes(page)


def grown(blob: Buffer) -> bytes:
    """A page as it was, by itself; `blob` is one that `shrunk` has made."""
    if len(blob) == PAGE_BYTES:
        return bytes(blob)
    page: bytes = _decompress(blob, PAGE_BYTES)
    return page


def all_shrunk(pages: Iterable[Buffer]) -> list[bytes]:
    """Pages as they are kept."""
    return [shrunk(page) for page in pages]


def all_grown(blobs: Iterable[Buffer]) -> list[bytes]:
    """Pages as they were."""
    return [grown(blob) for blob in blobs]
