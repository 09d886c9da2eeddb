"""Writeback of several whole segments at once: runs of extents, and what one bad extent does."""

from __future__ import annotations

import re

import numpy as np
import pytest

from support.engine import MIB, Rig, UnkindDevice, ids, make_engine, page
from support.interleaving import start
from vswapd.swap_table import Tag
from vswapd.writeback import Cause
from vswapd_backends.base import PAUSE, run
from vswapd_blockdev.device import EXTENT_BYTES, RUN_EXTENTS, WriteError


class _Recording(UnkindDevice):
    """Fails every write that touches one of `bad`, and notes what was written."""

    def __init__(self, extents: int, bad: set[int] | None = None) -> None:
        super().__init__(extents, "recording")
        self.bad = bad or set()
        self.spans: list[tuple[int, int]] = []

    def write(self, extent: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        count = max(1, len(data) // EXTENT_BYTES)
        self.spans.append((extent, count))
        if self.bad & set(range(extent, extent + count)):
            raise WriteError(self.path, "told to fail")
        super().write(extent, offset, data)


def filled(device: _Recording, folios: int = 40) -> tuple[Rig, dict[int, bytes]]:
    """An engine with some full segments, and what it holds."""
    rig = make_engine(64 * MIB)
    rig.devices.append(device)
    rig.engine.swapon(device, 0)
    space = rig.space()
    held: dict[int, bytes] = {}
    for number in range(folios):
        pages = [page("mixed", number * 32 + i) for i in range(32)]
        held.update(zip(rig.put(space, pages).tolist(), pages, strict=True))
    return rig, held


def test_neighbouring_extents_are_written_at_once() -> None:
    """Full segments go to neighbouring extents in writes of RUN_EXTENTS of them."""
    device = _Recording(64)
    rig, held = filled(device)
    written = rig.writeback(8 * EXTENT_BYTES)
    assert written.bytes == 8 * EXTENT_BYTES
    assert device.spans == [(0, RUN_EXTENTS), (RUN_EXTENTS, RUN_EXTENTS)]
    rig.check()
    space = next(iter(rig.engine.core.spaces.values()))
    assert rig.load(space, ids(*held)) == list(held.values())


@pytest.mark.parametrize("bad", [{0}, {2}, {3}, {4}, {1, 2}, {0, 1, 2, 3}, set(range(8))])
def test_one_bad_extent_does_not_take_its_neighbours_along(bad: set[int]) -> None:
    """Of a write that failed each extent is tried alone: the bad ones go out of use, no other."""
    device = _Recording(64, bad)
    rig, held = filled(device)
    written = rig.writeback(8 * EXTENT_BYTES)
    rig.check()
    entry = next(iter(rig.engine.core.devices))
    assert entry.map.bad == len(bad)
    assert entry.write_errors == len(bad)
    assert set(np.flatnonzero(entry.live_entries)).isdisjoint(bad)
    good = set(range(8)) - bad
    assert {int(extent) for extent in np.flatnonzero(entry.live_entries)} >= good
    assert written.bytes >= len(good) * EXTENT_BYTES
    space = next(iter(rig.engine.core.spaces.values()))
    assert rig.load(space, ids(*held)) == list(held.values())


def test_a_hole_among_the_free_extents_ends_a_run() -> None:
    """Extents that are no neighbours are written one by one, each where it belongs."""
    device = _Recording(64)
    rig, held = filled(device, 60)
    rig.writeback(6 * EXTENT_BYTES)
    entry = next(iter(rig.engine.core.devices))
    words = {slot: rig.tags(ids(slot))[0] for slot in held}
    gone = [slot for slot, tag in words.items() if tag is Tag.PHYS]
    space = next(iter(rig.engine.core.spaces.values()))
    # Free what lies in the extents 1 and 4: the next writes fill these holes first.
    from_extents = rig.engine.core.table.words[np.array(gone) & ((1 << 40) - 1)] >> np.uint64(35)
    doomed = [
        slot for slot, extent in zip(gone, from_extents.tolist(), strict=True) if extent in {1, 4}
    ]
    rig.free(space, ids(*doomed))
    for slot in doomed:
        del held[slot]
    rig.shrink()
    device.spans.clear()
    rig.writeback(4 * EXTENT_BYTES)
    assert device.spans == [(1, 1), (4, 1), (6, 2)]
    assert entry.live_entries[[1, 4, 6, 7]].all()
    rig.check()
    assert rig.load(space, ids(*held)) == list(held.values())


def test_no_image_carries_bytes_of_what_its_buffer_held_before() -> None:
    """Every byte of an extent belongs to an entry of it, the directory or the header, or is 0."""
    high = re.compile(rb"[\x80-\xff]{24}")  # what neither text nor its compressed form has
    rig = make_engine(8 * MIB)
    device = rig.swapon(64)
    space = rig.space()
    chooser = np.random.default_rng(1)
    secrets = [chooser.integers(128, 256, 4096, np.uint8).tobytes() for _ in range(63 * 4)]
    first = [rig.put(space, secrets[i : i + 21]) for i in range(0, len(secrets), 21)]
    rig.writeback()
    rig.set(pool_enabled=False)
    first.append(rig.put(space, secrets[:50]))
    assert high.search(device.data)
    rig.free(space, np.concatenate(first))
    rig.shrink()
    device.data[:] = bytes(len(device.data))
    # Others' folios through the same buffers: small ones, so that most of each image is room.
    rig.put(space, [page("text", 100 + i) for i in range(5)])
    rig.put(space, [page("text", 200 + i) for i in range(5)])
    rig.set(pool_enabled=True)
    rig.put(space, [page("text", i) for i in range(21)])
    rig.writeback()
    assert any(device.data)
    assert not high.search(device.data)


@pytest.mark.parametrize("when", ["images are made", "they are written"])
def test_whole_segments_spend_the_write_budget_once(when: str) -> None:
    """Overlapping operations cannot spend more than the budget together."""
    device = _Recording(64)
    rig, _ = filled(device)
    rig.set(write_budget=5 * EXTENT_BYTES)
    one = start(rig.engine._writeback.write_some(Cause.WRITEBACK))
    if when == "images are made":
        assert one.advance() is PAUSE
    else:
        one.until_io()
        one.perform()
    run(rig.engine._writeback.write_some(Cause.WRITEBACK))
    one.finish()
    assert device.spans
    assert sum(count for _, count in device.spans) <= 5
    rig.check()
