"""What memory that outlives its process says of itself, in the last page of its file.

    | magic | version | kind | life | size | details | check |

Memory that is handed from one process to the next is looked at before it is mapped: it must be of
the kind that is wanted, of a layout version that is known, and of the size that it was made with.

Invariants:
- Nothing is changed by looking.
- A label that is changed later (`relabel`) is changed whole, whenever the process is killed.
- The version is judged before all that follows it: that may mean something else in another one.

This module must not know what any kind of memory holds.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from vswapd_backends.shared import SYSTEM_PAGE, SharedRegion, read_label

_MAGIC: Final = b"VSWAPMEM"
_LABEL: Final = struct.Struct("<8sI16s16sQ32s")
_CHECK: Final = struct.Struct("<I")
LIFE_BYTES: Final = 16
DETAILS_BYTES: Final = 32


class ForeignMemoryError(Exception):
    """Memory that this version cannot take over. It was left alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """What a region's file says."""

    kind: str
    """At most 16 bytes."""
    version: int
    """Of the layout of what it holds."""
    life: bytes
    """LIFE_BYTES that all memory of one whole has in common, and no other."""
    size: int
    """Bytes without the label."""
    details: bytes = b""
    """Whatever else is fixed from the beginning, at most DETAILS_BYTES."""

    def pack(self) -> bytes:
        """As it stands in the file."""
        assert len(self.life) == LIFE_BYTES
        body = _LABEL.pack(
            _MAGIC, self.version, self.kind.encode(), self.life, self.size, self.details
        )
        return body + _CHECK.pack(zlib.crc32(body))


def make_region(label: Label) -> SharedRegion:
    """New memory of that label."""
    return SharedRegion(f"vswapd-{label.kind}", label.size, label=label.pack())


def adopt_region(label: Label, fd: int) -> SharedRegion:
    """Take over memory whose label was found on it; the descriptor is owned from now on."""
    return SharedRegion(f"vswapd-{label.kind}", label.size, fd=fd, label=label.pack())


def relabel(label: Label, fd: int) -> None:
    """Say from now on something else of a file that has a label; the size is the same."""
    # One write within one page: no signal ends it in the middle.
    os.pwrite(fd, label.pack(), label.size)


def find_label(kind: str, version: int, fd: int, *, older: Collection[int] = ()) -> Label:
    """What a descriptor's file says of itself.

    Args:
        kind: what it should be.
        version: the layout version that is known.
        fd: stays the caller's.
        older: earlier ones that are known, too: to be converted.

    Raises:
        ForeignMemoryError: it is something else, or of another version; the text says which.
    """
    try:
        page = read_label(fd)
        size = os.fstat(fd).st_size - SYSTEM_PAGE
    except OSError as error:
        raise ForeignMemoryError(f"{kind}: cannot be read: {error.strerror}") from None
    if len(page) < _LABEL.size + _CHECK.size or not page.startswith(_MAGIC):
        raise ForeignMemoryError(f"{kind}: this is no memory of a vswapd")
    _, found, said, life, stated, details = _LABEL.unpack_from(page)
    if found != version and found not in older:
        known = sorted({*older, version})
        versions = f"version{'s' * (len(known) > 1)} {' and '.join(map(str, known))}"
        raise ForeignMemoryError(
            f"{kind}: this is memory of layout version {found}, and this vswapd knows {versions} "
            f"only: it was left alone, with all pages. Install the vswapd again that made "
            "it, and restart the service, to have them; or stop the service for good (its pages "
            "are lost then) before this one is started"
        )
    (check,) = _CHECK.unpack_from(page, _LABEL.size)
    good = check == zlib.crc32(page[: _LABEL.size]) and stated == size
    if not good or said.rstrip(b"\0").decode("ascii", "replace") != kind:
        raise ForeignMemoryError(f"{kind}: this is memory of a vswapd, but not its {kind}")
    return Label(kind=kind, version=found, life=life, size=size, details=details)
