"""What a store does on which rung of the ladder, and what it leaves when it is refused.

Invariants (numbers as in "What must never be"): 6 to 9.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from support.engine import KIB, MIB, ids, make_engine, page, pages_of
from support.pages import STATES, counting, put_in_state
from vswap.protocol import Reason
from vswapd.errors import BadSlotError, DuplicateSlotError, EngineError, NoSlotsError, UnbackedError
from vswapd.settings import GroupLimits
from vswapd.swap_table import Tag, lengths_of
from vswapd_backends.base import PAGE_BYTES, run

# 6


@pytest.mark.parametrize(
    "settings",
    [
        {"pool_enabled": False},
        {"pool_max": 0},
        {"default_group": GroupLimits(pool_max=0, device_max=0, writeback=False)},
        {"codec": "zstd:22"},
    ],
)
def test_zero_pages_are_found_before_limits_and_codec(settings: dict[str, object]) -> None:
    """6: zero pages are stored where nothing else could be, and no codec sees them."""
    rig = make_engine()
    rig.set(**settings)
    codec = counting(rig)
    space = rig.space()
    slots = rig.put(space, pages_of("zero", 100))
    assert set(rig.tags(slots)) == {Tag.ZERO}
    assert rig.load(space, slots) == pages_of("zero", 100)
    assert codec.asked == []


def test_zero_pages_are_stored_when_the_pool_is_full() -> None:
    """6: a full pool refuses everything but zero pages."""
    rig = make_engine(300 * KIB)
    space = rig.space()
    while rig.store(space, pages_of("noise", 4)).reason is None:
        pass
    slots = rig.put(space, pages_of("zero", 500))
    assert rig.load(space, slots) == pages_of("zero", 500)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(STATES, STATES)))
def test_any_state_can_be_overwritten_by_any_other(before: Tag, after: Tag) -> None:
    """6, 10: what stood there is given up once, whatever it was and whatever comes."""
    rig = make_engine(devices=[16])
    space = rig.space()
    neighbours = [put_in_state(rig, space, state, seed=50 + 10 * state) for state in STATES]
    slots = put_in_state(rig, space, before)
    put_in_state(rig, space, after, slots, seed=20)
    rig.check()
    if after is Tag.UNBACKED:
        with pytest.raises(UnbackedError):
            rig.load(space, slots)
    else:
        kind = "zero" if after is Tag.ZERO else "text"
        assert rig.load(space, slots) == pages_of(kind, 4, 20)
    for state, others in zip(STATES, neighbours, strict=True):
        assert rig.tags(others) == [state] * 4
        if state in {Tag.ZSWAP, Tag.PHYS}:
            assert rig.load(space, others) == pages_of("text", 4, 50 + 10 * state)
    rig.free(space, np.concatenate([slots, *neighbours]))
    rig.settle()
    rig.check()
    assert rig.pool_bytes == 0


# 7


def test_the_ladder_is_pool_then_device_then_reject() -> None:
    """7: with everything in order pages go to the pool; only what it cannot take goes further."""
    rig = make_engine(MIB, devices=[4])
    space = rig.space()
    reasons: list[Reason | None] = []
    for turn in range(300):
        stored = rig.store(space, pages_of("noise", 4, 4 * turn))
        reasons.append(stored.reason)
        if stored.reason is not None:
            break
        assert set(rig.tags(stored.slots)) <= {Tag.ZSWAP, Tag.PHYS}
        if turn < 30:
            assert rig.devices[0].writes == 0
    assert reasons[-1] is Reason.DEVICE_FULL
    picture = rig.engine.snapshot()
    assert picture.slots.phys > 100
    assert picture.slots.zswap > 100
    rig.check()


def test_new_pages_stay_in_ram_and_the_oldest_make_room() -> None:
    """7: a full pool first writes back its oldest segments: no inversion."""
    rig = make_engine(2 * MIB, devices=[64])
    space = rig.space()
    slots: list[int] = []
    for turn in range(200):
        slots += rig.put(space, pages_of("noise", 8, 8 * turn)).tolist()
        assert set(rig.tags(ids(*slots[-8:]))) == {Tag.ZSWAP}
    tags = rig.tags(ids(*slots))
    assert tags == sorted(tags, reverse=True)
    assert rig.engine.snapshot().stats.reclaim_bytes == rig.devices[0].written
    assert rig.engine.snapshot().stats.fallback_pages == 0


@pytest.mark.parametrize("off", [{"pool_enabled": False}, {"pool_max": 0}])
def test_a_disabled_pool_goes_straight_to_the_device(off: dict[str, object]) -> None:
    """7: with the pool off, or of no size, nothing is written back to make room."""
    rig = make_engine(devices=[16])
    space = rig.space()
    before = rig.put(space, pages_of("text", 20, 500))
    rig.set(**off)
    slots = rig.put(space, [*pages_of("text", 20), *pages_of("zero", 3)])
    assert rig.tags(slots) == [Tag.PHYS] * 20 + [Tag.ZERO] * 3
    assert set(rig.tags(before)) == {Tag.ZSWAP}
    stats = rig.engine.snapshot().stats
    assert (stats.fallback_pages, stats.reclaim_bytes) == (20, 0)
    assert rig.load(space, slots) == [*pages_of("text", 20), *pages_of("zero", 3)]


def test_pages_of_a_group_without_writeback_never_reach_a_device() -> None:
    """7: its stores end at the pool, by reclaim or directly, and other groups' do not."""
    rig = make_engine(MIB, devices=[32], groups={"1": GroupLimits(writeback=False)})
    kept, other = rig.space("1"), rig.space("2")
    while (stored := rig.store(kept, pages_of("noise", 8))).reason is None:
        pass
    assert stored.reason is Reason.WRITEBACK_DISABLED
    assert rig.devices[0].writes == 0
    rig.set(pool_enabled=False)
    assert rig.store(kept, pages_of("text", 1)).reason is Reason.WRITEBACK_DISABLED
    assert rig.tags(rig.put(other, pages_of("text", 1))) == [Tag.PHYS]


