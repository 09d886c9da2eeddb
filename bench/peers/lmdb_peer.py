"""LMDB in the clients' processes, on a file in memory, with lz4.

Invariants:
- Each client has an environment of its own: one that is shared lets one writer in at a time.
- A batch is one transaction; the file is mapped writable, and nothing waits for a disk.

This module must not be imported where the LMDB library is not needed: see `registry`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import lmdb

from bench.peers.contract import BATCH, PAGE_BYTES, Batch, Buffer, Held, Peer, Plan
from bench.peers.lz4_codec import all_grown, all_shrunk, grown, shrunk

_BLOCK_BYTES = 512  # of st_blocks, see stat(2)


class LmdbPeer(Peer):
    """A file per client."""

    name = "lmdb"
    what = "LMDB in process, lz4, writemap, nosync"

    def __init__(self) -> None:
        self._files: list[str] = []

    def start(self, plan: Plan) -> None:
        self._files = [str(plan.memory / f"lmdb-{client}") for client in range(plan.clients)]

    def address(self, client: int) -> str:
        return self._files[client]

    def held(self) -> Held:
        blocks = sum(os.stat(file).st_blocks for file in self._files)
        return Held(resident_bytes=blocks * _BLOCK_BYTES)

    def stop(self) -> None:
        while self._files:
            Path(self._files.pop()).unlink(missing_ok=True)

    @classmethod
    def connect(cls, address: str, client: int, pages: int) -> LmdbClient:
        del client
        return LmdbClient(address, pages)


class LmdbClient:
    """An environment."""

    def __init__(self, file: str, pages: int) -> None:
        self._lmdb = lmdb.open(
            file,
            map_size=64 * 2**20 + 4 * pages * PAGE_BYTES,
            subdir=False,
            lock=False,
            writemap=True,
            sync=False,
            metasync=False,
            map_async=True,
            meminit=False,
            readahead=False,
        )
        self._keys = [number.to_bytes(8, "big") for number in range(pages)]
        self._batches = [self._keys[at : at + BATCH] for at in range(0, pages, BATCH)]

    def store(self, batch: Batch) -> None:
        blobs = all_shrunk(batch.pages)
        keys = self._batches[batch.first // BATCH]
        with self._lmdb.begin(write=True) as transaction, transaction.cursor() as cursor:
            cursor.putmulti(list(zip(keys, blobs, strict=True)))

    def load(self, batch: Batch) -> Sequence[Buffer]:
        keys = self._batches[batch.first // BATCH]
        with self._lmdb.begin(buffers=True) as transaction, transaction.cursor() as cursor:
            return all_grown([bytes_of for _, bytes_of in cursor.getmulti(keys)])

    def store_one(self, number: int, page: memoryview) -> None:
        blob = shrunk(page)
        with self._lmdb.begin(write=True) as transaction:
            transaction.put(self._keys[number], blob)

    def load_one(self, number: int) -> Buffer:
        with self._lmdb.begin(buffers=True) as transaction:
            blob = transaction.get(self._keys[number])
            assert blob is not None
            return grown(blob)

    def close(self) -> None:
        self._lmdb.close()
