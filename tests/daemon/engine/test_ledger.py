"""Limits that several engines share: they hold in sum, whoever asks first and whoever dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest

from support.engine import KIB, MIB, Clock, Rig, UnkindDevice, page, pages_of
from support.interleaving import start
from vswap.protocol import Reason
from vswapd.ledger import Column, Ledger, shared_region
from vswapd.settings import GroupLimits, Settings
from vswapd.vswap import Engine
from vswapd_backends.base import U64, run
from vswapd_backends.shared import SharedRegion
from vswapd_blockdev.device import EXTENT_BYTES

_FORK = multiprocessing.get_context("fork")


def rigs(shared: SharedRegion, count: int, **settings: object) -> list[Rig]:
    """Engines of one ledger, in one process: every step of theirs is one after the other."""
    made = []
    for shard in range(count):
        clock = Clock()
        engine = Engine.create(
            Settings(**{"pool_max": 4 * MIB, **settings}),  # type: ignore[arg-type]
            clock,
            arena_bytes=16 * MIB,
            ledger=Ledger(shared, shard),
        )
        made.append(Rig(engine, clock))
    return made


def test_alone_there_are_no_others() -> None:
    """A ledger of one shard knows of nobody, shares no group, and its lock is none."""
    ledger = Ledger()
    ledger.enter(Column.POOL, 77)
    assert ledger.alone
    assert ledger.shards == 1
    assert ledger.others(Column.POOL) == 0
    assert ledger.budget_of_others(3) == 0
    assert ledger.columns_of("0") is None
    with ledger.hold(), ledger.hold():
        pass


def test_each_sees_the_sum_of_the_others() -> None:
    """What a shard enters counts for all others and not for itself; the last entry counts."""
    shared = shared_region(3)
    first, second, third = (Ledger(shared, shard) for shard in range(3))
    first.enter(Column.POOL, 5)
    second.enter(Column.POOL, 7)
    second.enter(Column.POOL, 11)
    assert [ledger.others(Column.POOL) for ledger in (first, second, third)] == [11, 5, 16]


def test_groups_have_the_same_columns_everywhere() -> None:
    """A group's columns are its own, and the same for every shard, whoever asked first."""
    shared = shared_region(2)
    first, second = Ledger(shared, 0), Ledger(shared, 1)
    columns = first.columns_of("1000")
    other = second.columns_of("0")
    assert second.columns_of("1000") == columns
    assert first.columns_of("0") == other
    assert columns is not None
    assert other is not None
    assert len({*columns, *other, *Column}) == 4 + len(Column)


def test_a_budget_of_another_day_does_not_count() -> None:
    """What others have written back counts on the day that they have written it."""
    shared = shared_region(2)
    first, second = Ledger(shared, 0), Ledger(shared, 1)
    first.enter(Column.BUDGET_DAY, 8)
    first.enter(Column.BUDGET, 100)
    assert second.budget_of_others(8) == 100
    assert second.budget_of_others(9) == 0
    assert first.budget_of_others(8) == 0


