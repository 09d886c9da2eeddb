"""A limit that is passed in sum: each shard makes its share go, whoever is fast, slow or stuck."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import pytest

from support.engine import KIB, MIB, Clock, Rig, UnkindDevice, pages_of
from support.interleaving import start
from vswapd.ledger import Column, Ledger, shared_region
from vswapd.pressure import Free
from vswapd.settings import GroupLimits, Settings
from vswapd.share import PATIENCE_S, Share
from vswapd.shrinker import Doing
from vswapd.vswap import Engine
from vswapd_backends.base import SEGMENT_BYTES, run

PAGES: Final = 2400
"""9.5 MiB that do not shrink, of all shards together."""


def rigs(weights: Sequence[int], *, devices: bool = True, pages: int = PAGES) -> list[Rig]:
    """Engines of one ledger and one clock; each holds its part of the pages, and has a device."""
    region, clock = shared_region(len(weights)), Clock()
    made = []
    for shard, weight in enumerate(weights):
        engine = Engine.create(
            Settings(pool_max=64 * MIB),
            clock,
            arena_bytes=64 * MIB,
            ledger=Ledger(region, shard),
        )
        rig = Rig(engine, clock)
        made.append(rig)
        space = rig.space()
        mine = pages * weight // sum(weights)
        for first in range(0, mine, 100):
            rig.put(space, pages_of("noise", min(100, mine - first), first))
        if devices:
            rig.swapon(64)
    return made


def held(made: list[Rig]) -> list[int]:
    return [rig.engine.core.zswap.in_use_bytes for rig in made]


def of_group(made: list[Rig]) -> list[int]:
    return [sum(group.pool_bytes for group in rig.engine.core.groups) for rig in made]


def written(made: list[Rig]) -> int:
    return sum(device.written for rig in made for device in rig.devices)


def lower(made: list[Rig], **changes: object) -> None:
    for rig in made:
        rig.set(**changes)


def by_turns(made: list[Rig], most: int = 200) -> None:
    """All count, then each scans: as threads do that look at the same moment."""
    for _ in range(most):
        counts = [rig.engine.shrinker.count() for rig in made]
        if not any(counts):
            return
        for rig, count in zip(made, counts, strict=True):
            if count:
                run(rig.engine.shrinker.scan(count))
    raise AssertionError("the shrinkers spin")


def one_after_the_other(made: list[Rig]) -> None:
    """Each does all that it finds to do before the next begins."""
    for rig in made:
        rig.shrink()


def check(made: list[Rig]) -> None:
    for rig in made:
        rig.check()


ORDERS: Final = {"by turns": by_turns, "one after the other": one_after_the_other}
WEIGHTS: Final = [(1,), (1, 1), (1, 1, 1, 1), (7, 1), (1, 0, 0, 0), (5, 3, 1)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_of_the_pools_each_gives_its_share(weights: Sequence[int], order: str) -> None:
    """What is left is close below the low watermark, and each has left what it had of the sum."""
    made = rigs(weights)
    before = held(made)
    lower(made, pool_max=4 * MIB)
    ORDERS[order](made)
    floor = 0.85 * 4 * MIB
    assert floor - len(made) * SEGMENT_BYTES <= sum(held(made)) <= floor
    for mine, had in zip(held(made), before, strict=True):
        # One more at most by itself, and less by what the others have given too much.
        assert -1 <= (mine - floor * had / sum(before)) / SEGMENT_BYTES <= len(made) - 1
    assert written(made) <= sum(before) - floor + len(made) * 2 * SEGMENT_BYTES
    check(made)
    made[0].clock.advance(100)
    one_after_the_other(made)
    assert sum(held(made)) >= floor - len(made) * SEGMENT_BYTES, "it went on later"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_of_a_group_each_gives_its_share(weights: Sequence[int], order: str) -> None:
    """What is left of a group is close below its limit, and each has left what it had of it."""
    made = rigs(weights)
    before = of_group(made)
    lower(made, groups={"0": GroupLimits(pool_max=4 * MIB)})
    ORDERS[order](made)
    limit = 4 * MIB
    assert limit - len(made) * SEGMENT_BYTES <= sum(of_group(made)) <= limit
    for mine, had in zip(of_group(made), before, strict=True):
        assert -1 <= (mine - limit * had / sum(before)) / SEGMENT_BYTES <= len(made) - 1
    check(made)


def test_a_group_that_one_shard_has_alone_pays_alone() -> None:
    """Shards that hold other groups' pages only give nothing of them."""
    made = rigs([1, 1])
    made[0].put(made[0].space("7"), pages_of("noise", 300))
    lower(made, groups={"7": GroupLimits(pool_max=400 * KIB)})
    by_turns(made)
    group = made[0].engine.core.groups.get("7")
    assert 400 * KIB - SEGMENT_BYTES <= group.pool_bytes <= 400 * KIB
    assert of_group(made)[1] == PAGES // 2 * 4096
    assert not made[1].devices[0].written


