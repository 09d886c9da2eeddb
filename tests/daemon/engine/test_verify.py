"""verify: each kind of damage to table, accounts, pools and devices is found, and named."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from support.engine import MIB, Rig, make_engine, pages_of
from vswapd.groups import Space
from vswapd.swap_table import OFFSET_SHIFT, UNBACKED_WORD, ZERO_WORD, Tag
from vswapd_backends.base import PAGE_BYTES, SEGMENT_BYTES, U64, run
from vswapd_backends.segment import CHECK_BYTES


@dataclass
class Scene:
    """An engine with pages everywhere, by where they lie."""

    rig: Rig
    space: Space
    unbacked: U64
    zero: U64
    zswap: U64
    phys: U64
    other: Space

    def number(self, slot: np.uint64) -> int:
        return int(slot) & ((1 << 40) - 1)

    @property
    def words(self) -> U64:
        return self.rig.engine.core.table.words


def _scene() -> Scene:
    rig = make_engine(8 * MIB, arena_bytes=24 * MIB, devices=[16, 16])
    space, other = rig.space("1"), rig.space("2")
    phys = rig.put(space, pages_of("text", 200))
    rig.writeback()
    zswap = rig.put(space, [*pages_of("text", 100, 300), *pages_of("noise", 100, 300)])
    zero = rig.put(space, pages_of("zero", 20))
    unbacked = rig.put(other, pages_of("text", 5, 700))
    rig.set(store_enabled=False)
    rig.store(other, pages_of("text", 5, 800), unbacked)
    rig.set(store_enabled=True)
    rig.put(other, pages_of("text", 50, 900))
    assert set(rig.tags(phys)) == {Tag.PHYS}
    return Scene(rig, space, unbacked, zero, zswap, phys, other)


def test_a_sound_engine_has_no_problems() -> None:
    """Everything is looked at, and the report says how much that was."""
    scene = _scene()
    report = scene.rig.verify()
    assert report.ok
    assert report.problems == []
    assert report.slots == 200 + 200 + 20 + 5 + 50
    assert report.entries == 200 + 200 + 50
    live = sum(space.compressed_bytes for space in (scene.space, scene.other))
    assert report.checked_bytes == live


def test_an_empty_engine_has_no_problems() -> None:
    """Nothing stored is nothing wrong."""
    report = make_engine(devices=[4]).verify()
    assert (report.ok, report.slots, report.entries, report.checked_bytes) == (True, 0, 0, 0)


def test_looking_changes_nothing() -> None:
    """Words, counters, charges and memory are the same after it."""
    scene = _scene()
    rig = scene.rig
    before = rig.engine.snapshot()
    words = scene.words[: 2 * 512].copy()
    assert rig.verify().ok
    assert rig.engine.snapshot() == before
    assert (scene.words[: 2 * 512] == words).all()


# The accounts

Damage = Callable[[Scene], object]


def _word(scene: Scene, slot: np.uint64, word: np.uint64 | int) -> None:
    scene.words[scene.number(slot)] = word


def _name_another_entry(scene: Scene) -> None:
    """Two words name one entry, and one entry has no word."""
    _word(scene, scene.zswap[3], scene.words[scene.number(scene.zswap[4])])


def _shift_place(scene: Scene) -> None:
    """A word names a place at which no entry begins."""
    word = scene.words[scene.number(scene.zswap[3])] + np.uint64(8 << OFFSET_SHIFT)
    _word(scene, scene.zswap[3], word)


def _other_length(scene: Scene) -> None:
    """A word says another length than the directory does."""
    _word(scene, scene.zswap[3], scene.words[scene.number(scene.zswap[3])] ^ np.uint64(1 << 4))


def _directory(scene: Scene) -> None:
    """A directory entry names another slot."""
    zswap = scene.rig.engine.core.zswap
    number = scene.rig.words(scene.zswap[:1])[0] >> np.uint64(35)
    zswap.arena.words[(int(number) + 1) * (SEGMENT_BYTES // 8) - 1] ^= np.uint64(1)


def _overlap(scene: Scene) -> None:
    """Two words name the same bytes of a device."""
    _word(scene, scene.phys[7], scene.words[scene.number(scene.phys[8])])


def _touch_pool(scene: Scene) -> None:
    """Somebody writes to memory of the pool that nobody was given."""
    scene.rig.engine.core.zswap.arena.bytes[-1] = 1


def _foreign_cluster(scene: Scene) -> None:
    """A cluster belongs to a space that there is not."""
    scene.rig.engine.core.clusters._key[0] += 77


def _add(path: str, index: int | None = None) -> Damage:
    """One more in an account of the engine's core, or of the scene itself."""

    def damage(scene: Scene) -> None:
        at: object = scene
        *way, last = path.split(".")
        for step in way:
            at = at[int(step)] if step.isdigit() else getattr(at, step)  # type: ignore[index]
        if index is None:
            setattr(at, last, getattr(at, last) + 1)
        else:
            getattr(at, last)[index] += 1

    return damage


