"""Whatever makes pools grow, all shards together stay within the limits, and the books agree."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from support.engine import KIB, MIB, Clock, Rig, UnkindDevice, pages_of
from support.interleaving import Running, start
from vswap.protocol import Reason
from vswapd.errors import BadSlotError, SwapoffError
from vswapd.ledger import Column, Ledger, shared_region
from vswapd.settings import GroupLimits, Settings
from vswapd.vswap import Engine
from vswapd_backends.base import U64, run

POOL: Final = 4 * MIB


def rigs(count: int, **settings: object) -> list[Rig]:
    """Engines of one ledger, in one process: every step of theirs is one after the other."""
    region = shared_region(count)
    made = []
    for shard in range(count):
        clock = Clock()
        engine = Engine.create(
            Settings(**{"pool_max": POOL, **settings}),  # type: ignore[arg-type]
            clock,
            arena_bytes=16 * MIB,
            ledger=Ledger(region, shard),
        )
        made.append(Rig(engine, clock))
    return made


def on_devices(made: list[Rig], pages: int, kind: str = "noise") -> list[tuple[U64, list[bytes]]]:
    """Each shard's pages on a device of its own, and nothing in the pools."""
    held = []
    for shard, rig in enumerate(made):
        rig.swapon(32)
        rig.set(pool_enabled=False)
        mine = pages_of(kind, pages, 10_000 * shard)
        held.append((rig.put(rig.space(), mine), mine))
        rig.set(pool_enabled=True)
    return held


def in_pools(made: list[Rig]) -> int:
    return sum(rig.engine.core.zswap.in_use_bytes for rig in made)


def of_group(made: list[Rig]) -> int:
    return sum(group.pool_bytes for rig in made for group in rig.engine.core.groups)


def step_by_step(steps: list[Running], look: Callable[[], None]) -> None:
    """Advance operations by turns, each until it has ended, with a look after every step."""
    while not all(step.ended for step in steps):
        for step in steps:
            if not step.ended:
                step.perform()
                step.advance()
                look()


def check(made: list[Rig]) -> None:
    """All sums agree, those in the ledger among them."""
    for rig in made:
        rig.check()
        others = sum(o.engine.core.zswap.in_use_bytes for o in made if o is not rig)
        assert rig.engine.core.ledger.others(Column.POOL) == others


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_swapoff_never_fills_the_pools_beyond_their_limit(shards: int) -> None:
    """What does not fit in sum makes swapoff fail, with the device in use and all pages there."""
    made = rigs(shards)
    held = on_devices(made, 960 if shards > 1 else 1500)
    assert in_pools(made) == 0

    def look() -> None:
        assert in_pools(made) <= POOL

    work = [start(rig.engine.swapoff(rig.devices[0].path)) for rig in made]
    step_by_step(work, look)
    assert any(isinstance(each.error, SwapoffError) for each in work)
    assert in_pools(made) > 0.9 * POOL
    check(made)
    for rig, each, (slots, pages) in zip(made, work, held, strict=True):
        (space,) = rig.engine.core.spaces.values()
        assert rig.load(space, slots) == pages
        if each.error is not None:
            assert not rig.device_of(rig.devices[0]).draining
            rig.swapon(32)  # with another device it can be emptied
            rig.swapoff(rig.devices[0])
            assert rig.load(space, slots) == pages
    check(made)


def test_swapoff_never_fills_a_group_beyond_its_limit() -> None:
    """A group's limit holds for what comes back from the devices of all shards, too."""
    made = rigs(2, groups={"0": GroupLimits(pool_max=MIB)})
    on_devices(made, 200)
    work = [start(rig.engine.swapoff(rig.devices[0].path)) for rig in made]

    def look() -> None:
        assert of_group(made) <= MIB

    step_by_step(work, look)
    assert any(isinstance(each.error, SwapoffError) for each in work)
    assert of_group(made) > 0.8 * MIB
    check(made)


def test_swapoff_that_fits_in_sum_moves_all() -> None:
    """What all shards hold on a device comes back if there is room for all of it together."""
    made = rigs(2)
    held = on_devices(made, 400)
    for rig in made:
        rig.swapoff(rig.devices[0])
    check(made)
    assert in_pools(made) > 800 * 4096
    for rig, (slots, pages) in zip(made, held, strict=True):
        (space,) = rig.engine.core.spaces.values()
        assert rig.load(space, slots) == pages


def test_what_another_shard_stored_meanwhile_is_not_there_for_swapoff() -> None:
    """Stores of one shard and the swapoff of another never pass the limit together."""
    one, two = made = rigs(2)
    on_devices([one], 900)
    work = start(one.engine.swapoff(one.devices[0].path))
    space, stored = two.space(), 0
    while not work.ended:
        work.perform()
        work.advance()
        if two.store(space, pages_of("noise", 16, stored)).reason is None:
            stored += 16
        assert in_pools(made) <= POOL
    assert stored > 0
    assert isinstance(work.error, SwapoffError)
    check(made)


@pytest.mark.parametrize("when", range(0, 12, 3))
def test_a_kill_in_the_middle_of_a_swapoff_leaves_books_that_agree(when: int) -> None:
    """What the shard had entered and not taken is not there any more once it goes on."""
    one, two = made = rigs(2)
    held = on_devices(made, 500)
    work = start(one.engine.swapoff(one.devices[0].path))
    for _ in range(when):
        work.perform()
        work.advance()
    one.recover()
    check(made)
    slots, pages = held[0]
    (space,) = one.engine.core.spaces.values()
    assert one.load(space, slots) == pages
    assert one.engine.core.ledger.own(Column.SHRINKING) == 0
    one.swapoff(one.devices[0])
    check(made)
    assert in_pools(made) <= POOL
    assert two.engine.core.pool_use() == in_pools(made)


