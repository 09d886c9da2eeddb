"""Everything that can go wrong with a call, as one tree under VswapError.

Invariants:
- Every status of the wire has exactly one type here (`error_for`), so a new status cannot go by
  unnoticed: a test walks through them.
- An error that ends the connection is a ConnectionLost or a ProtocolError; after any other the
  connection is as usable as before.
- What a call changed before it failed is in the error: `slots` and `done`.

This module must not know sockets or how calls are cut into frames.
"""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from vswap.protocol import Reason, Status

U64 = npt.NDArray[np.uint64]
"""Slot ids: shape (n,), opaque numbers."""

NO_SLOTS: Final[U64] = np.empty(0, np.uint64)
NO_SLOTS.flags.writeable = False


class VswapError(Exception):
    """The base of all errors of this package."""

    exit_code: ClassVar[int] = 1
    """What a command line tool that fails of it exits with."""

    def __init__(self, text: str, slots: U64 = NO_SLOTS, *, status: Status | None = None) -> None:
        super().__init__(text)
        self.slots = slots
        """The slot ids that it is about, if it is about slots; shape (k,)."""
        self.done: U64 = NO_SLOTS
        """The slots for which the call took effect before it failed: overwritten with the new page,
        freed, or loaded. Slots that are neither here nor in `slots` are as they were before. Empty
        for a store of new pages: what it had stored is freed again."""
        self.status = status
        """The wire status it stands for; None if the daemon was not asked."""


class Rejected(VswapError):  # noqa: N818 - an outcome with a reason, named as the design names it
    """The daemon did not take the pages, and the caller keeps them.

    `slots`: those that were to be overwritten and have no content now; all of them, also where the
    daemon's shards had different reasons.
    """

    def __init__(self, text: str, reason: str, slots: U64 = NO_SLOTS) -> None:
        super().__init__(text, slots, status=Status.REJECTED)
        self.reason = reason
        """One word: `pool_full`, `device_full`, `no_device`, `group_limit`, `writeback_disabled`,
        `write_budget` or `disabled`. If there are several, the one that was told first; the notes
        have the others."""


class BadSlot(VswapError):  # noqa: N818
    """Slots that are free, stale, or another space's. Nothing was changed for their frame.

    `slots`: at least one of them; there may be more.
    """


class DuplicateSlot(VswapError):  # noqa: N818
    """One slot twice in a store or a free."""


class Unbacked(VswapError):  # noqa: N818
    """Load of slots whose last store was rejected."""


class PageLost(VswapError):  # noqa: N818
    """Pages that the daemon can no longer give back. Other slots can still be loaded.

    Its device failed, or their checksum did not match.
    """


class NoSlots(VswapError):  # noqa: N818
    """The daemon's swap table is full."""


class TooLarge(VswapError):  # noqa: N818
    """More in one request than the daemon takes."""


class BadBuffer(VswapError, ValueError):  # noqa: N818
    """A buffer that cannot be pages, or slots that fit no pages. Nothing was sent."""

    exit_code = 2


class BadArgument(VswapError, ValueError):  # noqa: N818
    """An argument that makes no sense, of steering or of `connect`; the text says what would."""

    exit_code = 2


class HandleFreed(VswapError, ValueError):  # noqa: N818
    """A handle was used after its pages were freed."""


class NotAllowed(VswapError):  # noqa: N818
    """Steering by somebody who is neither root nor the daemon's user."""

    exit_code = 77


class NoSpace(VswapError):  # noqa: N818
    """Page operations on a connection that is only for steering."""


class DeadlyRequest(VswapError):  # noqa: N818
    """The daemon, or one of its shards, died each time that it carried out a part of this call.

    That part is not sent a fourth time, and was not carried out: no new slot was given for it, none
    was freed. The connection is as usable as before, and other slots are as the call has left them.
    `slots`: those that the part named. Where they were to be overwritten each of them has its old
    page or its new one, or none if other parts were rejected (see the notes); else they are as they
    were.
    """

    exit_code = 70


class OutOfService(VswapError):  # noqa: N818
    """The daemon understood and could not do it now; its state is what it was."""


class NotUnderstood(VswapError):  # noqa: N818
    """The daemon did not understand a request, or the client its answer: their versions differ."""

    exit_code = 76


class ProtocolError(VswapError):
    """The other end does not speak this protocol, or not correctly. The connection is closed."""

    exit_code = 76


class ConnectionLost(VswapError, ConnectionError):  # noqa: N818
    """The connection is closed, and with it the space: its slots are gone."""

    exit_code = 69


class NoDaemon(ConnectionLost):
    """No daemon answers at any of the places where one could be."""


class TimedOut(ConnectionLost, TimeoutError):  # noqa: N818
    """The daemon was silent for longer than `timeout`; the connection was closed."""

    exit_code = 75


class ConnectionRefused(ConnectionLost):
    """The daemon has as many connections as it takes."""


class Stopping(ConnectionLost):
    """The daemon is shutting down."""


class SpaceLost(ConnectionLost):
    """The space is not there, or another client has had it since.

    The daemon has died, or was restarted, and nobody has kept its memory; or nobody came in time.
    """


class SpaceBusy(ConnectionLost):
    """The space is another client's, or connection's, at the moment."""


class Broken(ConnectionLost):
    """A connection has ended without a word: the daemon, or one of its processes, has died."""


