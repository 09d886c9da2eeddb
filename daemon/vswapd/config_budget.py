"""What the processes may take beside pool and table, and how it is shared out among connections.

On a host with much memory it is what the configuration says. On one with little it is less:
buffers, replies that nobody reads, windows, and requests that are very large are made to fit; the
growth that is left is what `pool.reserve = auto` keeps free.

Invariants:
- `growth` is the most that all processes together come to take on top of what they take at the
  start, whatever their clients do, but for thousands of them that all stop reading at once.

This module must not know where limits come from, or what holds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

from vswap.protocol import HEADER_BYTES, PAGE_BYTES, SLOT_BYTES
from vswapd.config_schema import Server
from vswapd.sizes import human_size

_MIB: Final = 1 << 20
_PART: Final = 80
"""Buffers take at most one part of so many of the memory, or _LITTLE if that is more."""
_LITTLE: Final = 16 * _MIB
_SMALL_PART: Final = 16
"""But never more than one part of so many."""
_FRAME_PART: Final = 48
"""One request of each shard may be as large as one part of so many, all shards together."""
_LEAST_BATCH: Final = 1024
"""Pages of a request that are possible on every host."""
_MOST_REPLIES: Final = 512 << 10
"""Unsent bytes beyond which a connection's next request is not carried out: two replies of 64
pages, so that the socket has something to take while the next one is made."""
_LEAST_REPLIES: Final = 32 << 10
_HELD: Final = 3
"""Times that much a connection can have in unsent replies: here, and in the kernel, whose buffers
count for twice their size (socket(7), SO_SNDBUF)."""
_UNREAD_PART: Final = 8
"""Of thousands of connections not all stop reading at once: no more than this part is kept free."""
_COPIES: Final = 2
"""A store's pages, and what they were compressed to, while it waits for room."""
_JOINED: Final = 3
"""The same of a large one, and once more while the parts of it are put together."""
_WORK: Final = 10 * _MIB
"""Per shard, for all else: a batch that is recompressed, images that are written, and the heap's
growth. Measured: 5 to 8 MiB."""


LEAST_POOL: Final = 4 * _MIB
"""Less than this is no pool: each group and codec has a segment of its own that is being filled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bytes, all shards together unless it says otherwise."""

    buffers: int
    """For requests and replies under way."""
    max_batch: int
    """Pages of one request."""
    replies: int
    """Of one connection: see _MOST_REPLIES, and as much for the kernel."""
    windows: int
    """For windows."""
    growth: int

    @classmethod
    def of(cls, server: Server, ram_bytes: int, shards: int) -> Self:
        """The budget of so many shards, where so much memory may be used."""
        buffers = max(ram_bytes // _PART, min(ram_bytes // _SMALL_PART, _LITTLE))
        buffers = min(int(server.buffer_memory), buffers)
        page = PAGE_BYTES + SLOT_BYTES
        batch = max(_LEAST_BATCH, ram_bytes // (_FRAME_PART * shards) // page)
        max_batch = min(server.max_batch, batch)
        connections = server.max_connections
        replies = ram_bytes // _SMALL_PART // (_HELD * connections)
        replies = max(_LEAST_REPLIES, min(_MOST_REPLIES, replies))
        windows = min(int(server.window) * connections, buffers // 2) if server.window else 0
        # See `buffers`: three eighths for small requests, two for those between, three for large.
        large = buffers // shards * 3 // 8
        frame = HEADER_BYTES + max_batch * page
        requests = _COPIES * (buffers // shards - large) + _JOINED * max(large, frame)
        unread = min(_HELD * replies * connections, ram_bytes // _UNREAD_PART)
        return cls(
            buffers=buffers,
            max_batch=max_batch,
            replies=replies,
            windows=windows,
            growth=shards * (requests + _WORK) + windows + unread,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitting:
    """Whether a pool fits beside the processes that serve it, and what is kept free for them."""

    pool_max: int
    ram_bytes: int
    """Memory that they may use."""
    own_bytes: int
    """What the processes take by themselves."""
    reserve: int
    """pool.reserve in bytes; 0: memory is not looked at."""
    automatic: bool
    """Whether that is `auto`."""

    @property
    def fits_bytes(self) -> int:
        """What the pool can count on, whatever requests take: at most `pool_max`.

        It has more for as long as they leave more than the reserve free (see `pressure`).
        """
        if not self.reserve:
            return self.pool_max
        return max(0, min(self.pool_max, self.ram_bytes - self.own_bytes - self.reserve))

    @property
    def lowered(self) -> str:
        """That the pool cannot count on its maximum, and why; empty: it can."""
        if self.fits_bytes == self.pool_max:
            return ""
        return (
            f"pool.max of {human_size(self.pool_max)} does not fit, the pool can count on "
            f"{human_size(self.fits_bytes)}: {self._why}"
        )

    @property
    def refusal(self) -> str:
        """Why a daemon cannot serve like that at all; empty: it can."""
        if not self.automatic or not self.pool_max:
            return ""
        least = min(self.pool_max, LEAST_POOL)
        if self.fits_bytes >= least:
            return ""
        needed = human_size(self.own_bytes + self.reserve + least)
        return (
            f"{self._why}, and nothing is left for the pool: allow it {needed} or more, lower "
            "server.shards, server.max_connections or server.max_batch, or say what to keep free "
            "(pool.reserve)"
        )

    @property
    def _why(self) -> str:
        return (
            f"of the {human_size(self.ram_bytes)} of memory that the daemon may use its processes "
            f"take {human_size(self.own_bytes)}, and {human_size(self.reserve)} are kept free for "
            "requests under way (pool.reserve)"
        )