_CORE = "rig.engine.core."
ACCOUNTS: dict[str, tuple[Damage, str]] = {
    "unbacked count": (_add(_CORE + "slot_counts", Tag.UNBACKED), r"5 slots are UNBACKED, .* 6"),
    "zero count": (_add(_CORE + "slot_counts", Tag.ZERO), r"20 slots are ZERO, .* 21"),
    "zswap count": (_add(_CORE + "slot_counts", Tag.ZSWAP), r"250 slots are ZSWAP, .* 251"),
    "phys count": (_add(_CORE + "slot_counts", Tag.PHYS), r"200 slots are PHYS, .* 201"),
    "cluster count": (_add(_CORE + "clusters._used", 0), "clusters count other numbers of slots"),
    "clusters in use": (_add(_CORE + "clusters.in_use"), r"the table occupies \d+ bytes for \d+"),
    "foreign cluster": (_foreign_cluster, "spaces that do not exist"),
    "a lost word": (lambda s: _word(s, s.zswap[0], 0), "slots are ZSWAP"),
    "a word turned zero": (lambda s: _word(s, s.zswap[0], ZERO_WORD), "slots are ZERO"),
    "a word turned unbacked": (
        lambda s: _word(s, s.phys[0], UNBACKED_WORD),
        "slots are UNBACKED",
    ),
    "a word of no kind": (lambda s: _word(s, s.phys[0], 7), "slots are PHYS"),
    "segment entries": (
        _add(_CORE + "zswap.live_entries", 3),
        "segments count other live entries",
    ),
    "segment bytes": (_add(_CORE + "zswap.live_bytes", 3), "segments count other live entries"),
    "total entries": (_add(_CORE + "zswap.total_entries"), "the pools' totals"),
    "total bytes": (_add(_CORE + "zswap.total_live_bytes"), "the pools' totals"),
    "pool entries": (_add(_CORE + "zswap.pools.0.entries"), "pool lz4 counts other live"),
    "pool bytes": (_add(_CORE + "zswap.pools.0.live_bytes"), "pool lz4 counts other live"),
    "one entry twice": (_name_another_entry, "segments count|directories have"),
    "no entry there": (_shift_place, r"250 words name entries in the pool, directories have 249"),
    "another length": (_other_length, "lengths of words and directory differ"),
    "directory": (_directory, r"250 words name entries in the pool, directories have 249"),
    "pool memory": (_touch_pool, r"the pool occupies \d+ bytes, accounted are \d+"),
    "pool account": (_add(_CORE + "zswap.arena.resident_bytes"), r"the pool occupies"),
    "extent entries": (
        _add(_CORE + "devices._devices.0.live_entries", 0),
        "mem0: extents count other live entries",
    ),
    "extent bytes": (
        _add(_CORE + "devices._devices.1.live_bytes", 2),
        "mem1: extents count other live entries",
    ),
    "extents used": (
        lambda s: s.rig.device_of(s.rig.devices[1]).map.take(),
        "mem1: extents in use are not those with live entries",
    ),
    "overlap": (_overlap, "mem0: 1 entries lie over each other"),
    "space bytes": (_add("space.compressed_bytes"), "space 1 counts other slots or pages"),
    "space pages": (_add("other.backed_pages"), "space 2 counts other slots or pages"),
    "space zero pages": (_add("space.zero_pages"), "space 1 counts other slots or pages"),
    "space slots": (_add("other.slots.slots"), "space 2 counts other slots or pages"),
    "group pool": (_add("space.group.pool_bytes"), "group 1 is charged for other bytes"),
    "group device": (_add("other.group.device_bytes"), "group 2 is charged for other bytes"),
}


