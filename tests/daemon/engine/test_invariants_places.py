"""Places: in which order they are named and given up, in which form, and who pays for them.

Invariants (numbers as in "What must never be"): 10 to 13, and 22.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from support.engine import KIB, MIB, Rig, ids, make_engine, numbers_of, page, pages_of
from support.pages import STATES, counting, put_in_state
from vswap.protocol import Reason
from vswapd.clusters import slots_of
from vswapd.groups import Space
from vswapd.settings import GroupLimits
from vswapd.swap_table import Tag, lengths_of, places_of, tags_of
from vswapd_backends.base import PAGE_BYTES, SEGMENT_BYTES, U64, Places, run
from vswapd_backends.segment import parse_image

# 10, 13


class Order:
    """Looks at an engine when a place is given up, and when words are about to be written."""

    def __init__(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rig = rig
        self.given_up: list[int] = []
        self.published = 0
        core = rig.engine.core
        for backend in (core.zswap, core.devices):
            monkeypatch.setattr(backend, "give_up", self._give_up(backend.give_up))
        monkeypatch.setattr(core, "publish", self._publish(core.publish))
        monkeypatch.setattr(core, "publish_new", self._publish(core.publish_new))

    def _give_up(self, call: Callable[[Places], None]) -> Callable[[Places], None]:
        def give_up(places: Places) -> None:
            core = self.rig.engine.core
            words = core.table.words[slots_of(core.clusters.open_clusters())]
            named = set((words >> np.uint64(17)).tolist())
            assert not named & set(places.address.tolist()), "given up while a word names it"
            self.given_up += places.address.tolist()
            call(places)

        return give_up

    def _publish(self, call: Callable[..., None]) -> Callable[..., None]:
        def publish(space: Space, numbers: U64, words: U64, *more: int) -> None:
            self._ready(numbers, words)
            before = self.rig.engine.snapshot().stats.store_pages
            call(space, numbers, words, *more)
            assert self.rig.engine.snapshot().stats.store_pages == before, "counters come last"
            self.published += 1

        return publish

    def _ready(self, numbers: U64, words: U64) -> None:
        """Payload and directory of what is about to be named are in place."""
        core = self.rig.engine.core
        tags = tags_of(words)
        for tag in (Tag.ZSWAP, Tag.PHYS):
            places = places_of(words[tags == tag])
            mine = numbers[tags == tag].tolist()
            for number in set(places.number.tolist()):
                here = places.number == number
                wanted = dict(zip(places.offset[here].tolist(), np.array(mine)[here], strict=True))
                if tag is Tag.ZSWAP:
                    directory = core.zswap.directory(number)
                    assert core.zswap.wrong(places.address[here], places.length[here]) == []
                else:
                    device, extent = self.rig.devices[0], number
                    start = extent * SEGMENT_BYTES
                    image = memoryview(device.data)[start : start + SEGMENT_BYTES]
                    directory = parse_image(image)[1]
                listed = dict(
                    zip(directory.offsets.tolist(), directory.numbers.tolist(), strict=True)
                )
                assert wanted.items() <= listed.items()


@pytest.mark.parametrize("straight", [True, False])
def test_payload_and_directory_stand_before_the_word_and_the_old_place_goes_after(
    monkeypatch: pytest.MonkeyPatch, *, straight: bool
) -> None:
    """10, 13: payload, directory, word, counters; then what the old word named, exactly once."""
    rig = make_engine(devices=[16])
    space = rig.space()
    slots = [put_in_state(rig, space, state) for state in STATES]
    everything = np.concatenate(slots)
    named = [int(w) >> 17 for w in rig.words(np.concatenate(slots[2:])).tolist()]
    order = Order(rig, monkeypatch)
    rig.set(pool_enabled=not straight)
    rig.store(space, [*pages_of("text", 10, 300), *pages_of("noise", 6)], everything)
    assert order.given_up == named
    rig.put(space, pages_of("text", 50, 600))
    assert order.published >= 2
    rig.check()


# 11


@pytest.mark.parametrize("spec", ["lz4", "lz4hc:9", "zstd:3"])
def test_what_does_not_shrink_is_kept_raw_and_in_order(spec: str) -> None:
    """11: incompressible pages take a page each, among the others, in pool and on device."""
    rig = make_engine(devices=[16], codec=spec)
    space = rig.space()
    pages = [page(("noise", "text", "noise", "repeat")[i % 4], i) for i in range(120)]
    slots = rig.put(space, pages)
    lengths = lengths_of(rig.words(slots))
    assert (lengths[::2] == PAGE_BYTES).all()
    assert (lengths[1::2] < PAGE_BYTES).all()
    for _ in range(3):
        assert (np.diff(places_of(rig.words(slots)).address) > 0).all()
        assert rig.load(space, slots) == pages
        rig.writeback()
    assert set(rig.tags(slots)) == {Tag.PHYS}
    assert lengths_of(rig.words(slots)).tolist() == lengths.tolist()


def test_no_page_is_compressed_twice() -> None:
    """11: reclaim, writeback, compaction, swapoff and fallback move what is compressed already."""
    rig = make_engine(MIB, devices=[64])
    codec = counting(rig)
    space = rig.space()
    slots: list[int] = []
    for turn in range(60):
        kind = "noise" if turn % 2 else "mixed"
        slots += rig.put(space, pages_of(kind, 8, 8 * turn)).tolist()
    rig.free(space, ids(*slots[1::3]))
    run(rig.engine.compact())
    rig.writeback()
    rig.set(pool_enabled=False)
    rig.put(space, pages_of("text", 20, 2000))
    rig.swapon(64)
    rig.swapoff(rig.devices[0])
    assert len(codec.asked) == len(set(codec.asked)) == 60 * 8 + 20


# 12


def test_a_group_over_its_limit_pays_with_its_own_oldest_pages() -> None:
    """12: its pages go to the device, oldest first; another group's, older ones, stay."""
    rig = make_engine(
        8 * MIB, arena_bytes=24 * MIB, devices=[64], groups={"1": GroupLimits(pool_max=500 * KIB)}
    )
    other, mine = rig.space("2"), rig.space("1")
    others = rig.put(other, pages_of("noise", 200, 5000))
    slots: list[int] = []
    for turn in range(60):
        slots += rig.put(mine, pages_of("noise", 8, 8 * turn)).tolist()
        assert mine.group.pool_bytes <= 500 * KIB
    tags = rig.tags(ids(*slots))
    assert tags == sorted(tags, reverse=True)
    assert tags.count(Tag.PHYS) > 300
    assert set(rig.tags(others)) == {Tag.ZSWAP}
    assert other.group.device_bytes == 0