@pytest.mark.parametrize("limit", [0, 300 * KIB, MIB])
@pytest.mark.parametrize("which", ["pool", "group"])
def test_a_limit_below_a_segment_of_each(limit: int, which: str) -> None:
    """Open segments go, too, until the sum is below it; then the shrinkers sleep."""
    made = rigs([1, 1, 1, 1])
    if which == "pool":
        lower(made, pool_max=limit)
    else:
        lower(made, groups={"0": GroupLimits(pool_max=limit)})
    by_turns(made)
    assert sum(held(made) if which == "pool" else of_group(made)) <= limit
    assert all(rig.engine.shrinker.count() == 0 for rig in made)
    assert not any(rig.engine.shrinker.wanted() for rig in made if limit)
    check(made)


def test_several_limits_at_once() -> None:
    """The pools' limit and a group's, lowered together: the lower one decides, once."""
    made = rigs([1, 1])
    lower(made, pool_max=6 * MIB, groups={"0": GroupLimits(pool_max=3 * MIB)})
    by_turns(made)
    assert 3 * MIB - 2 * SEGMENT_BYTES <= sum(of_group(made)) <= 3 * MIB


@pytest.mark.parametrize("order", ORDERS)
def test_what_some_cannot_give_the_others_give(order: str) -> None:
    """A shard without a device keeps all; the others make go what it does not, at once."""
    made = rigs([1, 1, 2])
    stuck = made[1]
    stuck.swapoff(stuck.devices[0])
    lower(made, pool_max=6 * MIB)
    before = held(made)
    floor = 0.85 * 6 * MIB
    ORDERS[order](made)
    ORDERS[order](made)
    assert held(made)[1] == before[1]
    assert floor - 3 * SEGMENT_BYTES <= sum(held(made)) <= floor
    kept = floor - before[1]
    for index, part in ((0, 1 / 3), (2, 2 / 3)):
        assert abs(held(made)[index] - kept * part) <= SEGMENT_BYTES
    check(made)


def test_if_nobody_can_give_more_the_shrinkers_sleep() -> None:
    """All that can go has gone, the limit is passed for good: nobody spins, nobody polls."""
    made = rigs([1, 9])
    made[1].swapoff(made[1].devices[0])
    lower(made, pool_max=2 * MIB)
    by_turns(made)
    assert held(made)[0] == 0
    made[0].clock.advance(10 * PATIENCE_S)
    by_turns(made)
    for rig in made:
        assert rig.engine.shrinker.count() == 0
        wakeup = rig.engine.shrinker.next_wakeup()
        assert wakeup is None or wakeup > rig.clock() + PATIENCE_S


def test_a_shard_that_gets_its_device_later_gives_its_share_then() -> None:
    """Stuck is how it was: what it held can go as soon as there is a device again."""
    made = rigs([1, 1])
    made[1].swapoff(made[1].devices[0])
    lower(made, pool_max=2 * MIB)
    by_turns(made)
    assert held(made)[0] == 0
    made[1].swapon(64)
    by_turns(made)
    floor = 0.85 * 2 * MIB
    assert floor - SEGMENT_BYTES <= sum(held(made)) <= floor


