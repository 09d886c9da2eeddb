"""memcached on a Unix socket, with a client that compresses.

Invariants:
- Stores are acknowledged: without that, memcached says nothing of what it has not kept.
- Nothing is evicted: a server that is full says so.
- The slabs' growth factor is the default: with 1.08, at 32 to 128 MiB of pages, more classes held
  more that is not used (1.24 to 1.32 resident bytes per compressed byte).

This module must not be imported where the memcached library is not needed: see `registry`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from pymemcache.client.base import Client as Memcache

from bench.peers.contract import BATCH, Batch, Buffer, Held, Peer, PeerFailedError, Plan
from bench.peers.lz4_codec import all_grown, all_shrunk, grown, shrunk
from bench.peers.processes import Server, program


class MemcachedPeer(Peer):
    """memcached, and pymemcache."""

    name = "memcached"
    what = "memcached, Unix socket, lz4 in the client, set_many/get_many"

    def __init__(self) -> None:
        self._server: Server | None = None

    def start(self, plan: Plan) -> None:
        path = plan.directory / "memcached.sock"
        megabytes = 64 + 2 * plan.bytes_in_all // (1 << 20)
        command = [program("memcached", "memcached"), "-s", str(path), "-m", str(megabytes)]
        command += ["-t", str(plan.cores), "--disable-evictions", "--disable-cas"]
        if not os.geteuid():
            command += ["-u", "root"]
        self._server = Server(command, path)

    def address(self, client: int) -> str:
        del client
        assert self._server is not None
        return str(self._server.socket_path)

    def held(self) -> Held:
        assert self._server is not None
        return Held(resident_bytes=self._server.resident_bytes())

    def cpu_s(self) -> float:
        assert self._server is not None
        return self._server.cpu_s()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None

    @classmethod
    def connect(cls, address: str, client: int, pages: int) -> MemcachedClient:
        return MemcachedClient(address, client, pages)


class MemcachedClient:
    """A connection; keys are short, and made beforehand."""

    def __init__(self, path: str, client: int, pages: int) -> None:
        self._memcache: Any = Memcache(f"unix:{path}", default_noreply=False)
        self._keys = [b"%d:%d" % (client, number) for number in range(pages)]
        self._batches = [self._keys[at : at + BATCH] for at in range(0, pages, BATCH)]

    def store(self, batch: Batch) -> None:
        keys = self._batches[batch.first // BATCH]
        refused = self._memcache.set_many(dict(zip(keys, all_shrunk(batch.pages), strict=True)))
        if refused:
            raise PeerFailedError(f"memcached has not kept {len(refused)} pages")

    def load(self, batch: Batch) -> Sequence[Buffer]:
        keys = self._batches[batch.first // BATCH]
        found = self._memcache.get_many(keys)
        return all_grown([found[key] for key in keys])

    def store_one(self, number: int, page: memoryview) -> None:
        if not self._memcache.set(self._keys[number], shrunk(page)):
            raise PeerFailedError("memcached has not kept a page")

    def load_one(self, number: int) -> Buffer:
        return grown(self._memcache.get(self._keys[number]))

    def close(self) -> None:
        self._memcache.close()
