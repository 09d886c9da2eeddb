"""Devices that go, codecs that change, reasons and counters.

Invariants (numbers as in "What must never be"): 24, 26, 27; more of 24 is in test_device_moves.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from support.engine import DAY, KIB, KINDS, MIB, Rig, make_engine, page, pages_of
from support.interleaving import start
from vswap.protocol import Reason
from vswapd.errors import ArgumentError, PageLostError, SwapoffError, UnbackedError
from vswapd.settings import GroupLimits
from vswapd.stats import Stats
from vswapd.swap_table import Tag
from vswapd_backends.base import SEGMENT_BYTES, run

# 24


def test_a_device_that_is_drained_gets_no_new_extents() -> None:
    """24: while swapoff runs, writeback, reclaim and fallback go elsewhere or not at all."""
    rig = make_engine(8 * MIB, arena_bytes=24 * MIB, devices=[16])
    space = rig.space()
    slots = rig.put(space, pages_of("noise", 126))
    rig.writeback()
    going = rig.devices[0]
    writes = going.writes
    swapoff = start(rig.engine.swapoff(going.path))
    swapoff.until_io()
    assert rig.writeback().bytes == 0
    rig.set(pool_enabled=False)
    assert rig.store(space, pages_of("text", 3)).reason is Reason.NO_DEVICE
    staying = rig.swapon(16)
    more = rig.put(space, pages_of("text", 3, 500))
    assert set(rig.tags(more)) == {Tag.PHYS}
    rig.set(pool_enabled=True)
    swapoff.finish()
    assert going.writes == writes
    assert staying.writes > 0
    assert rig.load(space, slots) == pages_of("noise", 126)
    assert rig.load(space, more) == pages_of("text", 3, 500)


def test_what_cannot_be_moved_makes_swapoff_fail_and_the_device_stay() -> None:
    """24: nothing is lost, no id changes, and the device takes pages as before."""
    rig = make_engine(8 * MIB, arena_bytes=24 * MIB, devices=[32])
    space = rig.space()
    slots = rig.put(space, pages_of("noise", 1000))
    rig.writeback()
    rig.set(pool_max=MIB)
    with pytest.raises(SwapoffError):
        rig.swapoff(rig.devices[0])
    rig.check()
    assert rig.engine.snapshot().devices[0].state == "on"
    assert rig.load(space, slots) == pages_of("noise", 1000)
    rig.set(pool_enabled=False)
    assert rig.tags(rig.put(space, pages_of("text", 1))) == [Tag.PHYS]


# 26


def test_old_entries_stay_readable_when_the_codec_changes() -> None:
    """26: entries of every codec, in the pool and on the device, are read as what they are."""
    rig = make_engine(8 * MIB, devices=[32])
    space = rig.space()
    held = []
    for turn, codec in enumerate(["lz4", "zstd:1", "lz4hc:9", "zstd:19", "lz4", "zstd:1"]):
        rig.set(codec=codec)
        pages = [page(KINDS[i % 5], 50 * turn + i) for i in range(50)]
        held.append((rig.put(space, pages), pages))
        if turn == 2:
            rig.writeback()
        for slots, expected in held:
            assert rig.load(space, slots) == expected
    assert [part.codec for part in rig.engine.snapshot().pool.parts] == [
        "lz4",
        "zstd:1",
        "zstd:19",
    ]
    rig.swapoff(rig.devices[0])
    for slots, expected in held:
        assert rig.load(space, slots) == expected
    assert rig.verify().ok
    for slots, _ in held:
        rig.free(space, slots)
    assert [part.codec for part in rig.engine.snapshot().pool.parts] == ["zstd:1"]


@pytest.mark.parametrize("codec", ["lz5", "zstd", "zstd:99", ""])
def test_an_unknown_codec_is_refused_and_the_old_one_stays(codec: str) -> None:
    """26: nothing else of those settings is taken over either."""
    rig = make_engine(codec="zstd:1")
    space = rig.space()
    before = rig.engine.snapshot().settings
    with pytest.raises(ArgumentError, match="no codec is called"):
        rig.set(codec=codec, pool_max=1 * MIB)
    assert rig.engine.snapshot().settings == before
    rig.put(space, pages_of("text", 5))
    assert [part.codec for part in rig.engine.snapshot().pool.parts] == ["zstd:1"]
    with pytest.raises(ArgumentError, match="no codec is called"):
        make_engine(codec=codec)


def test_settings_that_cannot_be_changed_are_refused_whole() -> None:
    """26: a pool beyond its address space, or another table, changes nothing."""
    rig = make_engine(4 * MIB, arena_bytes=12 * MIB)
    before = rig.engine.snapshot().settings
    for changes in ({"pool_max": 13 * MIB}, {"max_slots": 1 << 20}):
        with pytest.raises(ArgumentError):
            rig.set(codec="zstd:1", **changes)
        assert rig.engine.snapshot().settings == before


# 27, and the reasons of rejects


def _fill(rig: Rig, group: str = "0") -> Reason:
    """Noise until a folio is rejected; what for."""
    space = rig.space(group)
    for turn in range(2000):
        reason = rig.store(space, pages_of("noise", 4, 4 * turn)).reason
        if reason is not None:
            return reason
    raise AssertionError("nothing was rejected")


SCENES: list[tuple[dict[str, object], Reason]] = [
    ({"pool_max": MIB}, Reason.POOL_FULL),
    ({"pool_max": MIB, "devices": [4]}, Reason.DEVICE_FULL),
    ({"pool_enabled": False, "devices": [4]}, Reason.DEVICE_FULL),
    ({"pool_enabled": False}, Reason.NO_DEVICE),
    ({"pool_max": 0}, Reason.NO_DEVICE),
    ({"default_group": GroupLimits(pool_max=0)}, Reason.NO_DEVICE),
    ({"default_group": GroupLimits(pool_max=100 * KIB)}, Reason.GROUP_LIMIT),
    (
        {"default_group": GroupLimits(pool_max=100 * KIB, device_max=0), "devices": [8]},
        Reason.GROUP_LIMIT,
    ),
    (
        {"default_group": GroupLimits(device_max=100 * KIB), "devices": [8], "pool_max": MIB},
        Reason.GROUP_LIMIT,
    ),
    (
        {"default_group": GroupLimits(writeback=False), "devices": [8], "pool_max": MIB},
        Reason.WRITEBACK_DISABLED,
    ),
    (
        {"default_group": GroupLimits(writeback=False, pool_max=MIB), "devices": [8]},
        Reason.WRITEBACK_DISABLED,
    ),
    ({"write_budget": 600 * KIB, "devices": [32], "pool_max": MIB}, Reason.WRITE_BUDGET),
    (
        {"write_budget": 600 * KIB, "devices": [32], "pool_enabled": False},
        Reason.WRITE_BUDGET,
    ),
    ({"store_enabled": False}, Reason.DISABLED),
    ({"store_enabled": False, "devices": [4]}, Reason.DISABLED),
]


@pytest.mark.parametrize(("settings", "expected"), SCENES)
def test_each_refused_page_has_one_reason_and_is_counted_under_it(
    settings: dict[str, object], expected: Reason
) -> None:
    """27: the reason is what an operator would have to change, and no other counter rises."""
    devices = settings.get("devices", ())
    others = {key: value for key, value in settings.items() if key != "devices"}
    rig = make_engine(devices=devices, **others)  # type: ignore[arg-type]
    assert _fill(rig) is expected
    rejects = {reason.word: 0 for reason in Reason} | {expected.word: 4}
    assert rig.engine.snapshot().stats.rejects == rejects
    space = rig.space()
    slots = rig.put(space, pages_of("zero", 7)) if expected is not Reason.DISABLED else None
    folio = pages_of("noise", 7)
    assert rig.store(space, folio, slots).reason is expected
    rejects[expected.word] += 7
    assert rig.engine.snapshot().stats.rejects == rejects
    rig.check()


def test_every_reason_has_a_scene() -> None:
    """27: no reason is without a test."""
    assert {reason for _, reason in SCENES} == set(Reason)


def test_the_next_day_has_a_budget_of_its_own() -> None:
    """27: what was refused for the budget is taken when the day is over."""
    rig = make_engine(MIB, devices=[64], write_budget=600 * KIB)
    rig.clock.now = 5.5 * DAY
    assert _fill(rig) is Reason.WRITE_BUDGET
    assert rig.devices[0].written <= 600 * KIB
    space = rig.space()
    rig.clock.now = 6 * DAY - 1
    assert rig.store(space, pages_of("noise", 4)).reason is Reason.WRITE_BUDGET
    rig.clock.now = 6 * DAY
    assert rig.store(space, pages_of("noise", 4)).reason is None
    assert rig.devices[0].written <= 1200 * KIB


class Counters:
    """Which counters have risen since the last look, and by how much."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.before = self._now()

    def _now(self) -> dict[str, int]:
        stats = self.rig.engine.snapshot().stats
        plain = {f.name: getattr(stats, f.name) for f in dataclasses.fields(Stats)}
        rejects = plain.pop("rejects")
        return {**plain, **{f"rejects.{word}": count for word, count in rejects.items()}}

    def risen(self) -> dict[str, int]:
        before, self.before = self.before, self._now()
        return {k: v - before[k] for k, v in self.before.items() if v != before[k]}


