"""Kept memory of earlier versions, made into what this version knows.

All that is kept of a daemon is a life (see `keeping`), and the version of the life says which
version each kind of region has. A step makes a region of the next version out of one of a kind and
version; of a kind that has no step, what is kept is taken over as it is.

Invariants:
- What is converted is only read: whoever made it can go on with it, as long as nobody serves from
  what was made of it.
- A step knows both layouts by numbers of its own. What stands elsewhere in the code is the latest
  one, and changes.

This module must not know who keeps the memory, or under which names.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import numpy as np

from vswapd import ledger, memory
from vswapd_backends import shared_extents
from vswapd_backends.label import ForeignMemoryError, Label, make_region
from vswapd_backends.shared import SYSTEM_PAGE, SharedRegion

LIFE_VERSION: Final = 2
"""Of all that is kept together: it rises with the version of any kind."""
LIVES: Final[Mapping[int, Mapping[str, int]]] = MappingProxyType(
    {
        1: {"table": 2, "pool": 2, "state": 2, "ledger": 1, "extents": 1},
        LIFE_VERSION: {
            **memory.VERSIONS,
            "ledger": ledger.LAYOUT_VERSION,
            "extents": shared_extents.LAYOUT_VERSION,
        },
    }
)
"""The versions that each kind of region has, by the life's; those that can be gone on with."""
_AT_ONCE: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """When memory is converted."""

    clock: float
    """Seconds since the machine started."""
    wall: float
    """Seconds since 1970."""


Step = Callable[[int, Label, Moment], SharedRegion]
"""Makes a region out of the one that a descriptor is of, which has that label."""


def converted(fd: int, label: Label, latest: int, moment: Moment) -> int | None:
    """A descriptor of a region of the latest version, made out of an earlier one.

    Args:
        fd: of what is there; it stays the caller's, and what it is of as it is.
        label: what that says of itself.
        latest: the version that is wanted.
        moment: now.

    Returns:
        The descriptor, which is the caller's; None: it is of that version already.

    Raises:
        ForeignMemoryError: what is there does not fit together.
        OSError: there is no memory for it.
    """
    last: SharedRegion | None = None
    while label.version != latest:
        last = STEPS[label.kind, label.version](fd if last is None else last.fd, label, moment)
        label = replace(label, version=label.version + 1, size=last.size)
    return None if last is None else os.dup(last.fd)


def copied(fd: int, label: Label) -> SharedRegion:
    """A new region with the same bytes, and only those pages of it that the old one has.

    Args:
        fd: of the old one.
        label: the new one's; the size is that of the old one.
    """
    region = make_region(label)
    at = 0
    while at < label.size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break  # nothing comes after it
            raise
        end = min(label.size, os.lseek(fd, at, os.SEEK_HOLE))
        while at < end:
            at += os.pwrite(region.fd, os.pread(fd, min(_AT_ONCE, end - at), at), at)
    return region


# From one version to the next


def _state_3(fd: int, label: Label, moment: Moment) -> SharedRegion:
    """Version 3 of the state has ages by the clock that counts on from the machine's start.

    Version 2 had them by that clock and what the wall clock was ahead of it when the process began.
    That was not kept, so what it is now is taken; no age becomes more than the machine's, or less
    than none. The budget's day has its beginning beside it.
    """
    _, max_slots, segments = struct.unpack_from("<IQQ", label.details)
    spaces_at, clusters_at = _offset(0), _offset(2)
    stamps_at = clusters_at + _whole_pages((max_slots >> 9) * 8) + segments * 8
    region = copied(fd, replace(label, version=3))
    head = np.frombuffer(region.view, np.int64, 12)
    spaces, in_use = head.item(6), head.item(1)
    fits = stamps_at + segments * 8 <= region.size
    if not (fits and 0 <= spaces <= 1 << 16 and 0 <= in_use <= segments):
        raise ForeignMemoryError("state: what is kept does not fit together")
    ahead = moment.wall - moment.clock
    stamps = np.frombuffer(region.view, np.float64, in_use, stamps_at)
    records = np.frombuffer(region.view, np.float64, spaces * 128, spaces_at)
    for times in (stamps, records[4::128]):
        times[:] = np.clip(times - ahead, 0.0, moment.clock)
    head[11] = int(moment.clock * 1000)
    return region


def _offset(area: int) -> int:
    """Where spaces, answers (1) and clusters (2) begin in the state of versions 2 and 3."""
    fixed = (4096, 1 << 22, 1 << 13, 1 << 18, 1 << 21, 1 << 26, (1 << 16) * 4608 * 8)
    return sum(_whole_pages(size) for size in fixed[: 5 + area])


def _whole_pages(size: int) -> int:
    return -(-size // SYSTEM_PAGE) * SYSTEM_PAGE


STEPS: Final[Mapping[tuple[str, int], Step]] = MappingProxyType({("state", 2): _state_3})
"""What makes the next version, by kind and version."""