# 8, 9


@pytest.mark.parametrize("state", STATES)
def test_a_rejected_folio_leaves_its_slots_without_content(state: Tag) -> None:
    """8: whatever stood there is stale: it is gone at once, and never comes back."""
    rig = make_engine(devices=[16])
    space = rig.space()
    slots = put_in_state(rig, space, state)
    rig.set(store_enabled=False)
    stored = rig.store(space, pages_of("text", 4, 70), slots)
    assert stored.reason is Reason.DISABLED
    assert stored.slots.tolist() == slots.tolist()
    rig.set(store_enabled=True)
    for _ in range(2):
        assert rig.tags(slots) == [Tag.UNBACKED] * 4
        for slot in slots.tolist():
            with pytest.raises(UnbackedError) as caught:
                rig.load(space, [slot])
            assert caught.value.slots.tolist() == [slot]
        rig.writeback()
        run(rig.engine.compact())
        rig.settle()
    rig.check()
    assert (rig.pool_bytes, rig.engine.snapshot().devices[0].used_bytes) == (0, 0)


def test_a_rejected_folio_takes_no_new_slots() -> None:
    """8: a store to new slots that is refused gives none out, on any rung of the ladder."""
    rig = make_engine(devices=[8])
    space = rig.space()
    rig.devices[0].fails = lambda kind, _: kind == "write"
    for settings in ({"store_enabled": False}, {"pool_enabled": False, "store_enabled": True}):
        rig.set(**settings)
        stored = rig.store(space, [*pages_of("zero", 3), *pages_of("text", 700)])
        assert stored.reason in {Reason.DISABLED, Reason.DEVICE_FULL}
        assert stored.slots.tolist() == []
        assert rig.engine.snapshot().slots.allocated == 0
        assert rig.engine.snapshot().table_bytes == 0
        rig.check()


