"""The first block of a swap device: whose it is, and how it is cut. No I/O.

    0        4         8          12        16         24         40        44
    | magic  | version | extent   | flags   | extents  | boot id  | check   | zeros to 4096

All little-endian; `extent` is EXTENT_BYTES, `check` the CRC-32 of what stands before it. Behind the
block, up to DATA_OFFSET, there are zeros: whoever finds something else there has found a device
that somebody else has used since.

The header tells an abandoned swap device of ours from somebody's data: swapon uses the former again
and refuses the latter. Without the daemon that wrote it, or its heir, nothing on a device can be
read (the key is gone, and so is the table): the boot id says whose run it was.

This module must not know files.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Final

from vswapd_blockdev.device import BLOCK_BYTES, EXTENT_BYTES

MAGIC: Final = b"VSWD"
VERSION: Final = 1
DATA_OFFSET: Final = EXTENT_BYTES
"""Where extent 0 begins: one extent further than the header, so that extents are aligned to their
own size, as flash likes it."""
MIN_EXTENTS: Final = 4
"""One that moves live entries together, and some to be worth it."""
MIN_BYTES: Final = DATA_OFFSET + MIN_EXTENTS * EXTENT_BYTES
BOOT_ID_BYTES: Final = 16

_LAYOUT: Final = struct.Struct("<4sIIIQ16s")
_CHECK: Final = struct.Struct("<I")
_ENCRYPTED: Final = 1


class HeaderError(Exception):
    """These bytes are no header that this version can use; the text says why."""


class ForeignHeaderError(HeaderError):
    """Not the first block of a swap device of ours at all."""


class VersionError(HeaderError):
    """A swap device of ours, of another version or with other extents."""


class DamagedHeaderError(HeaderError):
    """A swap device of ours whose first block was changed since."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceHeader:
    """What the first block says."""

    extents: int
    boot_id: bytes
    """BOOT_ID_BYTES that name the daemon's run that wrote it."""
    encrypted: bool

    @property
    def size_bytes(self) -> int:
        """Bytes that such a device needs."""
        return DATA_OFFSET + self.extents * EXTENT_BYTES


def pack_header(header: DeviceHeader) -> bytes:
    """One block."""
    assert len(header.boot_id) == BOOT_ID_BYTES
    assert header.extents >= MIN_EXTENTS
    flags = _ENCRYPTED if header.encrypted else 0
    body = _LAYOUT.pack(MAGIC, VERSION, EXTENT_BYTES, flags, header.extents, header.boot_id)
    return (body + _CHECK.pack(zlib.crc32(body))).ljust(BLOCK_BYTES, b"\0")


def parse_header(block: bytes | memoryview) -> DeviceHeader:
    """The header in a device's first block.

    Raises:
        ForeignHeaderError: too short, or another magic.
        VersionError: another version or extent size.
        DamagedHeaderError: the check does not agree, or there is something behind it.
    """
    if len(block) < BLOCK_BYTES or bytes(block[: len(MAGIC)]) != MAGIC:
        raise ForeignHeaderError("no vswapd swap device")
    _, version, extent, flags, extents, boot_id = _LAYOUT.unpack_from(block)
    if version != VERSION:
        raise VersionError(f"a vswapd swap device of version {version} instead of {VERSION}")
    end = _LAYOUT.size + _CHECK.size
    (check,) = _CHECK.unpack_from(block, _LAYOUT.size)
    if check != zlib.crc32(block[: _LAYOUT.size]) or any(block[end:BLOCK_BYTES]):
        raise DamagedHeaderError("a vswapd swap device whose header was changed")
    if extent != EXTENT_BYTES:
        raise VersionError(f"a vswapd swap device with extents of {extent} bytes")
    return DeviceHeader(extents=extents, boot_id=boot_id, encrypted=bool(flags & _ENCRYPTED))