@pytest.mark.parametrize("name", ACCOUNTS)
def test_accounts_that_do_not_agree_are_named(name: str) -> None:
    """One word, count or sum that is not what it should be is a problem with its name."""
    damage, expected = ACCOUNTS[name]
    scene = _scene()
    damage(scene)
    problems = scene.rig.sums()
    assert any(re.search(expected, problem) for problem in problems), problems


# The bytes


@pytest.mark.parametrize("where", ["zswap", "phys"])
@pytest.mark.parametrize("byte", [0, CHECK_BYTES - 1, CHECK_BYTES, CHECK_BYTES + 50])
def test_a_flipped_byte_is_found_and_its_slot_named(where: str, byte: int) -> None:
    """Checks of all entries are compared, in the pool and on devices; only the wrong are named."""
    scene = _scene()
    slots = getattr(scene, where)
    for index in (0, 57, 199):
        scene.rig.damage(int(slots[index]), byte=byte)
    report = scene.rig.verify()
    assert len(report.problems) == 1
    place = "in the pool" if where == "zswap" else "on a device"
    assert f"3 entries {place} do not agree with their checksums" in report.problems[0]
    named = re.findall(r"\d+", report.problems[0].rpartition("slot numbers")[2])
    assert [int(number) for number in named] == [scene.number(slots[i]) for i in (0, 57, 199)]
    assert report.entries == 450


def test_an_entry_that_agrees_but_does_not_decompress_is_found() -> None:
    """Bytes that are as they were written, and still no page, are a problem too."""
    scene = _scene()
    core = scene.rig.engine.core
    other = core.zswap.pool_of("zstd:1")
    core.zswap._pool[scene.rig.words(scene.zswap[:1])[0] >> np.uint64(35)] = other.index
    report = scene.rig.verify()
    assert any("in the pool do not agree" in problem for problem in report.problems)


def test_entries_that_cannot_be_read_are_found() -> None:
    """A device that fails to read makes its entries problems, and no others."""
    scene = _scene()
    device = scene.rig.devices[0]
    device.fails = lambda kind, _: kind == "read"
    report = scene.rig.verify()
    assert sum(int(p.split()[0]) for p in report.problems) == 200
    assert all("on a device" in problem for problem in report.problems)
    device.fails = None
    assert scene.rig.verify().ok


def test_a_device_that_returns_an_older_image_is_found() -> None:
    """Bytes that were right for the same slots once, in another image, are not right now."""
    rig = make_engine(8 * MIB, devices=[3])
    space = rig.space()
    slots = rig.put(space, pages_of("noise", 60))
    rig.writeback()
    before = bytes(rig.devices[0].data)
    rig.store(space, pages_of("noise", 60, 100), slots)
    rig.settle()
    rig.writeback()
    assert set(rig.tags(slots)) == {Tag.PHYS}
    assert rig.verify().ok
    rig.devices[0].data[:] = before
    assert not rig.verify().ok


def test_pages_that_move_while_it_looks_are_no_problem() -> None:
    """What is stored, freed and written back between its steps is judged as it is then."""
    rig = make_engine(8 * MIB, arena_bytes=24 * MIB, devices=[32], max_slots=1 << 16)
    space = rig.space()
    slots = rig.put(space, [*pages_of("repeat", 3000), *pages_of("noise", 500)])
    verify = rig.engine.verify()
    steps = 0
    try:
        while True:
            need = next(verify)
            steps += 1
            if hasattr(need, "perform"):
                need.perform()
            rig.free(space, slots[10 * steps : 10 * steps + 5])
            rig.put(space, pages_of("text", 5, 10 * steps))
            run(rig.engine.writeback(PAGE_BYTES))
    except StopIteration as end:
        report = end.value
    assert steps >= 4
    assert report.problems == []
