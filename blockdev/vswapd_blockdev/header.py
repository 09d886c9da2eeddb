"""The first block of a swap device: whose it is, and how it is cut. No I/O.

    0        4         8          12        16         24         40        48
    | magic  | version | extent   | flags   | extents  | boot id  | check   | zeros to 4096

The header tells an abandoned swap file of ours from somebody's data: swapon overwrites the former
and refuses the latter. Nothing on a device outlives the daemon that wrote it (the key is gone, and
so is the table), so the rest of the header is for people who look at the file.

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
MIN_BYTES: Final = DATA_OFFSET + MIN_EXTENTS * EXTENT_BYTES

_LAYOUT: Final = struct.Struct("<4sIIIQ16s")
_CHECK: Final = struct.Struct("<I")
_ENCRYPTED: Final = 1


class HeaderError(Exception):
    """These bytes are no header of ours; the text says how that was noticed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceHeader:
    """What the first block says."""

    extents: int
    boot_id: bytes
    """16 bytes, of the daemon's run that wrote it."""
    encrypted: bool


def pack_header(header: DeviceHeader) -> bytes:
    """One block."""
    flags = _ENCRYPTED if header.encrypted else 0
    body = _LAYOUT.pack(MAGIC, VERSION, EXTENT_BYTES, flags, header.extents, header.boot_id)
    return (body + _CHECK.pack(zlib.crc32(body))).ljust(BLOCK_BYTES, b"\0")


def parse_header(block: bytes | memoryview) -> DeviceHeader:
    """The header in a device's first block.

    Raises:
        HeaderError: another magic, version or extent size, or a damaged header.
    """
    if len(block) < _LAYOUT.size + _CHECK.size:
        raise HeaderError("shorter than a header")
    magic, version, extent, flags, extents, boot_id = _LAYOUT.unpack_from(block)
    if magic != MAGIC:
        raise HeaderError("no vswapd swap device")
    if _CHECK.unpack_from(block, _LAYOUT.size)[0] != zlib.crc32(bytes(block[: _LAYOUT.size])):
        raise HeaderError("a damaged header of a vswapd swap device")
    if version != VERSION or extent != EXTENT_BYTES:
        raise HeaderError(f"a vswapd swap device of another version ({version})")
    return DeviceHeader(extents=extents, boot_id=boot_id, encrypted=bool(flags & _ENCRYPTED))
