"""What nobody had asked for while it was wrong: policies that one group's pages could bring to a
halt, limits that overlapping work could pass, work that nobody was woken for.

Each test failed once.
"""

from __future__ import annotations

import numpy as np

from support.engine import MIB, Rig, ids, make_engine, pages_of
from vswapd.groups import Space
from vswapd.swap_table import Tag, places_of, tags_of
from vswapd_backends.base import SEGMENT_BYTES, U64


def fill(rig: Rig, space: Space, kind: str, count: int, first: int = 0) -> U64:
    """Store different pages in folios that fit a segment each; returns their slots."""
    folios = [
        rig.put(space, pages_of(kind, min(62, count - done), first + done))
        for done in range(0, count, 62)
    ]
    return np.concatenate(folios)


# Compaction and merging: one group's leftovers do not keep another's waste where it is


def test_a_small_sparse_segment_does_not_keep_others_from_being_compacted() -> None:
    """What cannot be packed any better in one group is no reason to leave the others' waste."""
    rig = make_engine(32 * MIB)
    small, large = rig.space("1"), rig.space("2")
    few = fill(rig, small, "noise", 124)
    rig.free(small, few[5:62])
    rig.shrink()
    rig.free(small, few[1:5])
    many = fill(rig, large, "noise", 62 * 40, 1000)
    rig.free(large, many[np.arange(len(many)) % 3 != 0])
    rig.settle()
    pool = rig.engine.snapshot().pool
    assert pool.bytes < 1.25 * pool.live_bytes + 2 * SEGMENT_BYTES
    rig.check()


def test_a_lonely_sparse_extent_does_not_keep_others_from_being_merged() -> None:
    """The emptiest extent may have no partner of its own group; others have."""
    rig = make_engine(32 * MIB, devices=[16])
    lonely, others = rig.space("1"), rig.space("2")
    one = fill(rig, lonely, "noise", 62)
    rig.writeback()
    rig.free(lonely, one[1:])
    many = fill(rig, others, "noise", 62 * 14, 1000)
    rig.writeback()
    words = rig.words(many)
    extents = places_of(words).number
    on_device = tags_of(words) == Tag.PHYS
    kept = {int(slot) for e in set(extents[on_device]) for slot in many[extents == e][:4]}
    rig.free(others, ids(*(int(s) for s in many[on_device] if int(s) not in kept)))
    device = rig.device_of(rig.devices[0])
    assert device.map.free == 1
    rig.settle()
    assert device.map.free > 2
    assert rig.verify().ok