def test_a_shard_that_does_nothing_is_waited_for_and_then_no_more() -> None:
    """One that hangs: the others sleep meanwhile, and take its part in the end."""
    made = rigs([1, 1])
    one, hanging = made
    lower(made, pool_max=6 * MIB)
    floor = 0.85 * 6 * MIB
    one.shrink()
    assert abs(held(made)[0] - floor / 2) <= SEGMENT_BYTES
    assert one.engine.shrinker.why == "its share has gone; the rest is for other shards to give"
    assert not one.engine.shrinker.wanted()
    before = held(made)[1]
    looks = []
    while sum(held(made)) > floor:
        wakeup = one.engine.shrinker.next_wakeup()
        assert wakeup is not None
        assert wakeup > one.clock()
        one.clock.now = wakeup
        one.shrink()
        looks.append(sum(held(made)))
        assert len(looks) < 20
    assert all(later < earlier for earlier, later in pairwise(looks))
    assert held(made)[1] == before
    hanging.shrink()
    assert held(made)[1] == before, "nothing is left to give"
    assert sum(held(made)) >= floor - 2 * SEGMENT_BYTES


def test_as_long_as_the_others_get_on_nobody_gives_more_than_its_share() -> None:
    """A shard that is slow, but gives its share, is waited for however long it takes."""
    made = rigs([1, 1])
    one, slow = made
    lower(made, pool_max=2 * MIB)
    one.shrink()
    mine = held(made)[0]
    while (count := slow.engine.shrinker.count()) > 0:
        run(slow.engine.shrinker.scan(min(count, SEGMENT_BYTES)))
        one.clock.advance(0.9 * PATIENCE_S)
        one.shrink()
        assert held(made)[0] == mine
    floor = 0.85 * 2 * MIB
    assert floor - 2 * SEGMENT_BYTES <= sum(held(made)) <= floor


def test_who_stores_meanwhile_gives_what_it_stored() -> None:
    """New pages of a shard that has given its share are its own to make room for."""
    made = rigs([1, 1])
    one, slow = made
    lower(made, pool_max=6 * MIB)
    one.shrink()
    mine, theirs = held(made)
    lower(made, pool_max=16 * MIB, high_watermark=0.3, low_watermark=0.3)
    one.put(one.space(), pages_of("noise", 300, 50_000))
    assert one.engine.shrinker.wanted()
    one.shrink()
    assert held(made)[0] <= mine + 2 * SEGMENT_BYTES
    assert held(made)[1] == theirs
    slow.shrink()
    assert sum(held(made)) <= 0.3 * 16 * MIB


@pytest.mark.parametrize("order", ORDERS)
def test_raised_again_in_the_middle(order: str) -> None:
    """Once what is left is within the limits nobody goes on, whatever had been begun."""
    made = rigs([1, 1])
    lower(made, pool_max=MIB)
    counts = [rig.engine.shrinker.count() for rig in made]
    for rig, count in zip(made, counts, strict=True):
        run(rig.engine.shrinker.scan(min(count, MIB)))
    left = sum(held(made))
    lower(made, pool_max=64 * MIB)
    ORDERS[order](made)
    assert sum(held(made)) == left
    lower(made, pool_max=int(left / 0.9))  # between the watermarks
    ORDERS[order](made)
    assert sum(held(made)) == left


def test_all_work_once_one_has_seen_the_high_watermark_passed() -> None:
    """One that looks when others have begun already gives its share all the same."""
    made = rigs([1, 1])
    used = sum(held(made))
    lower(made, pool_max=int(used / 0.97))
    one, late = made
    one.shrink()
    assert sum(held(made)) < 0.95 * used / 0.97, "below the high watermark by now"
    late.shrink()
    floor = 0.85 * used / 0.97
    assert floor - 2 * SEGMENT_BYTES <= sum(held(made)) <= floor
    assert abs(held(made)[0] - held(made)[1]) <= 2 * SEGMENT_BYTES


