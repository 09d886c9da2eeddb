"""vswapd itself: a daemon of its own, clients with the library that applications use.

Invariants:
- Nothing is written to a device and nothing is refused: there is a pool with room for everything,
  and no device.
- Overwritten segments stay warm for a second, as the daemon does it; they are not in `held`'s sums
  when it is asked before anything was overwritten.

This module must not know the engine: it starts the daemon as a user would.
"""

from __future__ import annotations

import mmap
import sys

import numpy as np

import vswap
from bench.peers.contract import BATCH, PAGE_BYTES, Batch, Buffer, Held, MissingError, Peer, Plan
from bench.peers.processes import Server
from vswapd.config import KEYS

_POOL_BYTES = 2 << 30
"""Never reached; less where the machine has less."""


class VswapdPeer(Peer):
    """Pages go through the socket."""

    name = "vswapd"
    what = "vswapd, Unix socket"

    def __init__(self) -> None:
        self._server: Server | None = None
        self._watching: vswap.Space | None = None

    def start(self, plan: Plan) -> None:
        path = plan.directory / f"{self.name}.sock"
        config = path.with_suffix(".toml")
        config.touch()  # an empty one: not what this machine's administrator has set
        settings: dict[str, object] = {
            "server.socket": path,
            "pool.max": max(_POOL_BYTES, 4 * plan.bytes_in_all),
        }
        if "server.shards" in KEYS:
            settings["server.shards"] = self.shards(plan)
        settings |= self.more_settings(plan)
        command = [sys.executable, "-m", "vswapd", "serve", f"--config={config}"]
        command += [f"--set={key}={value}" for key, value in settings.items()]
        self._server = Server(command, path)
        self._watching = vswap.connect(path, label="bench")

    def shards(self, plan: Plan) -> int:
        """Processes that share the work."""
        return plan.cores

    def more_settings(self, plan: Plan) -> dict[str, object]:
        """What else the daemon is told."""
        del plan
        return {}

    def address(self, client: int) -> str:
        del client
        assert self._server is not None
        return str(self._server.socket_path)

    def held(self) -> Held:
        assert self._server is not None
        assert self._watching is not None
        return Held(
            # Windows hold the clients' own pages.
            resident_bytes=self._server.resident_bytes(without="vswapd-window"),
            compressed_bytes=int(self._watching.status()["pool"]["live_bytes"]),
        )

    def cpu_s(self) -> float:
        assert self._server is not None
        return self._server.cpu_s()

    def stop(self) -> None:
        if self._watching is not None:
            self._watching.close()
            self._watching = None
        if self._server is not None:
            self._server.stop()
            self._server = None

    @classmethod
    def connect(cls, address: str, client: int, pages: int) -> VswapdClient:
        space = vswap.connect(address, label=f"bench {client}")
        return VswapdClient(space, pages)


class OneShardPeer(VswapdPeer):
    """The same in one process: what more of them are worth."""

    name = "vswapd-1"
    what = "vswapd, Unix socket, one shard"
    counts = False

    def start(self, plan: Plan) -> None:
        if "server.shards" not in KEYS or plan.cores == 1:
            raise MissingError("with one shard, vswapd is already measured")
        super().start(plan)

    def shards(self, plan: Plan) -> int:
        del plan
        return 1


class WindowPeer(VswapdPeer):
    """Pages lie in the connection's shared memory, as they would with a program that fills it."""

    name = "vswapd-window"
    what = "vswapd, shared-memory window"

    def more_settings(self, plan: Plan) -> dict[str, object]:
        return {"server.window": window_bytes(plan.pages)}

    @classmethod
    def connect(cls, address: str, client: int, pages: int) -> VswapdClient:
        space = vswap.connect(address, label=f"bench {client}", window=window_bytes(pages))
        return WindowClient(space, pages)


def window_bytes(pages: int) -> int:
    """Room for a client's pages, for the others that it checks with, and for what it loads."""
    return (2 * pages + 2 * BATCH) * PAGE_BYTES


class VswapdClient:
    """A space whose slots are numbered as the pages are."""

    def __init__(self, space: vswap.Space, pages: int) -> None:
        self._space = space
        nothing = bytes(BATCH * PAGE_BYTES)  # zero pages: slots, no more
        # In batches, as everything that follows: a large call would go over all shards.
        self._batches = [space.store(nothing) for _ in range(0, pages, BATCH)]
        self._slots = np.concatenate(self._batches)
        self._room = np.frombuffer(mmap.mmap(-1, BATCH * PAGE_BYTES), np.uint8)
        self._bytes = self._room.data
        self._page = self._room[:PAGE_BYTES]

    def store(self, batch: Batch) -> None:
        self._space.store(batch.whole, self._batches[batch.first // BATCH])

    def load(self, batch: Batch) -> Buffer:
        self._space.load(self._batches[batch.first // BATCH], into=self._room)
        return self._bytes

    def store_one(self, number: int, page: memoryview) -> None:
        self._space.store(page, self._slots[number : number + 1])

    def load_one(self, number: int) -> Buffer:
        self._space.load(self._slots[number : number + 1], into=self._page)
        return self._page.data

    def close(self) -> None:
        self._space.close()


class WindowClient(VswapdClient):
    """Takes each batch into the window when it first meets it, before anything is measured."""

    def __init__(self, space: vswap.Space, pages: int) -> None:
        super().__init__(space, pages)
        self._pages = pages
        self._room = np.frombuffer(space.buffer(BATCH), np.uint8)
        self._bytes = self._room.data
        self._page = self._room[:PAGE_BYTES]
        self._moved: dict[int, memoryview] = {}

    def store(self, batch: Batch) -> None:
        moved = self._moved.get(id(batch))
        if moved is None:
            moved = self._moved[id(batch)] = self._space.buffer(len(batch.pages))
            moved[:] = batch.whole
        self._space.store(moved, self._batches[batch.first // BATCH])
