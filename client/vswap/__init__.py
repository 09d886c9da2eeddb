"""Hand pages to vswapd over a Unix socket and get slots back.

    with vswap.connect() as space:
        slots = space.store(pages)     # n*4096 bytes -> n slots
        data = space.load(slots)
        space.free(slots)

`vswap.aio` is the same for asyncio, `vswap.control` steers a daemon; both are imported only when
they are asked for. Nothing here imports the daemon.
"""

from vswap.errors import (
    BadArgument,
    BadBuffer,
    BadSlot,
    Broken,
    ConnectionLost,
    ConnectionRefused,
    DaemonFailed,
    DeadlyRequest,
    DuplicateSlot,
    HandleFreed,
    NoDaemon,
    NoSlots,
    NoSpace,
    NotAllowed,
    NotUnderstood,
    OutOfService,
    PageLost,
    ProtocolError,
    Rejected,
    SpaceBusy,
    SpaceLost,
    Stopping,
    TimedOut,
    TooLarge,
    Unbacked,
    VswapError,
)
from vswap.protocol import PAGE_BYTES
from vswap.space import Handle, Space, connect

__all__ = [
    "PAGE_BYTES",
    "BadArgument",
    "BadBuffer",
    "BadSlot",
    "Broken",
    "ConnectionLost",
    "ConnectionRefused",
    "DaemonFailed",
    "DeadlyRequest",
    "DuplicateSlot",
    "Handle",
    "HandleFreed",
    "NoDaemon",
    "NoSlots",
    "NoSpace",
    "NotAllowed",
    "NotUnderstood",
    "OutOfService",
    "PageLost",
    "ProtocolError",
    "Rejected",
    "Space",
    "SpaceBusy",
    "SpaceLost",
    "Stopping",
    "TimedOut",
    "TooLarge",
    "Unbacked",
    "VswapError",
    "connect",
]