def test_the_pool_is_full_for_all_together() -> None:
    """What one shard holds is not there for the other; what it frees is, at once."""
    one, two = rigs(shared_region(2), 2)
    mine, other = one.space(), two.space()
    held: list[U64] = []
    while (stored := one.store(mine, pages_of("noise", 16, 16 * len(held)))).reason is None:
        held.append(stored.slots)
    assert two.store(other, pages_of("noise", 16)).reason is Reason.POOL_FULL
    total = one.pool_bytes + two.pool_bytes
    assert 3.5 * MIB < total <= 4 * MIB
    one.free(mine, held.pop())
    assert two.store(other, [page("text", 1)]).reason is Reason.POOL_FULL, "above the threshold"
    for slots in held[: len(held) // 4]:
        one.free(mine, slots)
    one.settle()
    assert two.store(other, pages_of("noise", 16)).reason is None
    assert one.pool_bytes + two.pool_bytes <= 4 * MIB
    one.check()
    two.check()


def test_a_groups_limit_is_for_all_its_pages() -> None:
    """A group at its limit on one shard is at its limit on the other; another group is not."""
    limits = {"7": GroupLimits(pool_max=256 * KIB)}
    one, two = rigs(shared_region(2), 2, groups=limits)
    mine = one.space("7")
    while one.store(mine, pages_of("noise", 4, one.engine.core.stats.store_pages)).reason is None:
        pass
    assert two.store(two.space("7"), pages_of("noise", 16)).reason is Reason.GROUP_LIMIT
    assert two.store(two.space("8"), pages_of("noise", 16)).reason is None


def test_a_groups_device_limit_is_for_all_its_pages() -> None:
    """What a group has on its part of a device counts on the other shards too."""
    limits = {"7": GroupLimits(device_max=300 * KIB)}
    one, two = rigs(shared_region(2), 2, groups=limits, pool_enabled=False)
    for rig in (one, two):
        rig.swapon(8)
    one.put(one.space("7"), pages_of("noise", 60))
    assert two.store(two.space("7"), pages_of("noise", 30)).reason is Reason.GROUP_LIMIT
    assert two.store(two.space("7"), pages_of("noise", 10)).reason is None


def test_the_write_budget_is_for_all_together() -> None:
    """What one shard wrote today is not there for the others; tomorrow it is."""
    one, two = rigs(shared_region(2), 2, write_budget=4 * EXTENT_BYTES, pool_max=8 * MIB)
    for rig in (one, two):
        rig.swapon(16)
        rig.put(rig.space(), pages_of("noise", 400))
    written = one.writeback(3 * EXTENT_BYTES)
    assert written.bytes == 3 * EXTENT_BYTES
    assert two.writeback(3 * EXTENT_BYTES).bytes == EXTENT_BYTES
    assert two.writeback(3 * EXTENT_BYTES).bytes == 0
    for rig in (one, two):
        rig.clock.advance(86400)
    assert two.writeback(3 * EXTENT_BYTES).bytes == 3 * EXTENT_BYTES


def test_a_folio_on_its_way_to_a_device_counts_for_the_others_from_its_first_write_on() -> None:
    """What one engine writes to a device directly, another cannot spend meanwhile."""
    both = rigs(shared_region(2), 2, write_budget=MIB, pool_enabled=False)
    for rig in both:
        rig.swapon(16)
    first, second = both
    folio = first.engine.prepare(b"".join(pages_of("noise", 150)))
    under_way = start(first.engine.store(first.space(), folio), "straight")
    under_way.until_io()
    assert second.store(second.space(), pages_of("noise", 150)).reason is Reason.WRITE_BUDGET
    assert under_way.finish().reason is None


def test_each_shard_makes_its_share_go() -> None:
    """Above the high watermark of the sum each shard writes back, until that is below the low."""
    one, two = rigs(shared_region(2), 2, pool_max=8 * MIB)
    devices = [rig.swapon(64) for rig in (one, two)]
    one.put(one.space(), pages_of("noise", 1400))
    two.put(two.space(), pages_of("noise", 560))
    assert one.engine.shrinker.wanted()
    assert two.engine.shrinker.wanted()
    for _ in range(20):
        # Both look at once, as their threads do.
        counts = [rig.engine.shrinker.count() for rig in (one, two)]
        for rig, count in zip((one, two), counts, strict=True):
            if count:
                run(rig.engine.shrinker.scan(count))
    used = one.engine.core.pool_use()
    assert used == two.engine.core.pool_use()
    assert used <= 0.86 * 8 * MIB
    assert all(device.written for device in devices)
    one.check()
    two.check()


# Processes


def _fill(shared: SharedRegion, shard: int, pipe: Connection) -> None:
    rig = rigs(shared, shard + 1)[shard]
    space = rig.space()
    first = shard * 100_000
    pipe.recv()
    stored = 0
    while rig.store(space, pages_of("noise", 2, first + stored)).reason is None:
        stored += 2
    pipe.send(rig.engine.core.zswap.in_use_bytes)


@pytest.fixture
def child() -> Callable[..., tuple[Connection, int]]:
    def start(work: Callable[..., None], *arguments: object) -> tuple[Connection, int]:
        here, there = _FORK.Pipe()
        process = _FORK.Process(target=work, args=(*arguments, there), daemon=True)
        process.start()
        assert process.pid is not None
        return here, process.pid

    return start


def test_processes_cannot_pass_a_limit_together(
    child: Callable[..., tuple[Connection, int]],
) -> None:
    """Four processes that fill one pool as fast as they can stay within it, and use it up."""
    shared = shared_region(4)
    pipes = [child(_fill, shared, shard)[0] for shard in range(4)]
    for pipe in pipes:
        pipe.send("go")
    used = sum(pipe.recv() for pipe in pipes)
    assert 3.5 * MIB < used <= 4 * MIB


def _hold(shared: SharedRegion, pipe: Connection) -> None:
    with Ledger(shared, 0).hold():
        pipe.send("held")
        signal.pause()


def test_a_killed_process_holds_nothing(child: Callable[..., tuple[Connection, int]]) -> None:
    """A process that is killed while it holds the ledger does not keep the others from it."""
    shared = shared_region(2)
    pipe, pid = child(_hold, shared)
    assert pipe.recv() == "held"
    os.kill(pid, signal.SIGKILL)
    ledger = Ledger(shared, 1)
    with ledger.hold():
        ledger.enter(Column.POOL, 1)
    assert Ledger(shared, 0).others(Column.POOL) == 1


def test_devices_are_not_in_the_ledger() -> None:
    """A shard without a device says so, whatever the others have."""
    one, two = rigs(shared_region(2), 2, pool_max=1 * MIB)
    one.swapon(4)
    assert isinstance(one.devices[0], UnkindDevice)
    space = two.space()
    reasons = {two.store(space, pages_of("noise", 16, 16 * i)).reason for i in range(30)}
    assert reasons == {None, Reason.POOL_FULL}
