"""Pages that got old are compressed again, and nobody notices but the pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from support.engine import KIB, MIB, Clock, Rig, make_engine, page, pages_of
from support.interleaving import start
from vswap.protocol import Reason
from vswapd.ledger import Column, Ledger, shared_region
from vswapd.recompression import LEAST_GAIN
from vswapd.settings import GroupLimits, Settings
from vswapd.shrinker import Doing
from vswapd.swap_table import Tag, lengths_of, places_of, referenced
from vswapd.vswap import Engine
from vswapd_backends.base import PAGE_BYTES, PAUSE, SEGMENT_BYTES, U64, Compute, run
from vswapd_backends.segment import ImageBuilder
from vswapd_backends.zswap import Stream, Zswap

AGE = 60.0
MakeSegment = Callable[[Stream], tuple[int, ImageBuilder]]
RECOMPRESSING = Doing.RECOMPRESSING.value


def dense_engine(pool_max: int = 16 * MIB, **settings: object) -> Rig:
    settings.setdefault("dense", "zstd:3")
    return make_engine(pool_max, arena_bytes=64 * MIB, dense_age=AGE, **settings)  # type: ignore[arg-type]


def tiers(rig: Rig) -> dict[str, int]:
    """Pages by codec."""
    return {part.codec: part.entries for part in rig.engine.snapshot().pool.parts if part.entries}


def pools(rig: Rig, slots: U64) -> list[str]:
    """The codec of each slot's entry in the pool."""
    zswap = rig.engine.core.zswap
    of = zswap.pools_of(places_of(rig.words(slots)).number)
    return [zswap.pools[pool].codec.spec for pool in of.tolist()]


def grow_old(rig: Rig) -> list[str]:
    """Let everything get old, and the shrinker do what it wants, as often as it has time."""
    done: list[str] = []
    for _ in range(100):
        rig.clock.advance(AGE)
        now = rig.shrink()
        done += now
        if RECOMPRESSING not in now:
            return done
    raise AssertionError("it goes on for ever")


def test_old_pages_become_denser() -> None:
    """They move to the second codec's pool, take less memory, and come back as they were."""
    rig = dense_engine()
    space = rig.space()
    content = pages_of("text", 1000)
    slots = rig.put(space, content)
    before = rig.engine.snapshot()
    assert rig.shrink() == []
    done = grow_old(rig)
    after = rig.engine.snapshot()
    assert RECOMPRESSING in done
    # The open segment is not sealed yet: its pages are not old.
    assert tiers(rig)["zstd:3"] > 800
    assert after.pool.live_bytes < 0.9 * before.pool.live_bytes
    assert after.pool.bytes < 0.9 * before.pool.bytes
    assert after.stats.recompress_pages == tiers(rig)["zstd:3"]
    saved = before.pool.live_bytes - after.pool.live_bytes
    assert after.stats.recompress_saved_bytes == saved
    assert set(rig.tags(slots)) == {Tag.ZSWAP}
    assert rig.load(space, slots) == content
    assert rig.verify().ok
    rig.check()
    rig.free(space, slots)
    rig.settle()
    assert rig.pool_bytes == 0


def test_young_pages_stay_as_they_are() -> None:
    """Before their age nothing is tried, and the shrinker says when it will look again."""
    rig = dense_engine()
    space = rig.space()
    rig.put(space, pages_of("text", 1000))
    assert rig.shrink() == []
    wakeup = rig.engine.shrinker.next_wakeup()
    assert wakeup is not None
    assert wakeup <= rig.clock.now + AGE
    rig.clock.advance(AGE - 1)
    assert RECOMPRESSING not in rig.shrink()
    rig.clock.advance(1)
    assert RECOMPRESSING in rig.shrink()