def test_each_counter_counts_one_thing() -> None:
    """27: each act raises the counters that are its own, by what it did, and no others."""
    rig = make_engine(8 * MIB, arena_bytes=24 * MIB, devices=[32])
    space, counters = rig.space(), Counters(rig)
    device = rig.devices[0]

    slots = rig.put(space, [*pages_of("noise", 40), *pages_of("zero", 10)])
    assert counters.risen() == {"store_pages": 50}
    rig.store(space, pages_of("noise", 5, 100), slots[:5])
    assert counters.risen() == {"store_pages": 5}
    rig.load(space, slots)
    assert counters.risen() == {"load_pages": 50}
    rig.writeback()
    assert counters.risen() == {
        "compact_bytes": 40 * 4096,  # their second chance
        "writeback_pages": 40,
        "writeback_bytes": device.written,
    }
    rig.load(space, slots)
    assert counters.risen() == {"load_pages": 50, "swapin_pages": 40}
    rig.free(space, slots[:3])
    assert counters.risen() == {"free_pages": 3}
    rig.store(space, pages_of("noise", 500_000 // 4096, 200))
    counters.risen()

    begin = device.written
    rig.set(pool_enabled=False)
    straight = rig.put(space, pages_of("text", 5))
    assert counters.risen() == {
        "store_pages": 5,
        "fallback_pages": 5,
        "fallback_bytes": device.written - begin,
    }
    rig.damage(int(straight[0]))
    with pytest.raises(PageLostError):
        rig.load(space, straight)
    assert counters.risen() == {"lost_pages": 1, "swapin_pages": 4}
    rig.set(store_enabled=False)
    rig.store(space, pages_of("text", 5), straight)
    assert counters.risen() == {"rejects.disabled": 5}
    with pytest.raises(UnbackedError):
        rig.load(space, straight)
    assert counters.risen() == {}
    rig.set(store_enabled=True)

    other = rig.swapon(32)
    rig.swapoff(device)
    assert counters.risen() == {"swapoff_bytes": other.written}
    rig.set(pool_enabled=True)
    rig.verify()
    rig.engine.snapshot()
    assert counters.risen() == {}
    rig.close(space)
    assert counters.risen() == {"free_pages": 47 + 122 + 5}


def test_reclaim_compaction_and_merging_have_causes_of_their_own() -> None:
    """27: bytes written to make room, and to put extents together, are counted apart."""
    rig = make_engine(MIB, devices=[9])
    space, counters = rig.space(), Counters(rig)
    device = rig.devices[0]
    slots = np.concatenate([rig.put(space, pages_of("noise", 4, 4 * i)) for i in range(170)])
    risen = counters.risen()
    assert risen["store_pages"] == 680
    assert risen["reclaim_bytes"] == device.written > 0
    assert set(risen) == {"store_pages", "reclaim_bytes", "writeback_pages"}
    on_device = slots[[tag is Tag.PHYS for tag in rig.tags(slots)]]
    rig.free(space, np.delete(on_device, np.arange(0, len(on_device), 9)))
    counters.risen()
    begin = device.written
    done = rig.shrink()
    risen = counters.risen()
    assert "merging extents" in done
    assert risen["device_compact_bytes"] == device.written - begin
    rig.free(space, slots[-120::2])
    counters.risen()
    assert run(rig.engine.compact()).moved_bytes == counters.risen()["compact_bytes"]


def test_every_byte_written_to_a_device_has_a_cause() -> None:
    """27: the causes add up to what the devices were written, failures aside."""
    rig = make_engine(MIB, devices=[24])
    first, space = rig.devices[0], rig.space()
    for turn in range(120):
        rig.put(space, pages_of("noise", 4, 4 * turn))
    rig.writeback(SEGMENT_BYTES)
    rig.set(pool_enabled=False)
    rig.put(space, pages_of("text", 30))
    second = rig.swapon(40)
    rig.swapoff(first)
    stats = rig.engine.snapshot().stats
    causes = (
        stats.writeback_bytes,
        stats.reclaim_bytes,
        stats.fallback_bytes,
        stats.swapoff_bytes,
        stats.device_compact_bytes,
    )
    assert sum(causes) == first.written + second.written
    assert all(causes[:4])