def everything(rig: Rig) -> Iterator[str]:
    """One thing after the other that moves pages in and out of a pool."""
    space = rig.space()
    slots = rig.put(space, pages_of("text", 300))
    yield "stored"
    rig.free(space, slots[::2])
    yield "freed"
    run(rig.engine.compact())
    yield "compacted"
    rig.store(space, pages_of("noise", 60), slots[1:121:2])
    yield "overwritten"
    rig.writeback(300 * KIB)
    yield "written back"
    run(rig.engine.shrinker.recompression.step(young=True))
    yield "recompressed"
    rig.load(space, slots[121::2])
    run(rig.engine.shrinker.recompression.step(young=True))
    rig.writeback()
    yield "second chances given"
    rig.swapoff(rig.devices[0])
    yield "swapped off"
    rig.close(space)
    yield "closed"


def test_the_ledger_has_what_is_there_after_whatever_was_done() -> None:
    """Not the growth that was expected, nor what has gone: others see just what is held."""
    one, two = made = rigs(2, dense="zstd:3")
    for rig in made:
        rig.swapon(16)
    for first, second in zip(everything(one), everything(two), strict=True):
        assert first == second
        check(made)
        for rig in made:
            columns = rig.engine.core.groups.get("0").columns
            assert columns is not None
            assert rig.engine.core.ledger.own(columns[0]) == of_group([rig])
    assert in_pools(made) == 0
    assert one.engine.core.pool_use() == 0


def test_a_store_that_is_refused_after_room_was_made_leaves_nothing_entered() -> None:
    """Slots that were freed while room was made for them: nobody's room is taken by that."""
    one, two = made = rigs(2)
    one.swapon(64)
    space = one.space()
    some = one.put(space, pages_of("noise", 32))
    first = 32
    while one.engine.core.pool_room() > 100 * KIB:
        one.put(space, pages_of("noise", 16, first))
        first += 16
    folio = one.engine.prepare(b"".join(pages_of("noise", 32, 9000)))
    store = start(one.engine.store(space, folio, some))
    store.advance()
    assert not store.ended, "it was to make room"
    one.free(space, some)
    with pytest.raises(BadSlotError):
        store.finish()
    check(made)
    assert two.engine.core.pool_use() == in_pools(made)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("most", [1, 5])
def test_memory_that_is_still_warm_counts_when_it_is_used_again(shards: int, most: int) -> None:
    """A store that needs little of a segment which was freed lately takes no more than it may."""
    rig, *others = made = rigs(shards)
    for other in others:
        other.put(other.space(), pages_of("noise", 50))
    space = rig.space()
    slots = rig.put(space, pages_of("noise", 880 - 50 * len(others)))
    stored = 1000
    for first in range(0, 300, 31):
        rig.free(space, slots[first : first + 31])
        pages = pages_of("noise", most, stored)
        while rig.store(space, pages).reason is None:
            assert in_pools(made) <= POOL
            stored += most
            pages = pages_of("noise", most, stored)
    assert in_pools(made) > 0.85 * POOL
    check(made)


@pytest.mark.parametrize("shards", [1, 2])
def test_compaction_never_fills_the_pools_beyond_their_limit(shards: int) -> None:
    """What a step copies, and leaves in its old segment for now, has room or is left alone."""
    for seed in range(20):
        chooser = random.Random(seed)
        rig, *others = made = rigs(shards, pool_max=16 * MIB)
        for other in others:
            other.put(other.space(), pages_of("noise", 20))
        space, stored = rig.space(), 300
        held = rig.put(space, pages_of("noise", stored)).tolist()
        for _ in range(5):
            gone = chooser.sample(held, chooser.randrange(1, len(held) // 2))
            rig.free(space, gone)
            held = sorted(set(held) - set(gone))
            full = in_pools(made)
            rig.set(pool_max=full)
            work = start(rig.engine.compact())
            while not work.ended:
                work.advance()
                assert in_pools(made) <= full, f"seed {seed}"
            check(made)
            rig.set(pool_max=16 * MIB)
            more = pages_of("noise", chooser.randrange(1, 60), stored)
            held += rig.put(space, more).tolist()
            stored += len(more)


def test_devices_never_take_more_of_a_group_than_its_limit() -> None:
    """Shards that write a group's pages at the same time stay within its limit together."""
    limits = {"7": GroupLimits(device_max=600 * KIB)}
    made = rigs(2, groups=limits, pool_max=8 * MIB)
    for rig in made:
        rig.swapon(32)
        rig.put(rig.space("7"), pages_of("noise", 400))

    def look() -> None:
        on_devices = sum(g.device_bytes for rig in made for g in rig.engine.core.groups)
        assert on_devices <= 600 * KIB

    step_by_step([start(rig.engine.writeback(1 << 40)) for rig in made], look)
    check(made)


def test_folios_on_their_way_to_devices_count_for_all() -> None:
    """A group's folio that is being written leaves the others what is left of the limit."""
    limits = {"7": GroupLimits(device_max=600 * KIB)}
    one, two = rigs(2, groups=limits, pool_enabled=False)
    for rig in (one, two):
        rig.swapon(16)
    folio = one.engine.prepare(b"".join(pages_of("noise", 100)))
    under_way = start(one.engine.store(one.space("7"), folio), "straight")
    under_way.until_io()
    space = two.space("7")
    assert two.store(space, pages_of("noise", 100)).reason is Reason.GROUP_LIMIT
    assert two.store(space, pages_of("noise", 40)).reason is None
    assert under_way.finish().reason is None
    assert isinstance(one.devices[0], UnkindDevice)
    check([one, two])