def test_a_pool_over_its_watermark_does_not_wait_for_age() -> None:
    """What is about to be written back is compressed again first, and less is written."""
    rig = dense_engine(5 * MIB, devices=[64])
    space = rig.space()
    content: list[bytes] = []
    slots = []
    while rig.engine.core.pool_use() <= 0.95 * 5 * MIB:
        some = pages_of("text", 20, len(content))
        slots += rig.put(space, some).tolist()
        content += some
    assert rig.shrink()[0] == RECOMPRESSING
    picture = rig.engine.snapshot()
    assert picture.stats.recompress_pages > 1000
    assert picture.pool.bytes <= 0.96 * 5 * MIB
    assert rig.load(space, slots) == content
    rig.check()


def test_stores_never_wait_for_the_dense_codec() -> None:
    """Direct reclaim writes back what there is; only the shrinker recompresses."""
    rig = dense_engine(2 * MIB, devices=[64])
    space = rig.space()
    for first in range(0, 3000, 100):
        rig.put(space, pages_of("text", 100, first))
    picture = rig.engine.snapshot()
    assert picture.stats.reclaim_bytes > 0
    assert picture.stats.recompress_pages == 0
    assert picture.stats.recompress_seconds == 0


def dull(seed: int) -> bytes:
    """A page that lz4 makes a little smaller, and zstd no smaller than that."""
    return (page("noise", seed)[:3700] + bytes([7]) * PAGE_BYTES)[:PAGE_BYTES]


@pytest.mark.parametrize("kind", ["raw", "dull"])
def test_what_does_not_shrink_is_tried_once(kind: str) -> None:
    """It stays where it is, and costs no more time, also after compaction has moved it.

    11: a page that is kept raw is not tried on its way to a denser tier at all.
    """
    rig = dense_engine()
    space = rig.space()
    content = [dull(i) if kind == "dull" else page("noise", i) for i in range(700)]
    slots = rig.put(space, content)
    assert RECOMPRESSING in grow_old(rig)
    spent = rig.engine.snapshot().stats.recompress_seconds
    assert (spent > 0) == (kind == "dull")
    assert "zstd:3" not in tiers(rig)
    rig.free(space, slots[::2])
    done = grow_old(rig)
    assert Doing.COMPACTING.value in done
    assert RECOMPRESSING not in done
    assert rig.engine.snapshot().stats.recompress_seconds == spent
    assert rig.load(space, slots[1::2]) == content[1::2]
    rig.check()


def test_new_pages_are_tried_beside_those_that_were() -> None:
    """Compaction keeps segments that were tried apart from others."""
    rig = dense_engine()
    space = rig.space()
    noise = rig.put(space, pages_of("noise", 300))
    grow_old(rig)
    text = rig.put(space, pages_of("text", 2000))
    rig.free(space, np.concatenate([noise[::2], text[::2]]))
    grow_old(rig)
    assert tiers(rig)["zstd:3"] > 700
    assert tiers(rig)["lz4"] >= 150
    assert rig.load(space, text[1::2]) == pages_of("text", 2000)[1::2]
    rig.check()


def test_dense_pages_are_written_back_as_they_are() -> None:
    """The device gets the small form, oldest first, and it is read from there."""
    rig = dense_engine(devices=[64])
    space = rig.space()
    content = pages_of("text", 2000)
    slots = rig.put(space, content)
    grow_old(rig)
    live = rig.engine.snapshot().pool.live_bytes
    written = rig.writeback()
    assert written.bytes < 1.1 * live
    assert set(rig.tags(slots)) == {Tag.PHYS}
    assert rig.load(space, slots) == content
    rig.check()


def test_what_is_oldest_goes_to_the_device_first_whatever_it_is_compressed_with() -> None:
    """Dense pages keep the age that they had: they go before younger ones of the first tier."""
    rig = dense_engine(devices=[64])
    space = rig.space()
    old = rig.put(space, pages_of("text", 700))
    rig.clock.advance(AGE)
    rig.shrink()
    assert set(pools(rig, old[:500])) == {"zstd:3"}
    young = rig.put(space, pages_of("text", 700, 5000))
    rig.writeback(1)
    assert Tag.PHYS in rig.tags(old)
    assert set(rig.tags(young)) == {Tag.ZSWAP}
    # And those that were taken apart later go later.
    rig.clock.advance(AGE)
    rig.shrink()
    assert set(pools(rig, young[:400])) == {"zstd:3"}
    while Tag.ZSWAP in rig.tags(old[:500]):
        assert set(rig.tags(young)) == {Tag.ZSWAP}
        rig.writeback(1)