@pytest.mark.parametrize("at", [0, 1, 31, 62, 63])
@pytest.mark.parametrize("wrong", ["foreign", "freed", "made up", "twice"])
def test_a_folio_with_a_wrong_slot_changes_nothing(at: int, wrong: str) -> None:
    """8, 9: wherever in the folio the slot is that is not the caller's."""
    rig = make_engine(devices=[8])
    space, other = rig.space(), rig.space()
    slots = rig.put(space, pages_of("text", 70))
    freed = slots[69]
    rig.free(space, slots[69:])
    foreign = rig.put(other, pages_of("text", 1, 900))
    bad = {"foreign": foreign[0], "freed": freed, "made up": 12345, "twice": slots[(at + 5) % 63]}
    folio = slots[:64].copy()
    folio[at] = bad[wrong]
    kind: type[EngineError] = DuplicateSlotError if wrong == "twice" else BadSlotError
    before = rig.engine.snapshot()
    words = rig.engine.core.table.words[:1024].copy()
    for store_enabled in (False, True):
        rig.set(store_enabled=store_enabled)
        with pytest.raises(kind) as caught:
            rig.store(space, pages_of("noise", 64), folio)
        assert caught.value.slots.tolist() == [bad[wrong]]
    assert (rig.engine.core.table.words[:1024] == words).all()
    assert rig.engine.snapshot().stats == before.stats
    assert rig.engine.snapshot().pool == before.pool
    assert rig.load(space, slots[:69]) == pages_of("text", 69)
    assert rig.load(other, foreign) == pages_of("text", 1, 900)


@pytest.mark.parametrize("odd", [0, 1, 40, 62, 63])
@pytest.mark.parametrize("kind", ["zero", "noise", "text"])
def test_every_page_of_a_folio_is_looked_at(kind: str, odd: int) -> None:
    """9: one page of another kind, the first and the last included, is stored as what it is."""
    for others in ("zero", "noise", "text"):
        rig = make_engine()
        space = rig.space()
        pages = pages_of(others, 64)
        pages[odd] = page(kind, 999)
        slots = rig.put(space, pages)
        assert rig.load(space, slots) == pages
        expected = [Tag.ZSWAP if any(found) else Tag.ZERO for found in pages]
        assert rig.tags(slots) == expected
        raw = (lengths_of(rig.words(slots)) == PAGE_BYTES).tolist()
        assert raw == [found[8:9] == b"n" for found in pages]


@pytest.mark.parametrize("nth", range(1, 12))
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folio_is_stored_whole_or_not_at_all(nth: int, *, overwrite: bool) -> None:
    """9: a folio over several extents, of which the n-th write fails and all after it."""
    rig = make_engine(pool_enabled=False, devices=[30])
    space = rig.space()
    slots = rig.put(space, pages_of("text", 300)) if overwrite else None
    device = rig.devices[0]
    begin = device.writes
    device.fails = lambda kind, n: kind == "write" and n >= begin + nth
    stored = rig.store(space, pages_of("noise", 300), slots)
    device.fails = None
    if stored.reason is None:
        assert rig.load(space, stored.slots) == pages_of("noise", 300)
    elif slots is None:
        assert rig.engine.snapshot().slots.allocated == 0
    else:
        assert rig.tags(slots) == [Tag.UNBACKED] * 300
    rig.check()
    rig.close(space)
    rig.settle()
    assert rig.engine.snapshot().devices[0].used_bytes == 0


def test_a_full_table_refuses_the_whole_folio() -> None:
    """9: when slots are left for some pages only, none is stored, and these are still left."""
    rig = make_engine(max_slots=512)
    space = rig.space()
    slots = rig.put(space, pages_of("text", 500))
    with pytest.raises(NoSlotsError):
        rig.store(space, pages_of("text", 13))
    rig.check()
    rig.put(space, pages_of("text", 12, 600))
    assert rig.load(space, slots) == pages_of("text", 500)
