"""Space and Handle: the blocking interface that applications use.

Invariants:
- A store of new pages is all or nothing, of whatever size. For other calls of more than one frame
  (FRAME_PAGES pages) an error says what took effect: `slots` and `done` (see vswap.errors).
- Calls may come from several threads; they run one after the other.
- A call of more than one frame uses all shards of the daemon; its results are in the order of its
  pages all the same.
- A space lives as long as its connection: closing it frees everything it holds.

This module must not know the wire.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

import numpy as np

from vswap.buffers import (
    empty_bytes,
    padded_pages_of,
    pages_of,
    slots_of,
    target_of,
)
from vswap.errors import U64
from vswap.greeting import PATIENCE_S, greet
from vswap.handle import Form, Receiver, StoredObject, take_apart
from vswap.pages import Pages, View
from vswap.peer import Peer, parse_document
from vswap.planner import Ask, Free, Listing, Load, Overwrite, Store
from vswap.protocol import PAGE_BYTES, Op
from vswap.window import WINDOW_BYTES, Window

if TYPE_CHECKING:
    import os

    from vswap.buffers import Buffer, Slots
    from vswap.connection import Connection

_B = TypeVar("_B", bound="Buffer")


def connect(
    path: str | os.PathLike[str] | None = None,
    *,
    timeout: float | None = None,
    name: str | None = None,
    label: str | None = None,
    window: int = WINDOW_BYTES,
    patience: float = PATIENCE_S,
) -> Space:
    """Connect to a daemon and open a space there.

    Args:
        path: The daemon's socket. Default: $VSWAP_SOCKET; else the daemon of this user
            ($XDG_RUNTIME_DIR/vswapd.sock, /tmp/vswapd-UID/vswapd.sock), else the system's
            (/run/vswapd.sock).
        timeout: Seconds of silence after which a daemon that is there is given up, and the
            connection closed, up to 1,000,000; None: wait for ever. Either way a wait of more than
            a second is a warning of the logger `vswap`, which Python writes to standard error if
            the program has not configured logging.
        name: Of a space that outlives this client: its pages stay, and whoever of the same user
            connects with the name again has them (see `Space.slots`), one client at a time. Among
            them may be parts of a store of more than one frame that did not return, since its
            client was killed or interrupted: free what nobody knows.
            Default: the space has none, and ends with the connection.
        label: How the daemon's status names this client. Default: the program's name.
        window: Bytes of memory to share with the daemon, for `Space.buffer`; it may give less, or
            none. 0: none is asked for.
        patience: Seconds for which a daemon that has died is waited for, whatever `timeout` is, up
            to 1,000,000; 0: it is not. Such a wait is a warning, too.
            Where a service manager keeps its memory, calls go on afterwards as if nothing had
            happened. Only calls notice; the space is kept for this process meanwhile, however
            long it makes none.

    Raises:
        BadArgument: `timeout`, `window` or `patience` make no sense; it is a ValueError, too.
        NoDaemon: none answers.
        ConnectionRefused: it has as many connections as it takes.
        ProtocolError: what answers is no daemon that this client can talk to.
    """
    return Space(*greet(path, timeout, label, window=window, patience=patience, name=name))


class Space:
    """One client's set of slots in the daemon. Made by `connect`; a context manager."""

    def __init__(self, connection: Connection, peer: Peer, window: Window | None) -> None:
        self._connection = connection
        self._window = window
        self._frame_pages = peer.frame_pages
        self.peer = peer
        """What the daemon said of itself."""

    def store(self, pages: Buffer, slots: Slots | None = None) -> U64:
        """Hand pages to the daemon.

        Args:
            pages: A contiguous buffer of n*4096 bytes; it may be changed as soon as this returns.
            slots: n slots of this space to overwrite. Default: new ones.

        Returns:
            The slots, shape (n,), in the order of the pages.

        Raises:
            Rejected: the daemon takes no more; `reason` is why. New pages: none is stored.
                Overwriting: `slots` have no content now, `done` have the new page, and all others
                have what they had.
            BadSlot, DuplicateSlot: of `slots`; `done` have the new page, all others what they had.
            NoSlots: the daemon's table is full; none is stored.
            BadBuffer: no whole pages, or not one slot for each; nothing was sent.
            DeadlyRequest: the daemon dies of it each time. New pages: none is stored. Overwriting:
                `slots` have the page that they had or the new one, `done` the new one.
            ConnectionLost: the space is gone.
        """
        call = (
            Store(self._located(pages_of(pages)), self._frame_pages)
            if slots is None
            else Overwrite(slots_of(slots), self._located(pages_of(pages)), self._frame_pages)
        )
        self._connection.run(call)
        return call.result()

    @overload
    def load(self, slots: Slots) -> View: ...
    @overload
    def load(self, slots: Slots, into: _B) -> _B: ...
    def load(self, slots: Slots, into: Buffer | None = None) -> Buffer:
        """Get pages back, in the order asked for; they stay stored. A slot may stand twice.

        Args:
            slots: n slots of this space.
            into: A writable contiguous buffer of n*4096 bytes to fill. After an error its content
                is undefined.

        Returns:
            `into`, or a new memoryview of bytes.

        Raises:
            BadSlot: free, stale, or another space's.
            Unbacked: their last store was rejected.
            PageLost: the daemon cannot give `slots` back; others can still be loaded.
            BadBuffer: `into` cannot be filled; nothing was sent.
            DeadlyRequest: the daemon dies of it each time; the pages stay stored.
            ConnectionLost: the space is gone.
        """
        wanted = slots_of(slots)
        size = len(wanted) * PAGE_BYTES
        if into is not None:
            self._load(wanted, Pages(target_of(into, size)))
            return into
        fresh = empty_bytes(size)
        self._load(wanted, Pages(fresh))
        return fresh

    def _load(self, slots: U64, target: Pages) -> None:
        call = Load(slots, self._located(target), self._frame_pages)
        self._connection.run(call)
        call.result()

    def free(self, slots: Slots) -> None:
        """Give slots back; their ids are errors from now on.

        Raises:
            BadSlot, DuplicateSlot: `done` are free, all others are as they were.
            DeadlyRequest: the daemon dies of it each time; so it is with `done` and all others.
            ConnectionLost: the space is gone, and all slots with it.
        """
        call = Free(slots_of(slots), self._frame_pages)
        self._connection.run(call)
        call.result()

    def put(self, source: Buffer) -> Handle:
        """Store a whole object: any buffer of any length. Arrays keep dtype, shape and order.

        Raises:
            Rejected, NoSlots, ConnectionLost: as `store`; nothing is stored.
            BadBuffer: it has no bytes, or they are not all of it (objects, masks).
        """
        content, form = take_apart(source)
        call = Store(self._located(padded_pages_of(content)), self._frame_pages)
        del content  # a traceback must not hold the caller's buffer
        self._connection.run(call)
        return Handle(self, call.result(), form)

    def receive(self, slots: U64, receiver: Receiver) -> Any:
        """For Handle: load `slots` into what `receiver` has, and return what that makes of it."""
        self._load(slots, receiver.pages)
        return receiver.finish()

    def buffer(self, n: int) -> View:
        """Memory for n pages that the daemon can look at itself, if there is some left.

        Pages in it, or in whole pages of it, are stored and loaded without going through the
        socket. It is memory as any other in all else: n*4096 bytes, writable, content undefined,
        and free again when nothing looks at it any more. Where the daemon shares no memory, or all
        of it is lent out, it is memory of this process alone, and everything works all the same.
        A child that is forked while it is in use shares it with this process. After a call that did
        not come to its end (TimedOut, KeyboardInterrupt) the daemon may still look at it for a
        moment.

        Raises:
            ValueError: n is negative.
        """
        if n < 0:
            raise ValueError(f"a buffer has 0 pages or more, not {n}")
        lent = self._window.buffer(n) if self._window is not None and n else None
        return empty_bytes(n * PAGE_BYTES) if lent is None else lent

    def _located(self, pages: Pages) -> Pages:
        return pages if self._window is None else self._window.locate(pages)

    def slots(self) -> U64:
        """All slots of this space, ascending, shape (n,): what an earlier client of it has stored.

        Raises:
            ConnectionLost: the space is gone.
        """
        found: list[U64] = []
        for shard in range(self.peer.shards):
            last = 0
            while True:
                call = Listing(shard, last, self.peer.max_batch)
                self._connection.run(call)
                some = call.slots()
                if not len(some):
                    break
                found.append(some)
                last = int(some[-1])
        return np.concatenate(found) if found else np.empty(0, np.uint64)

    def status(self) -> dict[str, Any]:
        """The daemon's status document, as `vswapctl status --json` prints it."""
        call = Ask(Op.STATUS)
        self._connection.run(call)
        return parse_document(call.result(), "status")

    def ping(self) -> None:
        """Wait until the daemon has answered; shows that it is alive."""
        call = Ask(Op.PING)
        self._connection.run(call)
        call.result()

    @property
    def closed(self) -> bool:
        """Whether the connection, and with it every slot, is gone."""
        return self._connection.closed

    def close(self) -> None:
        """End the connection. What this space holds is freed, unless it has a name."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<vswap.Space {self.peer.space} at {self.peer.daemon}, {state}>"


class Handle(StoredObject):
    """An object that was put; a context manager that frees it.

    A handle that is only forgotten keeps its pages until the space is closed.
    """

    def __init__(self, space: Space, slots: U64, form: Form) -> None:
        super().__init__(slots, form)
        self._space = space

    @overload
    def get(self) -> Any: ...
    @overload
    def get(self, into: _B) -> _B: ...
    def get(self, into: Buffer | None = None) -> Any:
        """The object: an array as it was put, or its bytes as a memoryview. It stays stored.

        Args:
            into: A writable buffer to fill and return instead: for an array, one of the same dtype,
                shape and order; else any of `nbytes` bytes.

        Raises:
            HandleFreed: it was freed.
            PageLost, BadBuffer, ConnectionLost: as Space.load.
        """
        return self._space.receive(self.slots, Receiver(self.form, into))

    def free(self) -> None:
        """Give its pages back. Once.

        Raises:
            HandleFreed: it was freed before.
            ConnectionLost: the space is gone, and the pages with it.
        """
        self._space.free(self.give_up())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.freed and not self._space.closed:
            self.free()