def test_a_step_puts_no_more_than_one_segment_away() -> None:
    """Others have the lock between two segments."""
    rig = dense_engine()
    rig.put(rig.space(), pages_of("text", 1000))
    step = start(rig.engine.shrinker.recompression.step(young=True))
    seen = [0]
    while not step.ended:
        step.perform()
        step.advance()
        seen.append(tiers(rig).get("zstd:3", 0))
    most = SEGMENT_BYTES // min(lengths_of(rig.engine.core.table.words[:1000]).tolist())
    assert seen[-1] > 500
    assert max(np.diff(seen)) < most


def test_others_may_run_while_it_compresses() -> None:
    """Every few pages the thread that compresses steps back."""
    rig = dense_engine()
    rig.put(rig.space(), pages_of("text", 400))
    work = rig.engine.shrinker.recompression
    calls: list[int] = []
    work.step_back = lambda: calls.append(1)
    run(work.step(young=True))
    tried = sum(segment.entries for segment in rig.engine.snapshot().pool.parts)
    assert 200 / 8 < len(calls) <= tried


@pytest.mark.parametrize("devices", [[], [64]])
def test_a_store_that_needs_room_does_not_wait_for_it(devices: list[int]) -> None:
    """It writes back what is not in hand, or is refused, while the denser form is being made."""
    rig = dense_engine(4 * MIB, devices=devices)
    space = rig.space()
    while rig.engine.core.pool_room() > MIB:
        rig.put(space, pages_of("text", 20))
    work = start(rig.engine.shrinker.recompression.step(young=True))
    assert isinstance(work.advance(), Compute)
    while rig.engine.core.pool_room() > 100 * KIB:
        rig.put(space, pages_of("noise", 4))
    stored = rig.store(space, pages_of("noise", 40))
    assert stored.reason is (None if devices else Reason.POOL_FULL)
    assert bool(rig.engine.snapshot().stats.reclaim_bytes) == bool(devices)
    work.finish()
    rig.check()
    assert not rig.engine.core.zswap._pins.any()


def two_shards() -> list[Rig]:
    """Engines that share a ledger, and a pool of 4 MiB that text has nearly filled."""
    shared = shared_region(2)
    made = []
    for shard in range(2):
        clock, settings = Clock(), Settings(pool_max=4 * MIB, dense="zstd:3")
        ledger = Ledger(shared, shard)
        made.append(Rig(Engine.create(settings, clock, arena_bytes=16 * MIB, ledger=ledger), clock))
    while made[0].engine.core.pool_room() > 800 * KIB:
        for rig in made:
            rig.put(rig.space(), pages_of("text", 20))
    return made


