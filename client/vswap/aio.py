"""The client for asyncio: as `vswap.connect`, with `await` before every call.

    async with vswap.aio.connect() as space:
        slots = await space.store(pages)
        data = await space.load(slots)

Invariants:
- Many tasks may use one space at once; their requests are pipelined, in the order of the calls.
- A buffer given to a call belongs to it until the call is over, or is cancelled: from then on it is
  not touched any more.
- Cancelling a call keeps the connection in step: what was sent is answered and thrown away. A
  cancelled store of new pages is undone. A cancelled free is carried through. A cancelled overwrite
  may have taken effect, in whole or in part.

This module must not know the wire.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

import numpy as np

from vswap.address import client_name
from vswap.aio_connection import AsyncConnection
from vswap.aio_greeting import open_connection
from vswap.buffers import empty_bytes, padded_pages_of, pages_of, slots_of, target_of
from vswap.errors import U64
from vswap.greeting import PATIENCE_S
from vswap.handle import Form, Receiver, StoredObject, take_apart
from vswap.pages import Pages, View
from vswap.peer import Peer, parse_document
from vswap.planner import Ask, Free, Listing, Load, Overwrite, Store
from vswap.protocol import PAGE_BYTES, Op
from vswap.window import WINDOW_BYTES, Window

if TYPE_CHECKING:
    import os
    from collections.abc import Generator

    from vswap.buffers import Buffer, Slots

_B = TypeVar("_B", bound="Buffer")


class connect:  # noqa: N801 - used like a function: awaited, or in `async with`
    """Connect to a daemon and open a space there: `await` it, or `async with` it.

    Arguments and errors are those of `vswap.connect`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        timeout: float | None = None,
        name: str | None = None,
        label: str | None = None,
        window: int = WINDOW_BYTES,
        patience: float = PATIENCE_S,
    ) -> None:
        self._path = path
        self._timeout = timeout
        self._name = name
        self._label = label
        self._window = window
        self._patience = patience
        self._space: Space | None = None

    async def _open(self) -> Space:
        return Space(
            *await open_connection(
                self._path,
                self._timeout,
                client_name(self._label),
                self._window,
                self._patience,
                self._name,
            )
        )

    def __await__(self) -> Generator[Any, None, Space]:
        return self._open().__await__()

    async def __aenter__(self) -> Space:
        self._space = await self._open()
        return self._space

    async def __aexit__(self, *_: object) -> None:
        if self._space is not None:
            await self._space.close()


class Space:
    """One client's set of slots in the daemon; the methods are those of `vswap.Space`.

    Belongs to the event loop that it was made in.
    """

    def __init__(self, connection: AsyncConnection, peer: Peer, window: Window | None) -> None:
        self._connection = connection
        self._window = window
        self._frame_pages = peer.frame_pages
        self.peer = peer
        """What the daemon said of itself."""

    async def store(self, pages: Buffer, slots: Slots | None = None) -> U64:
        """As `vswap.Space.store`; cancelled, it stores no new pages."""
        call = (
            Store(self._located(pages_of(pages)), self._frame_pages)
            if slots is None
            else Overwrite(slots_of(slots), self._located(pages_of(pages)), self._frame_pages)
        )
        await self._connection.run(call)
        return call.result()

    @overload
    async def load(self, slots: Slots) -> View: ...
    @overload
    async def load(self, slots: Slots, into: _B) -> _B: ...
    async def load(self, slots: Slots, into: Buffer | None = None) -> Buffer:
        """As `vswap.Space.load`; cancelled, it leaves `into` as far filled as it was."""
        wanted = slots_of(slots)
        size = len(wanted) * PAGE_BYTES
        if into is not None:
            await self._load(wanted, Pages(target_of(into, size)))
            return into
        fresh = empty_bytes(size)
        await self._load(wanted, Pages(fresh))
        return fresh

    async def _load(self, slots: U64, target: Pages) -> None:
        call = Load(slots, self._located(target), self._frame_pages)
        await self._connection.run(call)
        call.result()

    async def free(self, slots: Slots) -> None:
        """As `vswap.Space.free`; cancelled, it frees them all the same."""
        call = Free(slots_of(slots), self._frame_pages)
        await self._connection.run(call)
        call.result()

    async def put(self, source: Buffer) -> Handle:
        """As `vswap.Space.put`."""
        content, form = take_apart(source)
        call = Store(self._located(padded_pages_of(content)), self._frame_pages)
        del content  # a traceback must not hold the caller's buffer
        await self._connection.run(call)
        return Handle(self, call.result(), form)

    async def receive(self, slots: U64, receiver: Receiver) -> Any:
        """For Handle: load `slots` into what `receiver` has, and return what that makes of it."""
        await self._load(slots, receiver.pages)
        return receiver.finish()

    def buffer(self, n: int) -> View:
        """As `vswap.Space.buffer`.

        A load into it that was cancelled may still fill it, and an overwrite out of it that was
        cancelled may still take its pages, as they are by then.
        """
        if n < 0:
            raise ValueError(f"a buffer has 0 pages or more, not {n}")
        lent = self._window.buffer(n) if self._window is not None and n else None
        return empty_bytes(n * PAGE_BYTES) if lent is None else lent

    def _located(self, pages: Pages) -> Pages:
        return pages if self._window is None else self._window.locate(pages)

    async def slots(self) -> U64:
        """As `vswap.Space.slots`."""
        found: list[U64] = []
        for shard in range(self.peer.shards):
            last = 0
            while True:
                call = Listing(shard, last, self.peer.max_batch)
                await self._connection.run(call)
                some = call.slots()
                if not len(some):
                    break
                found.append(some)
                last = int(some[-1])
        return np.concatenate(found) if found else np.empty(0, np.uint64)

    async def status(self) -> dict[str, Any]:
        """As `vswap.Space.status`."""
        call = Ask(Op.STATUS)
        await self._connection.run(call)
        return parse_document(call.result(), "status")

    async def ping(self) -> None:
        """As `vswap.Space.ping`."""
        call = Ask(Op.PING)
        await self._connection.run(call)
        call.result()

    @property
    def closed(self) -> bool:
        """Whether the connection, and with it every slot, is gone."""
        return self._connection.closed

    async def close(self) -> None:
        """End the connection; the daemon frees everything. Calls that run fail: ConnectionLost."""
        self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<vswap.aio.Space {self.peer.space} at {self.peer.daemon}, {state}>"


class Handle(StoredObject):
    """An object that was put; `async with` frees it. As `vswap.Handle`."""

    def __init__(self, space: Space, slots: U64, form: Form) -> None:
        super().__init__(slots, form)
        self._space = space

    @overload
    async def get(self) -> Any: ...
    @overload
    async def get(self, into: _B) -> _B: ...
    async def get(self, into: Buffer | None = None) -> Any:
        """As `vswap.Handle.get`."""
        return await self._space.receive(self.slots, Receiver(self.form, into))

    async def free(self) -> None:
        """As `vswap.Handle.free`; cancelled, it frees them all the same."""
        await self._space.free(self.give_up())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self.freed and not self._space.closed:
            await self.free()
