"""The wrapper that holds devices and their users to the contract."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from vswapd_blockdev.checked import CheckedDevice
from vswapd_blockdev.device import (
    BLOCK_BYTES,
    EXTENT_BYTES,
    RUN_EXTENTS,
    ReadError,
    WriteError,
)
from vswapd_blockdev.faulty import FaultyDevice
from vswapd_blockdev.memory import MemoryDevice

BLOCK = bytes(BLOCK_BYTES)


@pytest.mark.parametrize(
    "call",
    [
        lambda d: d.read(2, 0, BLOCK_BYTES),
        lambda d: d.read(-1, 0, BLOCK_BYTES),
        lambda d: d.read(0, 1, BLOCK_BYTES),
        lambda d: d.read(0, -BLOCK_BYTES, BLOCK_BYTES),
        lambda d: d.read(0, 0, BLOCK_BYTES - 1),
        lambda d: d.read(0, 0, 0),
        lambda d: d.read(0, BLOCK_BYTES, EXTENT_BYTES),
        lambda d: d.write(2, 0, BLOCK),
        lambda d: d.write(0, 512, BLOCK),
        lambda d: d.write(0, 0, BLOCK[1:]),
        lambda d: d.write(0, 0, b""),
        lambda d: d.write(0, BLOCK_BYTES, bytes(EXTENT_BYTES)),
        lambda d: d.write(0, 0, memoryview(bytes(2 * BLOCK_BYTES))[::2]),
        lambda d: d.discard(2),
        lambda d: d.discard(0, 0),
        lambda d: d.discard(1, 2),
    ],
)
def test_wrong_calls(call: Callable[[CheckedDevice], object]) -> None:
    """A call that is not aligned, out of bounds or empty is stopped before the device sees it."""
    below = FaultyDevice(MemoryDevice(2))
    with pytest.raises(AssertionError):
        call(CheckedDevice(below))
    assert below.operations == []


class _Wrong(MemoryDevice):
    """A device that does not keep the contract."""

    def __init__(self, does: Callable[[], object]) -> None:
        super().__init__(2)
        self.does = does

    def read(self, extent: int, offset: int, length: int) -> memoryview:
        result = self.does()
        assert isinstance(result, memoryview)
        return result

    def write(self, extent: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.does()

    def discard(self, extent: int, count: int = 1) -> None:
        self.does()


@pytest.mark.parametrize(
    "result",
    [
        memoryview(bytes(BLOCK_BYTES - 1)),
        memoryview(bytes(2 * BLOCK_BYTES)),
        memoryview(bytes(2 * BLOCK_BYTES))[::2],
        memoryview(bytes(BLOCK_BYTES)).cast("Q"),
    ],
)
def test_wrong_results(result: memoryview) -> None:
    """A read that returns other than exactly the bytes asked for is found out."""
    with pytest.raises(AssertionError):
        CheckedDevice(_Wrong(lambda: result)).read(0, 0, BLOCK_BYTES)


def _raises(error: Exception) -> Callable[[], object]:
    def does() -> object:
        raise error

    return does


def test_wrong_errors() -> None:
    """Only errors of the right type, that name the device, come through."""
    for error in (OSError(5, "I/O error"), WriteError("memory", "x"), ReadError("other", "x")):
        with pytest.raises(AssertionError):
            CheckedDevice(_Wrong(_raises(error))).read(0, 0, BLOCK_BYTES)
    with pytest.raises(AssertionError):
        CheckedDevice(_Wrong(_raises(ReadError("memory", "x")))).write(0, 0, BLOCK)
    with pytest.raises(AssertionError):
        CheckedDevice(_Wrong(_raises(WriteError("memory", "x")))).discard(0)
    with pytest.raises(ReadError):
        CheckedDevice(_Wrong(_raises(ReadError("memory", "x")))).read(0, 0, BLOCK_BYTES)
    with pytest.raises(WriteError):
        CheckedDevice(_Wrong(_raises(WriteError("memory", "x")))).write(0, 0, BLOCK)


def test_runs_are_of_whole_extents() -> None:
    """A write goes on over the next extents only whole, from a beginning, and not too far."""
    device = CheckedDevice(MemoryDevice(RUN_EXTENTS + 2))
    device.write(2, 0, bytes(RUN_EXTENTS * EXTENT_BYTES))
    for extent, offset, length in (
        (0, 0, EXTENT_BYTES + BLOCK_BYTES),
        (0, BLOCK_BYTES, 2 * EXTENT_BYTES),
        (0, 0, (RUN_EXTENTS + 1) * EXTENT_BYTES),
        (RUN_EXTENTS + 1, 0, 2 * EXTENT_BYTES),
    ):
        with pytest.raises(AssertionError):
            device.write(extent, offset, bytes(length))


def test_closed() -> None:
    """No call may follow `close`, but for another `close`."""
    device = CheckedDevice(MemoryDevice(2))
    device.close()
    device.close()
    for call in (
        lambda: device.read(0, 0, BLOCK_BYTES),
        lambda: device.write(0, 0, BLOCK),
        lambda: device.discard(0),
    ):
        with pytest.raises(AssertionError):
            call()


def test_closed_under_a_call() -> None:
    """A device must not be closed while somebody reads from it; afterwards it may."""
    below = FaultyDevice(MemoryDevice(2))
    device = CheckedDevice(below)
    below.gate.clear()
    reader = threading.Thread(target=device.read, args=(0, 0, BLOCK_BYTES))
    reader.start()
    assert below.arrived.acquire(timeout=60)
    with pytest.raises(AssertionError):
        device.close()
    below.gate.set()
    reader.join()
    device.close()


def test_looks_like_the_device_below() -> None:
    """Properties are those of the device below."""
    device = CheckedDevice(MemoryDevice(2, path="name"))
    assert (device.path, device.extents, device.direct, device.encrypted) == (
        "name",
        2,
        False,
        False,
    )
