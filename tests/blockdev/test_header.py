"""The first block of a swap device."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswapd_blockdev.device import BLOCK_BYTES, EXTENT_BYTES
from vswapd_blockdev.header import (
    DATA_OFFSET,
    DamagedHeaderError,
    DeviceHeader,
    ForeignHeaderError,
    HeaderError,
    VersionError,
    pack_header,
    parse_header,
)

HEADER = DeviceHeader(extents=100, boot_id=bytes(range(16)), encrypted=True)


def _block(version: int = 1, extent: int = EXTENT_BYTES) -> bytes:
    """A header as its module's opening lines draw it, packed without its code."""
    body = struct.pack("<4sIIIQ", b"VSWD", version, extent, 1, 100) + bytes(range(16))
    return (body + struct.pack("<I", zlib.crc32(body))).ljust(4096, b"\0")


@given(
    extents=st.integers(4, 2**64 - 1),
    boot_id=st.binary(min_size=16, max_size=16),
    encrypted=st.booleans(),
)
def test_comes_back(extents: int, boot_id: bytes, encrypted: bool) -> None:  # noqa: FBT001
    """What is packed into one block is what is parsed out of it."""
    header = DeviceHeader(extents=extents, boot_id=boot_id, encrypted=encrypted)
    block = pack_header(header)
    assert len(block) == BLOCK_BYTES
    assert parse_header(block) == header
    assert parse_header(memoryview(block)) == header


def test_layout() -> None:
    """The bytes are those that the module's picture shows."""
    assert pack_header(HEADER) == _block()
    assert HEADER.size_bytes == DATA_OFFSET + 100 * EXTENT_BYTES


@pytest.mark.parametrize("block", [b"", bytes(BLOCK_BYTES), b"\x7fELF" * 1024, _block()[:4095]])
def test_foreign(block: bytes) -> None:
    """Other bytes, or less than a block, are not ours."""
    with pytest.raises(ForeignHeaderError):
        parse_header(block)


def test_other_versions() -> None:
    """Another version and another extent size are ours, but not for this version to use."""
    with pytest.raises(VersionError, match="version 2"):
        parse_header(_block(version=2))
    with pytest.raises(VersionError, match="65536"):
        parse_header(_block(extent=65536))


@given(place=st.integers(0, BLOCK_BYTES - 1), flip=st.integers(1, 255))
def test_any_changed_byte_shows(place: int, flip: int) -> None:
    """No byte of the block can change without the header being refused."""
    block = bytearray(pack_header(HEADER))
    block[place] ^= flip
    with pytest.raises(HeaderError):
        parse_header(bytes(block))


def test_damage_is_told_from_foreign_data() -> None:
    """A header that was changed behind its magic is said to be damaged."""
    block = bytearray(pack_header(HEADER))
    block[20] ^= 1
    with pytest.raises(DamagedHeaderError):
        parse_header(bytes(block))
