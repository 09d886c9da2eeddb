"""Encryption of what lies on a device."""

from __future__ import annotations

import itertools
import os
import random
import zlib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import XTS
from hypothesis import given
from hypothesis import strategies as st

from vswapd_blockdev.checked import CheckedDevice
from vswapd_blockdev.device import BLOCK_BYTES, EXTENT_BYTES, ReadError, WriteError
from vswapd_blockdev.faulty import Faults, FaultyDevice
from vswapd_blockdev.header import DATA_OFFSET
from vswapd_blockdev.memory import MemoryDevice
from vswapd_blockdev.sealed import KEY_BYTES, SealedDevice, run_mask
from vswapd_blockdev.swapfile import SwapFile

BLOCKS = EXTENT_BYTES // BLOCK_BYTES
KEY = random.Random(5).randbytes(KEY_BYTES)


def _doubled(mask: int) -> int:
    """One multiplication by x, as IEEE 1619 writes it down."""
    return (mask << 1) ^ (0x87 | 1 << 128 if mask >> 127 else 0)


@given(mask=st.integers(0, 2**128 - 1), block=st.integers(0, BLOCKS - 1))
def test_mask_of_a_run(mask: int, block: int) -> None:
    """The mask of a later block is that of the first, doubled once per 16 bytes between them."""
    expected = mask
    for _ in range(256 * block):
        expected = _doubled(expected)
    assert run_mask(mask, block) == expected


@pytest.mark.parametrize("extent", [0, 1, 300])
def test_is_standard_xts(extent: int) -> None:
    """An extent, however it was cut when written, is one XTS data unit with its number as tweak."""
    data = random.Random(extent).randbytes(EXTENT_BYTES)
    xts = Cipher(AES(KEY), XTS(extent.to_bytes(16, "little")))
    for cuts in ([0, 64], [0, 1, 2, 3, 64], [0, 17, 40, 63, 64]):
        below = MemoryDevice(301)
        sealed = CheckedDevice(SealedDevice(below, KEY))
        for first, last in itertools.pairwise(cuts):
            begin, end = first * BLOCK_BYTES, last * BLOCK_BYTES
            sealed.write(extent, begin, data[begin:end])
        assert below.read(extent, 0, EXTENT_BYTES) == xts.encryptor().update(data)


@given(first=st.integers(0, BLOCKS - 1), data=st.data())
def test_any_run_is_readable_alone(first: int, data: st.DataObject) -> None:
    """Any run of blocks of an extent is decrypted without the rest of it."""
    count = data.draw(st.integers(1, BLOCKS - first))
    plain = random.Random(first).randbytes(EXTENT_BYTES)
    sealed = CheckedDevice(SealedDevice(MemoryDevice(1), KEY))
    sealed.write(0, 0, plain)
    begin, end = first * BLOCK_BYTES, (first + count) * BLOCK_BYTES
    assert sealed.read(0, begin, end - begin) == plain[begin:end]


def test_no_plaintext_on_the_device(tmp_path: Path) -> None:
    """No byte sequence of a page, and nothing that looks like one, can be found in the file."""
    path = tmp_path / "swap"
    secret = b"the launch code is 0000; "
    page = (secret * 200)[:BLOCK_BYTES]
    device = SealedDevice(SwapFile.open(str(path), size=2 << 20, encrypted=True), KEY)
    device.write(0, 0, page * BLOCKS)
    device.write(1, 0, page)
    device.write(1, 9 * BLOCK_BYTES, page * 3)
    device.write(2, 0, bytes(EXTENT_BYTES))
    assert device.read(1, 10 * BLOCK_BYTES, BLOCK_BYTES) == page
    device.close()
    raw = path.read_bytes()
    for start in range(len(secret)):
        assert (secret * 2)[start : start + 8] not in raw
    assert KEY[:32] not in raw
    assert KEY[32:] not in raw
    for extent in (0, 2):
        begin = DATA_OFFSET + extent * EXTENT_BYTES
        found = raw[begin : begin + EXTENT_BYTES]
        assert len(zlib.compress(found)) > EXTENT_BYTES
        pieces = {found[i : i + 16] for i in range(0, EXTENT_BYTES, 16)}
        assert len(pieces) == EXTENT_BYTES // 16


def test_equal_blocks_look_unrelated() -> None:
    """The same block in two places, or sealed by two devices, gives different bytes."""
    block = bytes(BLOCK_BYTES)
    seen = set()
    for key in (KEY, KEY[::-1]):
        below = MemoryDevice(3)
        sealed = SealedDevice(below, key)
        for extent, offset in ((0, 0), (0, BLOCK_BYTES), (1, 0), (2, 5 * BLOCK_BYTES)):
            sealed.write(extent, offset, block)
            seen.add(bytes(below.read(extent, offset, BLOCK_BYTES)))
    assert len(seen) == 8


def test_key_is_new_and_nowhere_to_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each device takes its own key from the system, and shows it in no repr."""
    asked: list[bytes] = []
    real = os.urandom

    def urandom(length: int) -> bytes:
        asked.append(real(length))
        return asked[-1]

    monkeypatch.setattr(os, "urandom", urandom)
    below = MemoryDevice(1)
    first = SealedDevice(below)
    first.write(0, 0, bytes(EXTENT_BYTES))
    second = SealedDevice(below)
    assert [len(key) for key in asked] == [KEY_BYTES, KEY_BYTES]
    assert asked[0] != asked[1]
    assert second.read(0, 0, EXTENT_BYTES) != bytes(EXTENT_BYTES)
    for text in (repr(first), str(first), repr(first._key)):
        assert asked[0].hex()[:16] not in text
        assert repr(asked[0])[2:-1] not in text


def test_errors_pass_through() -> None:
    """An error of the device below comes as it is, and only the blocks of that write are lost."""
    faulty = FaultyDevice(MemoryDevice(2), Faults(tear=True))
    sealed = CheckedDevice(SealedDevice(faulty))
    plain = random.Random(1).randbytes(EXTENT_BYTES)
    sealed.write(0, 0, plain)
    faulty.faults.bad_writes = {0}
    with pytest.raises(WriteError):
        sealed.write(0, 2 * BLOCK_BYTES, bytes(4 * BLOCK_BYTES))
    assert sealed.read(0, 0, 2 * BLOCK_BYTES) == plain[: 2 * BLOCK_BYTES]
    rest = EXTENT_BYTES - 6 * BLOCK_BYTES
    assert sealed.read(0, 6 * BLOCK_BYTES, rest) == plain[-rest:]
    faulty.faults.bad_reads = {0}
    with pytest.raises(ReadError):
        sealed.read(0, 0, BLOCK_BYTES)


def test_takes_after_the_device_below(tmp_path: Path) -> None:
    """Path, size and directness are those of the device below; it is encrypted, that one is not."""
    below = SwapFile.open(str(tmp_path / "swap"), size=2 << 20)
    sealed = SealedDevice(below)
    assert (sealed.path, sealed.extents, sealed.direct) == (
        below.path,
        below.extents,
        below.direct,
    )
    assert sealed.encrypted
    assert not below.encrypted
    sealed.close()


def test_discard_reaches_the_device_below() -> None:
    """A discard goes through with its count."""
    faulty = FaultyDevice(MemoryDevice(4))
    SealedDevice(faulty).discard(1, 2)
    assert faulty.operations == [("discard", 1, 0, 2)]