def test_the_limit_holds_for_shards_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old and new of all stay below it: room for the new is entered before any of it is taken."""
    made = two_shards()
    for rig, other in zip(made, reversed(made), strict=True):
        zswap, looked = rig.engine.core.zswap, other.engine.core.ledger
        make = zswap.new_segment

        def watched(
            stream: Stream, make: MakeSegment = make, zswap: Zswap = zswap, looked: Ledger = looked
        ) -> tuple[int, ImageBuilder]:
            assert looked.others(Column.POOL) > zswap.in_use_bytes + 100 * KIB
            return make(stream)

        monkeypatch.setattr(zswap, "new_segment", watched)
    steps = [start(rig.engine.shrinker.recompression.step(young=True)) for rig in made]
    while not all(step.ended for step in steps):
        for step in steps:
            if not step.ended:
                step.perform()
                step.advance()
            assert sum(rig.engine.core.zswap.in_use_bytes for rig in made) <= 4 * MIB
    assert sum(tiers(rig).get("zstd:3", 0) for rig in made) > 0
    for rig in made:
        rig.check()


def test_room_that_another_shard_has_taken_meanwhile_is_not_there() -> None:
    """What was compressed again is dropped if there is no room for it any more."""
    rig, other = two_shards()
    work = start(rig.engine.shrinker.recompression.step(young=True))
    assert isinstance(work.advance(), Compute)
    space = other.space()
    while other.store(space, pages_of("noise", 4)).reason is None:
        pass
    assert work.finish() == 0
    assert "zstd:3" not in tiers(rig)
    assert rig.engine.core.pool_use() <= 4 * MIB
    rig.check()


def test_a_page_that_was_loaded_gets_its_second_chance() -> None:
    """It goes to the young end of its own pool, unmarked, until it is old again."""
    rig = dense_engine()
    space = rig.space()
    slots = rig.put(space, pages_of("text", 1000))
    hot = slots[:50]
    rig.load(space, hot)
    rig.clock.advance(AGE)
    rig.shrink()
    assert tiers(rig)["lz4"] >= 50
    assert not (rig.words(hot) & np.uint64(8)).any()
    assert rig.load(space, slots) == pages_of("text", 1000)
    rig.check()


def test_a_page_that_was_loaded_keeps_its_mark_where_there_is_no_room_for_it() -> None:
    """It is not moved then, and its second chance is still to come."""
    rig = dense_engine()
    space = rig.space()
    slots = rig.put(space, pages_of("text", 400))
    rig.free(space, slots[150:])
    work = start(rig.engine.shrinker.recompression.step(young=True))
    assert isinstance(work.advance(), Compute)
    hot = slots[3:4]
    rig.load(space, hot)
    work.perform()
    # Room for the one segment that becomes denser, and for nothing behind it.
    put = rig.engine.core.zswap.adopt
    with pytest.MonkeyPatch.context() as patch:

        def adopt(*given: Any, **named: Any) -> None:
            put(*given, **named)
            rig.set(pool_max=rig.engine.core.zswap.in_use_bytes)

        patch.setattr(rig.engine.core.zswap, "adopt", adopt)
        work.finish()
    assert tiers(rig)["zstd:3"] > 0
    assert pools(rig, hot) == ["lz4"]
    assert referenced(rig.words(hot)).all()
    rig.check()


def test_what_does_not_shrink_is_tried_again_if_the_tiers_became_others_meanwhile() -> None:
    """A mark says that one codec gains nothing; another may."""
    rig = dense_engine()
    rig.put(rig.space(), [dull(i) for i in range(400)])
    work = start(rig.engine.shrinker.recompression.step(young=True))
    assert isinstance(work.advance(), Compute)
    rig.set(dense="zstd:19")
    work.finish()
    assert not rig.engine.core.zswap.tried.any()
    assert len(rig.engine.shrinker.recompression.candidates())


@pytest.mark.parametrize("when", ["compressing", "between two segments"])
@pytest.mark.parametrize("what", ["overwrite", "free", "load", "close", "switch"])
def test_pages_that_change_meanwhile_are_left_alone(what: str, when: str) -> None:
    """While the denser form is made, or put away, anything may happen: nothing of it is undone."""
    rig = dense_engine()
    space = rig.space()
    content = pages_of("text", 1000)
    slots = rig.put(space, content)
    rig.clock.advance(AGE)
    assert rig.engine.shrinker.count()
    step = start(rig.engine.shrinker.scan(1))
    assert isinstance(step.advance(), Compute)
    some = slots[:200]
    if when == "between two segments":
        step.perform()
        assert step.advance() is PAUSE
        some = slots[350:550]
        assert set(pools(rig, some)) == {"lz4"}
    first = slots.tolist().index(int(some[0]))
    there = tiers(rig).get("zstd:3", 0)
    match what:
        case "overwrite":
            content[first : first + 200] = pages_of("mixed", 200)
            rig.store(space, content[first : first + 200], some)
        case "free":
            rig.free(space, some)
        case "load":
            rig.load(space, some)
        case "close":
            rig.close(space)
        case "switch":
            rig.set(dense="")
    step.finish()
    rig.check()
    if what == "close":
        rig.settle()
        assert rig.pool_bytes == 0
        return
    if what == "switch":
        assert tiers(rig).get("zstd:3", 0) == there
    if what == "free":
        slots = np.delete(slots, np.arange(first, first + 200))
        del content[first : first + 200]
    elif what in {"overwrite", "load"}:
        assert set(pools(rig, some)) == {"lz4"}
    assert rig.load(space, slots) == content
    assert rig.verify().ok


def test_processor_time_is_bounded() -> None:
    """It takes no more than its share, says so, and goes on when there is time again."""
    rig = dense_engine(recompress_share=0.1)
    work = rig.engine.shrinker.recompression
    ticks = iter(range(1_000_000))
    work.cpu_clock = lambda: 0.5 * next(ticks)  # each batch takes half a second
    space = rig.space()
    rig.put(space, pages_of("text", 4000))
    rig.clock.advance(AGE)
    assert rig.shrink().count(RECOMPRESSING) == 1
    again = work.affordable_at()
    assert 2.0 < again - rig.clock.now < 6.0
    rig.clock.advance(1.5)
    assert RECOMPRESSING not in rig.shrink()
    assert rig.engine.shrinker.next_wakeup() == pytest.approx(again)
    rig.clock.now = again
    assert rig.shrink().count(RECOMPRESSING) == 1


def test_without_a_share_nothing_is_recompressed() -> None:
    """recompress_share = 0 and a single tier mean the same."""
    for settings in ({"recompress_share": 0.0}, {"dense": ""}):
        rig = dense_engine(**settings)
        rig.put(rig.space(), pages_of("text", 1000))
        rig.clock.advance(100 * AGE)
        assert RECOMPRESSING not in rig.shrink()
        assert list(tiers(rig)) == ["lz4"]
        rig.shrink()
        assert rig.engine.shrinker.next_wakeup() is None


def test_a_busy_machine_is_left_alone() -> None:
    """By age alone nothing is done while others need the processor; under pressure it is."""
    rig = dense_engine()
    rig.engine.shrinker.recompression.busy = lambda: True
    rig.put(rig.space(), pages_of("text", 1000))
    rig.clock.advance(AGE)
    assert RECOMPRESSING not in rig.shrink()
    rig.set(pool_max=1 * MIB)
    assert RECOMPRESSING in rig.shrink()


def test_what_waits_for_an_idle_machine_says_so() -> None:
    """Status does not call it idle; it goes on when the machine has time."""
    rig = dense_engine()
    work = rig.engine.shrinker.recompression
    work.busy = lambda: True
    rig.put(rig.space(), pages_of("text", 1000))
    rig.shrink()
    assert rig.engine.snapshot().shrinker.doing == "idle"
    rig.clock.advance(AGE)
    rig.shrink()
    state = rig.engine.snapshot().shrinker
    assert (state.doing, state.why) == ("waits", "the machine is busy")
    assert rig.engine.shrinker.next_wakeup() is not None
    work.busy = lambda: False
    assert RECOMPRESSING in rig.shrink()
    assert rig.engine.snapshot().shrinker.doing == "idle"


def test_what_waits_for_its_share_of_the_processor_says_so() -> None:
    """It is named by its setting."""
    rig = dense_engine()
    work = rig.engine.shrinker.recompression
    rig.put(rig.space(), pages_of("text", 1000))
    rig.clock.advance(AGE)
    work.seconds = lambda: -1.0  # type: ignore[method-assign]
    rig.shrink()
    state = rig.engine.snapshot().shrinker
    assert state.doing == "waits"
    assert "shrinker.recompress_cpu" in state.why


def test_the_limit_holds_while_old_and_new_stand_side_by_side() -> None:
    """A pool without room is not recompressed beyond its limit, and the shrinker does not spin."""
    rig = dense_engine(1 * MIB, shrinker_enabled=True)
    space = rig.space()
    held = []
    for first in range(0, 4000, 20):
        stored = rig.store(space, pages_of("text", 20, first))
        if stored.reason is not None:
            break
        held.append((stored.slots, pages_of("text", 20, first)))
    step = rig.engine.shrinker
    for _ in range(50):
        count = step.count()
        if not count:
            break
        operation = start(step.scan(count))
        while not operation.ended:
            operation.perform()
            operation.advance()
            assert rig.engine.core.zswap.in_use_bytes <= 1 * MIB
    assert not step.count()
    for slots, content in held:
        assert rig.load(space, slots) == content


@pytest.mark.parametrize("damage", [[8 + 60], range(8, 40)], ids=["one byte", "many"])
def test_a_damaged_entry_is_left_for_whoever_loads_it(damage: Sequence[int]) -> None:
    """Also one that still decompresses: it stays damaged for all to see, and its neighbours move.

    A denser form of it would have a right check, and the wrong page would never be found out.
    """
    rig = dense_engine()
    space = rig.space()
    content = pages_of("text", 1000)
    slots = rig.put(space, content)
    for byte in damage:
        rig.damage(int(slots[3]), byte=byte)
    before = rig.verify().problems
    assert len(before) == 1
    grow_old(rig)
    assert tiers(rig)["zstd:3"] > 700
    assert rig.verify().problems == before
    rig.set(verify="always")
    assert rig.peek(space, slots) == [*content[:3], None, *content[4:]]


def test_other_tiers_are_another_try() -> None:
    """After a change of the dense codec all is looked at again, the former dense pool too."""
    rig = dense_engine(dense="zstd:1")
    space = rig.space()
    content = [*pages_of("text", 1500), *pages_of("noise", 200)]
    slots = rig.put(space, content)
    grow_old(rig)
    first = tiers(rig)
    assert first["zstd:1"] > 1000
    rig.set(dense="zstd:19")
    grow_old(rig)
    assert tiers(rig).get("zstd:1", 0) < first["zstd:1"]
    assert tiers(rig)["zstd:19"] > 0
    assert rig.load(space, slots) == content
    rig.check()


def test_only_what_pays_is_moved() -> None:
    """No entry in the dense pool is nearly as large as it was."""
    rig = dense_engine()
    space = rig.space()
    content = [page(kind, i) for i in range(400) for kind in ("text", "mixed", "repeat")]
    slots = rig.put(space, content)
    before = dict(zip(slots.tolist(), lengths(rig, slots), strict=True))
    grow_old(rig)
    after = dict(zip(slots.tolist(), lengths(rig, slots), strict=True))
    changed = [slot for slot in before if before[slot] != after[slot]]
    assert len(changed) > 300
    assert all(after[slot] <= LEAST_GAIN * before[slot] for slot in changed)
    assert rig.load(space, slots) == content


def lengths(rig: Rig, slots: U64) -> list[int]:
    return [int(word >> 4) & 0x1FFF for word in rig.words(slots).tolist()]


def test_groups_are_charged_for_what_they_hold() -> None:
    """A group over its limit is recompressed first, and pays less afterwards."""
    rig = dense_engine(groups={"7": GroupLimits(pool_max=900 * KIB)})
    one, other = rig.space("0"), rig.space("7")
    rig.put(one, pages_of("text", 1000))
    mine = rig.put(other, pages_of("text", 500, 5000))
    rig.set(groups={"7": GroupLimits(pool_max=500 * KIB)})
    rig.swapon(32)
    group = other.group
    before = group.pool_bytes
    assert rig.shrink()[0] == RECOMPRESSING
    assert group.pool_bytes < before
    assert group.pool_bytes <= 500 * KIB
    rig.check()
    assert rig.load(other, mine) == pages_of("text", 500, 5000)


def test_one_step_works_alone() -> None:
    """The operation by itself, without a shrinker, moves a batch and no more."""
    rig = dense_engine()
    rig.put(rig.space(), pages_of("text", 4000))
    moved = run(rig.engine.shrinker.recompression.step(young=True))
    assert 0 < moved <= 4 * SEGMENT_BYTES
    rig.check()
