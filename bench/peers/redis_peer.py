"""Redis on a Unix socket, with a client that compresses.

Invariants:
- A server of its own, without persistence; MSET and MGET of a batch are one request each.
- No io-threads: with 4 clients on 4 cores, 4 of them made stores a fifth slower (4.0 to 4.8 us per
  page), and loads no faster.

This module must not be imported where the Redis library is not needed: see `registry`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis

from bench.peers.contract import BATCH, Batch, Buffer, Held, Peer, Plan
from bench.peers.lz4_codec import all_grown, all_shrunk, grown, shrunk
from bench.peers.processes import Server, program


class RedisPeer(Peer):
    """redis-server, and redis-py with the parser of hiredis."""

    name = "redis"
    what = "Redis, Unix socket, lz4 in the client, MSET/MGET"

    def __init__(self) -> None:
        self._server: Server | None = None

    def start(self, plan: Plan) -> None:
        path = plan.directory / "redis.sock"
        command = [program("redis-server", "redis-server"), "--port", "0"]
        command += ["--unixsocket", str(path), "--dir", str(plan.directory)]
        command += ["--save", "", "--appendonly", "no", "--daemonize", "no"]
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
    def connect(cls, address: str, client: int, pages: int) -> RedisClient:
        return RedisClient(address, client, pages)


class RedisClient:
    """A connection; keys are short, and made beforehand."""

    def __init__(self, path: str, client: int, pages: int) -> None:
        self._redis: Any = redis.Redis(unix_socket_path=path)
        self._keys = [b"%d:%d" % (client, number) for number in range(pages)]
        self._batches = [self._keys[at : at + BATCH] for at in range(0, pages, BATCH)]

    def store(self, batch: Batch) -> None:
        keys = self._batches[batch.first // BATCH]
        self._redis.mset(dict(zip(keys, all_shrunk(batch.pages), strict=True)))

    def load(self, batch: Batch) -> Sequence[Buffer]:
        return all_grown(self._redis.mget(self._batches[batch.first // BATCH]))

    def store_one(self, number: int, page: memoryview) -> None:
        self._redis.set(self._keys[number], shrunk(page))

    def load_one(self, number: int) -> Buffer:
        return grown(self._redis.get(self._keys[number]))

    def close(self) -> None:
        self._redis.close()
