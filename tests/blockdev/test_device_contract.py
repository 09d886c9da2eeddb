"""What vswapd_blockdev.device promises, for each kind of device."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from vswapd_blockdev.checked import CheckedDevice
from vswapd_blockdev.device import BLOCK_BYTES, EXTENT_BYTES, RUN_EXTENTS, BlockDevice

BLOCKS = EXTENT_BYTES // BLOCK_BYTES


def blocks(count: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(count * BLOCK_BYTES)


def test_is_a_block_device(device: CheckedDevice) -> None:
    """A device has what the contract names, and six extents, as it was made with."""
    assert isinstance(device.device, BlockDevice)
    assert device.extents == 6
    assert device.path
    assert isinstance(device.direct, bool)
    assert isinstance(device.encrypted, bool)


@pytest.mark.parametrize(
    ("first", "count"), [(0, BLOCKS), (0, 1), (BLOCKS - 1, 1), (3, 5), (1, BLOCKS - 1), (33, 31)]
)
def test_reads_what_was_written(device: CheckedDevice, first: int, count: int) -> None:
    """Blocks come back as they were written, in the first extent and in the last."""
    for extent in (0, device.extents - 1):
        data = blocks(count, extent)
        device.write(extent, first * BLOCK_BYTES, data)
        assert device.read(extent, first * BLOCK_BYTES, len(data)) == data
    data = blocks(count, 0)
    assert device.read(0, first * BLOCK_BYTES, len(data)) == data


def test_any_run_can_be_read(device: CheckedDevice) -> None:
    """However an extent was written, any run of its blocks can be read."""
    whole = blocks(BLOCKS, 1)
    device.write(2, 0, whole)
    for first, count in ((0, 1), (7, 2), (8, 8), (62, 2), (63, 1), (5, 40)):
        begin, end = first * BLOCK_BYTES, (first + count) * BLOCK_BYTES
        assert device.read(2, begin, end - begin) == whole[begin:end]


def test_write_leaves_other_blocks_alone(device: CheckedDevice) -> None:
    """A write over a part of what was written whole changes that part, and nothing around it."""
    expected = [bytearray(blocks(BLOCKS, extent)) for extent in range(3)]
    for extent, data in enumerate(expected):
        device.write(extent, 0, bytes(data))
    new = blocks(3, 9)
    device.write(1, 10 * BLOCK_BYTES, new)
    expected[1][10 * BLOCK_BYTES : 13 * BLOCK_BYTES] = new
    for extent, data in enumerate(expected):
        assert device.read(extent, 0, EXTENT_BYTES) == data


@pytest.mark.parametrize("count", range(2, RUN_EXTENTS + 1))
def test_a_write_goes_on_over_neighbours(device: CheckedDevice, count: int) -> None:
    """Whole extents written at once read as if each had been by itself; those around stay."""
    for extent in range(device.extents):
        device.write(extent, 0, blocks(BLOCKS, extent))
    first = device.extents - count
    data = blocks(count * BLOCKS, 77)
    device.write(first, 0, data)
    for extent in range(first):
        assert device.read(extent, 0, EXTENT_BYTES) == blocks(BLOCKS, extent)
    for index in range(count):
        part = data[index * EXTENT_BYTES : (index + 1) * EXTENT_BYTES]
        assert device.read(first + index, 0, EXTENT_BYTES) == part
        assert device.read(first + index, BLOCK_BYTES, BLOCK_BYTES) == part[BLOCK_BYTES:][:4096]


def test_random_operations(device: CheckedDevice) -> None:
    """Any sequence of writes, reads and discards agrees with a plain dict of blocks."""
    chooser = random.Random(11)
    known: dict[tuple[int, int], bytes] = {}
    for step in range(300):
        extent = chooser.randrange(device.extents)
        first = chooser.randrange(BLOCKS)
        count = chooser.choice([1, 2, 7, BLOCKS])
        count = min(count, BLOCKS - first)
        if chooser.random() < 0.1:
            device.discard(extent)
            known = {place: data for place, data in known.items() if place[0] != extent}
        elif chooser.random() < 0.5:
            data = blocks(count, step)
            device.write(extent, first * BLOCK_BYTES, data)
            for i in range(count):
                piece = data[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES]
                known[extent, first + i] = piece
        else:
            found = device.read(extent, first * BLOCK_BYTES, count * BLOCK_BYTES)
            for i in range(count):
                if (extent, first + i) in known:
                    assert (
                        found[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES] == known[extent, first + i]
                    )


def test_write_keeps_nothing_of_its_buffer(device: CheckedDevice) -> None:
    """A buffer may be reused as soon as its write has returned."""
    buffer = bytearray(blocks(4, 1))
    device.write(0, 0, buffer)
    buffer[:] = bytes(len(buffer))
    assert device.read(0, 0, len(buffer)) == blocks(4, 1)


def test_read_gives_its_buffer_away(device: CheckedDevice) -> None:
    """What one read returned is not touched by later reads and writes."""
    device.write(0, 0, blocks(2, 1))
    device.write(1, 0, blocks(2, 2))
    first = device.read(0, 0, 2 * BLOCK_BYTES)
    second = device.read(1, 0, 2 * BLOCK_BYTES)
    device.write(0, 0, blocks(2, 3))
    assert first == blocks(2, 1)
    assert second == blocks(2, 2)


@pytest.mark.parametrize("shift", [0, 1, 512, 2048])
def test_buffers_need_not_be_aligned(device: CheckedDevice, shift: int) -> None:
    """Data may lie anywhere in memory, in any contiguous buffer of bytes."""
    room = bytearray(shift + EXTENT_BYTES)
    room[shift:] = blocks(BLOCKS, 4)
    device.write(3, 0, memoryview(room)[shift:])
    assert device.read(3, 0, EXTENT_BYTES) == blocks(BLOCKS, 4)
    device.write(3, BLOCK_BYTES, bytes(room[shift : shift + BLOCK_BYTES]))
    assert device.read(3, BLOCK_BYTES, BLOCK_BYTES) == blocks(BLOCKS, 4)[:BLOCK_BYTES]


def test_discard_hits_only_its_extents(device: CheckedDevice) -> None:
    """A discard of two extents leaves their neighbours, and both can be written again."""
    for extent in range(device.extents):
        device.write(extent, 0, blocks(BLOCKS, extent))
    device.discard(2, 2)
    device.read(2, 0, EXTENT_BYTES)
    for extent in (0, 1, 4, 5):
        assert device.read(extent, 0, EXTENT_BYTES) == blocks(BLOCKS, extent)
    for extent in (2, 3):
        device.write(extent, BLOCK_BYTES, blocks(2, extent))
        assert device.read(extent, BLOCK_BYTES, 2 * BLOCK_BYTES) == blocks(2, extent)


def test_threads_may_share_an_extent(device: CheckedDevice) -> None:
    """Writers and readers of different blocks of one extent do not get in each other's way."""
    device.write(0, 0, blocks(BLOCKS, 99))
    workers = 4
    share = BLOCKS // workers

    def work(number: int) -> None:
        for i in range(30):
            first = number * share + i % share
            data = blocks(1, number * 1000 + i)
            device.write(0, first * BLOCK_BYTES, data)
            assert device.read(0, first * BLOCK_BYTES, BLOCK_BYTES) == data

    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(work, number) for number in range(workers)]:
            done.result()
    for number in range(workers):
        for i in range(30 - share, 30):
            first = number * share + i % share
            found = device.read(0, first * BLOCK_BYTES, BLOCK_BYTES)
            assert found == blocks(1, number * 1000 + i)


def test_close_is_idempotent(device: CheckedDevice) -> None:
    """A device may be closed twice."""
    device.close()
    device.close()
