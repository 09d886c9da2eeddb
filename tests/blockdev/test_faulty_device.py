"""The wrapper that makes devices fail."""

from __future__ import annotations

import threading

import pytest

from vswapd_blockdev.checked import CheckedDevice
from vswapd_blockdev.device import BLOCK_BYTES, EXTENT_BYTES, ReadError, WriteError
from vswapd_blockdev.faulty import FLIPPED_BYTE, Faults, FaultyDevice, Kind
from vswapd_blockdev.memory import MemoryDevice

ONES = b"\x01" * EXTENT_BYTES
HALF = EXTENT_BYTES // 2


def _scenario(device: CheckedDevice) -> None:
    device.write(0, 0, ONES)
    device.read(0, 0, BLOCK_BYTES)
    device.discard(0)
    device.write(1, 0, ONES)
    device.read(1, 0, BLOCK_BYTES)


@pytest.mark.parametrize(
    ("counted", "fails"),
    [
        (("read", "write"), [WriteError, ReadError, WriteError, ReadError, None]),
        (("read",), [ReadError, ReadError, None]),
        (("write",), [WriteError, WriteError, None]),
        (("discard",), [None, None]),
        (("read", "write", "discard"), [WriteError, ReadError, None, WriteError, ReadError, None]),
    ],
)
def test_nth_operation(counted: tuple[Kind, ...], fails: list[type[Exception] | None]) -> None:
    """Exactly the Nth operation of the chosen kinds fails, and none when N is beyond the last."""
    for nth, expected in enumerate(fails, 1):
        faulty = FaultyDevice(MemoryDevice(2), Faults(fail_nth=nth, counted=counted))
        device = CheckedDevice(faulty)
        if expected is None:
            _scenario(device)
        else:
            with pytest.raises(expected):
                _scenario(device)
            assert faulty.counted == nth
            _scenario(device)


def test_all_from_the_nth() -> None:
    """`fail_from` makes that operation and all later ones fail."""
    device = CheckedDevice(FaultyDevice(MemoryDevice(2), Faults(fail_from=2)))
    device.write(0, 0, ONES)
    for _ in range(3):
        with pytest.raises(ReadError):
            device.read(0, 0, BLOCK_BYTES)
        with pytest.raises(WriteError):
            device.write(0, 0, ONES)


def test_failed_discard_is_left_out() -> None:
    """A discard that is to fail raises nothing and does nothing."""
    below = MemoryDevice(1)
    device = CheckedDevice(FaultyDevice(below, Faults(fail_nth=1, counted=("discard",))))
    device.write(0, 0, ONES)
    device.discard(0)
    assert below.data == ONES
    device.discard(0)
    assert below.data == bytes(EXTENT_BYTES)


def test_bad_extents() -> None:
    """Reads or writes of chosen extents fail, those of others do not."""
    faults = Faults(bad_reads={0}, bad_writes={1})
    device = CheckedDevice(FaultyDevice(MemoryDevice(2), faults))
    device.write(0, 0, ONES)
    with pytest.raises(ReadError):
        device.read(0, 0, BLOCK_BYTES)
    with pytest.raises(WriteError):
        device.write(1, 0, ONES)
    assert device.read(1, 0, BLOCK_BYTES) == bytes(BLOCK_BYTES)
    faults.bad_reads.clear()
    assert device.read(0, 0, BLOCK_BYTES) == ONES[:BLOCK_BYTES]


def test_flipped_bits() -> None:
    """One bit of each block read from a chosen extent is another; what is stored is not changed."""
    below = MemoryDevice(2)
    device = CheckedDevice(FaultyDevice(below, Faults(flip={0})))
    device.write(0, 0, ONES)
    device.write(1, 0, ONES)
    found = device.read(0, BLOCK_BYTES, 2 * BLOCK_BYTES)
    wrong = [i for i in range(len(found)) if found[i] != 1]
    assert wrong == [FLIPPED_BYTE, BLOCK_BYTES + FLIPPED_BYTE]
    assert device.read(1, 0, EXTENT_BYTES) == ONES
    assert below.data == ONES * 2


@pytest.mark.parametrize("tear", [False, True])
def test_failed_writes_tear(tear: bool) -> None:  # noqa: FBT001
    """With `tear`, a write that fails has written its first half; without, nothing."""
    below = MemoryDevice(1)
    device = CheckedDevice(FaultyDevice(below, Faults(fail_nth=1, tear=tear)))
    with pytest.raises(WriteError):
        device.write(0, 0, ONES)
    half = ONES[:HALF] if tear else bytes(HALF)
    assert below.data == half + bytes(HALF)


def test_torn_and_lost_writes_claim_success() -> None:
    """Torn writes write their first half, lost ones nothing; neither says so."""
    below = MemoryDevice(2)
    device = CheckedDevice(FaultyDevice(below, Faults(torn_writes={0}, lose_writes={1})))
    device.write(0, 0, ONES)
    device.write(1, 0, ONES)
    assert below.data == ONES[:HALF] + bytes(HALF + EXTENT_BYTES)


def test_gate() -> None:
    """An operation of a gated kind waits until the gate is opened; others pass."""
    faulty = FaultyDevice(MemoryDevice(2), Faults(gated=("write",)))
    device = CheckedDevice(faulty)
    faulty.gate.clear()
    writer = threading.Thread(target=device.write, args=(0, 0, ONES))
    writer.start()
    assert faulty.arrived.acquire(timeout=60)
    assert device.read(0, 0, BLOCK_BYTES) == bytes(BLOCK_BYTES)
    faulty.gate.set()
    writer.join()
    assert device.read(0, 0, BLOCK_BYTES) == ONES[:BLOCK_BYTES]
    assert not faulty.arrived.acquire(blocking=False)


def test_records_all() -> None:
    """Every operation is recorded as it came, those that failed too."""
    faulty = FaultyDevice(MemoryDevice(2), Faults(fail_nth=2))
    device = CheckedDevice(faulty)
    device.write(0, BLOCK_BYTES, ONES[: 2 * BLOCK_BYTES])
    with pytest.raises(ReadError):
        device.read(0, 0, BLOCK_BYTES)
    device.discard(0, 2)
    assert faulty.operations == [
        ("write", 0, BLOCK_BYTES, 2 * BLOCK_BYTES),
        ("read", 0, 0, BLOCK_BYTES),
        ("discard", 0, 0, 2),
    ]


def test_one_bad_extent_fails_a_run() -> None:
    """A write over several extents fails if one of them is bad; those before it are written."""
    faulty = FaultyDevice(MemoryDevice(4), Faults(bad_writes={2}))
    device = CheckedDevice(faulty)
    with pytest.raises(WriteError, match="extent 2"):
        device.write(1, 0, b"\1" * (3 * EXTENT_BYTES))
    assert device.read(1, 0, BLOCK_BYTES) == ONES[:BLOCK_BYTES]
    assert device.read(3, 0, BLOCK_BYTES) == bytes(BLOCK_BYTES)
    assert faulty.operations[0] == ("write", 1, 0, 3 * EXTENT_BYTES)
