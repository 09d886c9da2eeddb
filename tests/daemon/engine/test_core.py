"""The engine's state: words and accounts change together, and what is freed stays away."""

from __future__ import annotations

import pytest

from support.engine import MIB, make_engine, pages_of
from vswapd.errors import BadSlotError
from vswapd_backends.base import IoBatch, run


def test_table_pages_of_freed_clusters_stay_away_when_their_entries_are_walked() -> None:
    """Dead entries name slots whose page of table went back; looking them up does not bring it."""
    rig = make_engine(2 * MIB, devices=[8])
    space = rig.space()
    first = rig.put(space, pages_of("repeat", 512))
    rig.put(space, pages_of("repeat", 100, 1000))
    rig.free(space, first)
    assert rig.engine.snapshot().table_bytes == 4096
    rig.writeback()
    run(rig.engine.compact())
    rig.check()
    assert rig.engine.snapshot().table_bytes == 4096


def test_table_pages_of_freed_clusters_stay_away_after_a_load_that_waited() -> None:
    """A load that comes back from the device to freed slots leaves no page of table behind."""
    rig = make_engine(2 * MIB, devices=[8])
    space = rig.space()
    slots = rig.put(space, pages_of("text", 20))
    rig.writeback()
    load = rig.engine.load(space, slots)
    batch = next(load)
    assert isinstance(batch, IoBatch)
    rig.free(space, slots)
    batch.perform()
    with pytest.raises(StopIteration):
        next(load)
    rig.check()
    assert rig.engine.snapshot().table_bytes == 0
    with pytest.raises(BadSlotError):
        rig.load(space, slots)