def test_a_group_that_cannot_pay_is_refused() -> None:
    """12: without a device, or with its share of it used up, the reason is its own limit."""
    rig = make_engine(
        devices=[64], groups={"1": GroupLimits(pool_max=100 * KIB, device_max=300 * KIB)}
    )
    other, mine = rig.space("2"), rig.space("1")
    others = rig.put(other, pages_of("noise", 100, 5000))
    while (stored := rig.store(mine, pages_of("noise", 4))).reason is None:
        assert mine.group.pool_bytes <= 100 * KIB
        assert mine.group.device_bytes <= 300 * KIB
    assert stored.reason is Reason.GROUP_LIMIT
    assert mine.group.pool_bytes + mine.group.device_bytes > 350 * KIB
    assert rig.put(other, pages_of("noise", 100, 7000)).any()
    assert rig.load(other, others) == pages_of("noise", 100, 5000)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (GroupLimits(pool_max=0), Tag.PHYS),
        (GroupLimits(device_max=0), Tag.ZSWAP),
        (GroupLimits(pool_max=0, device_max=0), Reason.GROUP_LIMIT),
    ],
)
def test_a_limit_of_nothing_means_nothing(limits: GroupLimits, expected: Tag | Reason) -> None:
    """12: limit 0 is none of this kind, not no limit."""
    rig = make_engine(devices=[16], groups={"1": limits})
    space = rig.space("1")
    stored = rig.store(space, pages_of("text", 5))
    if isinstance(expected, Reason):
        assert stored.reason is expected
        return
    assert set(rig.tags(stored.slots)) == {expected}
    rig.writeback()
    assert set(rig.tags(stored.slots)) == {expected}


# 22


def test_a_pool_that_was_full_refuses_until_it_is_below_the_accept_threshold() -> None:
    """22: full at max, it takes pages again at or below accept_threshold, and not before."""
    rig = make_engine(2 * MIB, accept_threshold=0.7, shrinker_enabled=False)
    space = rig.space()
    slots: list[int] = []
    while (stored := rig.store(space, pages_of("noise", 8))).reason is None:
        slots += stored.slots.tolist()
        assert rig.pool_bytes <= 2 * MIB
    assert stored.reason is Reason.POOL_FULL
    assert rig.engine.snapshot().pool.full
    refused = 0
    while rig.store(space, pages_of("repeat", 1)).reason is Reason.POOL_FULL:
        assert rig.engine.core.zswap.in_use_bytes > 0.7 * 2 * MIB
        refused += 1
        rig.free(space, ids(*slots[:4]))
        del slots[:4]
    assert refused > 20
    assert rig.engine.core.zswap.in_use_bytes <= 0.7 * 2 * MIB + 4 * PAGE_BYTES
    assert not rig.engine.snapshot().pool.full
    assert rig.load(space, ids(*slots[-8:])) == pages_of("noise", 8)


def test_below_the_limit_a_pool_that_was_never_full_takes_pages() -> None:
    """22: between threshold and limit pages are taken as long as the pool has not had to refuse."""
    rig = make_engine(2 * MIB, accept_threshold=0.2)
    space = rig.space()
    slots = rig.put(space, pages_of("noise", 300))
    assert rig.engine.core.zswap.in_use_bytes > 0.5 * 2 * MIB
    assert numbers_of(rig.put(space, pages_of("noise", 8))).tolist()
    assert not rig.engine.snapshot().pool.full
    assert rig.load(space, slots[:3]) == pages_of("noise", 3)