def test_where_memory_is_short_each_gives_its_share() -> None:
    """The limit falls because others take the memory: what goes is what is short, once."""
    made = rigs([1, 1])
    used = sum(held(made))
    left = 64 * MIB

    def meter() -> Free:
        # What the pools give back is free again.
        return Free(left + used - sum(held(made)), "the machine")

    lower(made, pool_reserve=4 * MIB)
    for rig in made:
        rig.engine.watch_memory(meter)
    left = 0
    made[0].clock.advance(20)
    by_turns(made)
    floor = 0.85 * (used - 4 * MIB)
    assert floor - 2 * SEGMENT_BYTES <= sum(held(made)) <= floor
    assert abs(held(made)[0] - held(made)[1]) <= 2 * SEGMENT_BYTES


def test_what_others_have_made_go_meanwhile_need_not_go() -> None:
    """A scan that finds nothing left to do is no work that got nowhere."""
    made = rigs([1, 1])
    one, two = made
    lower(made, pool_max=4 * MIB)
    count = one.engine.shrinker.count()
    assert one.engine.shrinker.doing is Doing.WRITING
    (space,) = two.engine.core.spaces.values()
    two.close(space)
    assert run(one.engine.shrinker.scan(count)) > 0
    assert held(made)[0] >= 0.85 * 4 * MIB - SEGMENT_BYTES
    lower(made, pool_max=2 * MIB)
    one.shrink()
    assert held(made)[0] <= 0.85 * 2 * MIB
    assert isinstance(one.devices[0], UnkindDevice)


@pytest.mark.parametrize("which", ["pool", "group"])
def test_what_another_shard_is_writing_need_not_go_twice(which: str) -> None:
    """Less than a segment is too much: one shard writes it, and the other leaves it at that."""
    made = rigs([1, 1])
    one, two = made
    if which == "pool":
        floor = sum(held(made)) - 200 * KIB
        lower(made, pool_max=int(floor / 0.9) + 1, low_watermark=0.9, high_watermark=0.9)
    else:
        lower(made, groups={"0": GroupLimits(pool_max=sum(of_group(made)) - 200 * KIB)})
    under_way = start(one.engine.shrinker.scan(one.engine.shrinker.count()))
    under_way.until_io()
    assert two.engine.shrinker.count() == 0
    under_way.finish()
    by_turns(made)
    assert one.devices[0].written > 0
    assert two.devices[0].written == 0


@pytest.mark.parametrize("ends", ["it fails", "it hangs"])
def test_what_another_shard_cannot_write_goes_in_the_end(ends: str) -> None:
    """A write of another shard that comes to nothing is not relied on for ever."""
    made = rigs([1, 1])
    one, two = made
    floor = sum(held(made)) - 200 * KIB
    lower(made, pool_max=int(floor / 0.9) + 1, low_watermark=0.9, high_watermark=0.9)
    one.devices[0].fails = lambda what, _: what == "write"
    under_way = start(one.engine.shrinker.scan(one.engine.shrinker.count()))
    under_way.until_io()
    two.shrink()
    assert two.devices[0].written == 0
    if ends == "it fails":
        under_way.finish()
    for _ in range(10):
        wakeup = two.engine.shrinker.next_wakeup()
        assert wakeup is not None
        assert wakeup > two.clock()
        two.clock.now = wakeup
        two.shrink()
        if sum(held(made)) <= floor:
            break
    assert sum(held(made)) <= floor
    if not under_way.ended:
        under_way.cancel(perform=False)
    check(made)


def test_the_share_alone() -> None:
    """With nobody else all of the excess is one's own, and nothing is waited for."""
    share = Share(Clock(), Ledger(), (Column.POOL, Column.POOL_BASIS))
    assert share.due(100, 0, 60) == 40
    assert share.due(60, 40, 60) == 0
    assert share.next_look is None