class DaemonFailed(ConnectionLost):
    """A mistake in the daemon ended the connection."""


ERROR_OF_STATUS: Final[dict[Status, tuple[type[VswapError], str]]] = {
    Status.BAD_FRAME: (ProtocolError, "this client sent a broken frame"),
    Status.BAD_VERSION: (ProtocolError, "install a client of the daemon's version"),
    Status.UNKNOWN_OP: (NotUnderstood, "the daemon is older than this client: upgrade it"),
    Status.FRAME_TOO_LARGE: (ProtocolError, "this client broke the daemon's limits"),
    Status.BAD_LENGTH: (NotUnderstood, "this client sent a body of the wrong length"),
    Status.BAD_SLOT: (BadSlot, "use slots of this space that were not freed"),
    Status.DUPLICATE_SLOT: (DuplicateSlot, "name every slot once"),
    Status.UNBACKED: (Unbacked, "their last store was rejected: store them again first"),
    Status.BATCH_TOO_LARGE: (TooLarge, "send fewer pages at once"),
    Status.NOT_ALLOWED: (NotAllowed, "run it as root or as the daemon's user"),
    Status.BAD_ARGUMENT: (BadArgument, ""),
    Status.HELLO_FIRST: (ProtocolError, "this client began without HELLO"),
    Status.NO_SPACE: (NoSpace, "use vswap.connect() for pages"),
    Status.SPACE_LOST: (SpaceLost, "its slots are gone: connect again and store anew"),
    Status.SPACE_BUSY: (SpaceBusy, "end the other client, or take another name"),
    Status.PAGE_LOST: (PageLost, "free them; the other slots can still be loaded"),
    Status.INTERNAL: (DaemonFailed, "the daemon's journal has the cause"),
    Status.TOO_MANY_CONNECTIONS: (
        ConnectionRefused,
        "close other connections, or raise server.max_connections or server.max_user_connections",
    ),
    Status.STOPPING: (Stopping, "connect again when it is back"),
    Status.TIMED_OUT: (TimedOut, "a frame must be sent without pauses (server.request_timeout)"),
    Status.NO_SLOTS: (NoSlots, "free some slots or raise table.max_slots"),
    Status.OUT_OF_SERVICE: (OutOfService, ""),
}
"""What each failing status becomes, and what its reader can do about it. OK is no error, and
REJECTED carries a reason (REMEDY_OF_REASON)."""

REMEDY_OF_REASON: Final[dict[Reason, str]] = {
    Reason.POOL_FULL: "raise pool.max or attach a swap device",
    Reason.DEVICE_FULL: "attach another swap device or free pages",
    Reason.NO_DEVICE: "attach a swap device, or let the pool take pages of this group",
    Reason.GROUP_LIMIT: "free pages or raise the group's limits",
    Reason.WRITEBACK_DISABLED: "raise pool.max or allow writeback for the group",
    Reason.WRITE_BUDGET: "raise shrinker.write_budget or wait for tomorrow's",
    Reason.DISABLED: "set store.enabled to true",
}


def error_for(status: int, text: str, slots: U64 = NO_SLOTS, *, flags: int = 0) -> VswapError:
    """The error that a reply of `status` stands for.

    Args:
        status: Any number that is not OK.
        text: What the daemon said.
        slots: What the reply listed, or for REJECTED what was to be overwritten.
        flags: The reply's flags; for REJECTED the reason's code.
    """
    if status == Status.REJECTED:
        return _rejected(flags, text, slots)
    try:
        known = Status(status)
        kind, remedy = ERROR_OF_STATUS[known]
    except (ValueError, KeyError):
        return NotUnderstood(f"the daemon answered with the unknown status {status:#x}: {text}")
    said = text or known.name.lower().replace("_", " ")
    return kind(f"{said} ({remedy})" if remedy else said, slots, status=known)


def _rejected(code: int, text: str, slots: U64) -> VswapError:
    try:
        reason = Reason(code)
    except ValueError:
        # A newer daemon may have more reasons; the refusal is as certain as with a known one.
        return Rejected(f"pages were not taken: {text or code}", f"reason_{code}", slots)
    remedy = REMEDY_OF_REASON[reason]
    said = f": {text}" if text and text != reason.word else ""
    return Rejected(f"pages were not taken, {reason.word}{said} ({remedy})", reason.word, slots)


def merge(first: VswapError, second: VswapError) -> VswapError:
    """Two failures of one call, of different frames of it, as one.

    An error that ends the connection goes before one that does not; then those that have changed
    slots, or may have, since every one of them has to be named: a deadly request, of whose slots
    least is known, before a rejection. What is not said by the error that is left stands in its
    notes.
    """
    if _rank(second) > _rank(first):
        first, second = second, first
    deadly = isinstance(first, DeadlyRequest) and isinstance(second, Rejected)
    if deadly or type(first) is type(second):
        first.slots = np.concatenate([first.slots, second.slots])
        if getattr(first, "reason", None) == getattr(second, "reason", None):
            return first
    note = f"other pages of the call: {second}"
    if note not in getattr(first, "__notes__", ()):
        first.add_note(note)
    return first


def _rank(error: VswapError) -> int:
    if isinstance(error, ConnectionLost | ProtocolError):
        return 3
    if isinstance(error, DeadlyRequest):
        return 2
    return 1 if isinstance(error, Rejected) else 0
