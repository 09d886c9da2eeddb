"""The engine against a plain dict, step by step, with every invariant checked after every step.

A step is one request or one act of steering, run to its end; what happens while operations overlap
is test_interleaving's. `VSWAPD_STATE_MACHINE=long` runs far more and other examples.

Invariants (numbers as in the list of what must hold):
- 1, 3, 5, 10: all sums agree after each step, and nothing is left when all is freed.
- 4, 8, 15, 16: each id answers with exactly its page, or with the one right error.
- 25: only pages whose bytes were flipped, or whose read fails, are lost; never other bytes.
- 27: bytes written to devices are the sum of their causes.
"""

from __future__ import annotations

import contextlib
import os
import random
from functools import partial
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from support.engine import (
    DAY,
    KIB,
    KINDS,
    MIB,
    ZERO,
    Rig,
    UnkindDevice,
    ids,
    make_engine,
    page,
)
from vswap.protocol import Reason
from vswapd.errors import (
    BadSlotError,
    DuplicateSlotError,
    EngineError,
    PageLostError,
    SwapoffError,
    UnbackedError,
)
from vswapd.groups import Space
from vswapd.ledger import Ledger, shared_region
from vswapd.settings import GroupLimits
from vswapd.swap_table import Tag
from vswapd_backends.base import U64, run

LONG: Final = os.environ.get("VSWAPD_STATE_MACHINE") == "long"
PROFILE: Final = settings(
    max_examples=2000 if LONG else 80,
    stateful_step_count=80 if LONG else 50,
    deadline=None,
    derandomize=not LONG,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
SEEDS: Final = st.integers(0, 1 << 20)
FOLIOS: Final = st.one_of(
    st.lists(
        st.tuples(
            st.sampled_from(KINDS), st.one_of(st.integers(1, 12), st.integers(1, 12), st.just(150))
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(KINDS).map(lambda kind: [(kind, 1)]),
)
SIZES: Final = st.sampled_from([0, 64 * KIB, 300 * KIB, 700 * KIB, MIB, 2 * MIB])
LIMITS: Final = st.sampled_from([None, None, 0, 20 * KIB, 200 * KIB, 800 * KIB])
CODECS: Final = ("lz4", "lz4hc:3", "zstd:1")
GROUPS: Final = ("0", "7")


class EngineMachine(RuleBasedStateMachine):
    """Requests of several spaces in two groups, steering, faults."""

    rig: Rig

    def __init__(self) -> None:
        super().__init__()
        self.spaces: list[Space] = []
        self.model: dict[int, dict[int, bytes | None]] = {}
        """Per space: slot -> page; None: UNBACKED."""
        self.gone: list[int] = []
        """Ids that were freed."""
        self.damaged: set[int] = set()
        self.made = 0
        self.steps = 0
        self.written_off = 0
        """Bytes written to devices that are gone."""
        self.counted = 0
        """Bytes written by engines that are gone."""
        self.pool_before = 0

    # Beginning and end

    @initialize(pool_max=SIZES, devices=st.lists(st.integers(1, 12), max_size=2))
    def begin(self, pool_max: int, devices: list[int]) -> None:
        self.rig = make_engine(pool_max, devices=devices)
        self.open_space(0)

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        self.rig.set(store_enabled=True)
        for device in self.rig.devices:
            device.fails = None
        for space in list(self.spaces):
            self._check_pages(space)
            self.rig.close(space)
        self.rig.settle()
        picture = self.rig.engine.snapshot()
        assert not (problems := self.rig.sums()), problems
        assert (picture.slots.allocated, picture.table_bytes, picture.pool.bytes) == (0, 0, 0)
        assert not any(device.used_bytes for device in picture.devices)

    # Helpers

    def _pages(self, folio: list[tuple[str, int]]) -> list[bytes]:
        pages = []
        for kind, count in folio:
            for _ in range(count):
                self.made += 1
                pages.append(page(kind, self.made % 1500))
        return pages

    def _space(self, seed: int) -> Space:
        return self.spaces[seed % len(self.spaces)]

    def _some(self, space: Space, seed: int, *, most: int = 60) -> U64:
        """Distinct slots of a space, in any order; perhaps none."""
        slots = sorted(self.model[space.id])
        chooser = random.Random(seed)
        count = min(len(slots), chooser.choice([1, 1, 3, 10, most, most, 10 * most]))
        if chooser.random() < 0.5 and slots:
            first = chooser.randrange(len(slots) - count + 1)
            return ids(*slots[first : first + count])
        return ids(*chooser.sample(slots, count))

    def _words(self) -> dict[int, bytes]:
        """Every allocated word, as bytes."""
        return {
            space.id: self.rig.words(ids(*sorted(self.model[space.id]))).tobytes()
            for space in self.spaces
        }

    # Requests

    @precondition(lambda self: len(self.spaces) < 4)
    @rule(seed=SEEDS)
    def open_space(self, seed: int) -> None:
        space = self.rig.space(GROUPS[seed % 2])
        self.spaces.append(space)
        self.model[space.id] = {}

    @precondition(lambda self: len(self.spaces) > 1)
    @rule(seed=SEEDS)
    def close_space(self, seed: int) -> None:
        space = self._space(seed)
        some = ids(*sorted(self.model[space.id])[:5])
        self.rig.close(space)
        self.spaces.remove(space)
        self._forget(self.model.pop(space.id))
        if len(some):
            with pytest.raises(BadSlotError):
                self.rig.load(space, some)
        with pytest.raises(BadSlotError):
            self.rig.store(space, [ZERO])

    def _forget(self, slots: dict[int, bytes | None]) -> None:
        self.gone += list(slots)[:20]
        self.damaged -= set(slots)

    @rule(seed=SEEDS, folio=FOLIOS)
    def store_new(self, seed: int, folio: list[tuple[str, int]]) -> None:
        space, pages = self._space(seed), self._pages(folio)
        stored = self.rig.store(space, pages)
        if stored.reason is not None:
            assert len(stored.slots) == 0
            self._check_reason(stored.reason, pages)
            return
        slots = stored.slots.tolist()
        assert len(set(slots)) == len(pages)
        assert not any(slot in held for held in self.model.values() for slot in slots)
        self.gone = [slot for slot in self.gone if slot not in set(slots)]
        self.model[space.id].update(zip(slots, pages, strict=True))

    @rule(seed=SEEDS, kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))
    def overwrite(self, seed: int, kinds: list[str]) -> None:
        space = self._space(seed)
        slots = self._some(space, seed)
        if not len(slots):
            return
        pages = self._pages([(kinds[i % len(kinds)], 1) for i in range(len(slots))])
        stored = self.rig.store(space, pages, slots)
        assert stored.slots.tolist() == slots.tolist()
        self.damaged -= set(slots.tolist())
        if stored.reason is not None:
            self._check_reason(stored.reason, pages)
            pages_now: list[bytes | None] = [None] * len(slots)
            with pytest.raises(UnbackedError) as caught:
                self.rig.load(space, slots)
            assert caught.value.slots.tolist() == slots.tolist()
        else:
            pages_now = list(pages)
        self.model[space.id].update(zip(slots.tolist(), pages_now, strict=True))

    def _check_reason(self, reason: Reason, pages: list[bytes]) -> None:
        """The reason can be one that an operator would agree with."""
        core = self.rig.engine.core
        now = core.settings
        assert (reason is Reason.DISABLED) == (not now.store_enabled)
        if reason is Reason.DISABLED:
            return
        assert any(any(page) for page in pages), "a folio of zero pages was rejected"
        devices = bool(self.rig.devices)
        limits = [*now.groups.values(), now.default_group]
        off = not now.pool_enabled or not now.pool_max or any(g.pool_max == 0 for g in limits)
        limited = any(g.pool_max is not None or g.device_max is not None for g in limits)
        possible = {
            Reason.POOL_FULL: not devices,
            Reason.NO_DEVICE: not devices and off,
            Reason.DEVICE_FULL: devices,
            Reason.GROUP_LIMIT: limited,
            Reason.WRITEBACK_DISABLED: devices and any(not g.writeback for g in limits),
            Reason.WRITE_BUDGET: devices and now.write_budget > 0,
        }
        assert possible[reason], reason

    @rule(seed=SEEDS, twice=st.booleans())
    def load(self, seed: int, *, twice: bool) -> None:
        space = self._space(seed)
        slots = self._some(space, seed)
        if twice and len(slots):
            slots = np.concatenate((slots, slots[:3]))
        expected = [self.model[space.id][slot] for slot in slots.tolist()]
        unbacked = [s for s, p in zip(slots.tolist(), expected, strict=True) if p is None]
        if unbacked:
            with pytest.raises(UnbackedError) as caught:
                self.rig.load(space, slots)
            assert caught.value.slots.tolist() == unbacked
            return
        try:
            found = self.rig.load(space, slots)
        except PageLostError as error:
            self._check_lost(slots, error.slots)
        else:
            assert found == expected
            assert not self.damaged & set(slots.tolist())

    def _check_lost(self, slots: U64, lost: U64) -> None:
        asked, named = set(slots.tolist()), set(lost.tolist())
        assert named
        assert len(named) == len(lost)
        assert named <= asked
        assert self.damaged & asked <= named
        others = ids(*(named - self.damaged))
        if all(device.fails is None for device in self.rig.devices):
            assert not len(others)
        assert all(tag is Tag.PHYS for tag in self.rig.tags(others))

    @rule(seed=SEEDS)
    def free(self, seed: int) -> None:
        space = self._space(seed)
        slots = self._some(space, seed)
        self.rig.free(space, slots)
        self._forget({slot: self.model[space.id].pop(slot) for slot in slots.tolist()})

    @rule(
        seed=SEEDS,
        at=st.sampled_from([0, 1, -1]),
        verb=st.sampled_from(["store", "load", "free"]),
        alone=st.booleans(),
    )
    def bad_slot(self, seed: int, at: int, verb: str, *, alone: bool) -> None:
        """A freed, stale, foreign or made-up slot anywhere in a request: nothing changes."""
        space = self._space(seed)
        foreign = [s for i, held in self.model.items() if i != space.id for s in list(held)[:3]]
        bad = [*self.gone[-3:], *foreign[:3], 0, 1 << 63, (1 << 64) - 1, seed]
        slots = [s for s in self._some(space, seed, most=4).tolist()[:6] if s not in bad]
        wrong = bad[seed % len(bad)]
        if wrong in self.model[space.id]:
            return
        if alone:
            slots.clear()
        slots.insert(at % (len(slots) + 1), wrong)
        self._expect(BadSlotError, space, slots, verb, named=[wrong])

    @rule(seed=SEEDS, verb=st.sampled_from(["store", "free"]))
    def twice(self, seed: int, verb: str) -> None:
        """A slot that stands twice in one folio: nothing changes."""
        space = self._space(seed)
        slots = self._some(space, seed, most=4).tolist()[:6]
        if slots:
            double = slots[seed % len(slots)]
            self._expect(DuplicateSlotError, space, [*slots, double], verb, named=[double])

    def _expect(
        self, kind: type[EngineError], space: Space, slots: list[int], verb: str, named: list[int]
    ) -> None:
        before = self._words()
        call = getattr(self.rig, verb)
        if verb == "store":
            call = partial(self.rig.store, space, self._pages([("text", len(slots))]), slots)
        else:
            call = partial(call, space, slots)
        with pytest.raises(kind) as caught:
            call()
        assert caught.value.slots.tolist() == named
        assert self._words() == before

    # Steering

    @rule(nbytes=st.sampled_from([1, 300 * KIB, 1 << 40]))
    def writeback(self, nbytes: int) -> None:
        written = self.rig.writeback(nbytes)
        assert written.stopped is not None or written.bytes >= nbytes
        if not self.rig.devices:
            assert (written.bytes, written.pages) == (0, 0)

    @rule(scans=st.integers(1, 20))
    def shrink(self, scans: int) -> None:
        shrinker = self.rig.engine.shrinker
        for _ in range(scans):
            count = shrinker.count()
            if not count:
                assert shrinker.doing == "idle"
                break
            run(shrinker.scan(count))

    @rule()
    def compact(self) -> None:
        before = self.rig.pool_bytes
        result = run(self.rig.engine.compact())
        assert self.rig.pool_bytes == before - result.freed_bytes
        assert result.freed_bytes >= 0

    @rule(codec=st.sampled_from(CODECS))
    def switch_codec(self, codec: str) -> None:
        self.rig.set(codec=codec)

    @rule(dense=st.sampled_from(["", "zstd:1", "zstd:3", "lz4hc:9"]))
    def switch_dense(self, dense: str) -> None:
        self.rig.set(dense=dense)

    @rule()
    def recompress(self) -> None:
        before = self.rig.engine.core.zswap.total_live_bytes
        run(self.rig.engine.shrinker.recompression.step(young=True))
        assert self.rig.engine.core.zswap.total_live_bytes <= before

    @precondition(lambda self: len(self.rig.devices) < 3)
    @rule(extents=st.integers(1, 14), priority=st.integers(-1, 1))
    def swapon(self, extents: int, priority: int) -> None:
        self.made += 1
        self.rig.swapon(extents, priority, f"late{self.made}")

    @precondition(lambda self: bool(self.rig.devices))
    @rule(seed=SEEDS, give_up=st.booleans())
    def swapoff(self, seed: int, *, give_up: bool) -> None:
        device = self.rig.devices[seed % len(self.rig.devices)]
        before = self.rig.device_of(device).live_entries.sum()
        written = device.written
        try:
            drained = self.rig.swapoff(device, give_up=give_up)
        except SwapoffError:
            assert self.rig.device_of(device).state in {"on", "failing"}
            self._given_up(device, give_up=give_up)
            return
        self._given_up(device, give_up=give_up)
        assert sum(drained) == before
        assert give_up or not drained.lost
        assert device.closed
        self.written_off += written

    def _given_up(self, device: UnkindDevice, *, give_up: bool) -> None:
        """What is lost for good was damaged, or could not be read."""
        slots = np.array([slot for held in self.model.values() for slot in held], np.uint64)
        lost = {
            slot
            for slot, tag in zip(slots.tolist(), self.rig.tags(slots), strict=True)
            if tag is Tag.LOST
        }
        assert lost <= self.damaged or (give_up and device.fails is not None)
        self.damaged |= lost

    @rule(pool_max=SIZES)
    def limit_pool(self, pool_max: int) -> None:
        self.rig.set(pool_max=pool_max)

    @rule(
        group=st.sampled_from(GROUPS), pool_max=LIMITS, device_max=LIMITS, writeback=st.booleans()
    )
    def limit_group(
        self, group: str, pool_max: int | None, device_max: int | None, *, writeback: bool
    ) -> None:
        limits = GroupLimits(pool_max=pool_max, device_max=device_max, writeback=writeback)
        now = dict(self.rig.engine.core.settings.groups)
        self.rig.set(groups={**now, group: limits})

    @rule(
        setting=st.sampled_from(
            [
                ("pool_enabled", False),
                ("pool_enabled", True),
                ("store_enabled", False),
                ("store_enabled", True),
                ("store_enabled", True),
                ("verify", "always"),
                ("verify", "never"),
                ("shrinker_enabled", False),
                ("shrinker_enabled", True),
                ("idle_age", 0.0),
                ("idle_age", 30.0),
                ("shrinker_rate", 0),
                ("shrinker_rate", MIB),
                ("write_budget", 0),
                ("write_budget", MIB),
                ("write_budget", 100 * KIB),
            ]
        )
    )
    def change(self, setting: tuple[str, Any]) -> None:
        self.rig.set(**{setting[0]: setting[1]})

    @rule(seconds=st.sampled_from([0.5, 10.0, 100.0, DAY]))
    def advance(self, seconds: float) -> None:
        self.rig.clock.advance(seconds)

    # Faults

    @precondition(lambda self: bool(self.rig.devices))
    @rule(seed=SEEDS, kind=st.sampled_from(["read", "write"]), after=st.integers(1, 6))
    def fail(self, seed: int, kind: str, after: int) -> None:
        """The n-th read or write from now on fails, and all that follow for a while."""
        device = self.rig.devices[seed % len(self.rig.devices)]
        first = (device.reads if kind == "read" else device.writes) + after
        last = first + seed % 3 * 5
        device.fails = lambda what, nth: what == kind and first <= nth <= last

    @rule()
    def mend(self) -> None:
        for device in self.rig.devices:
            device.fails = None

    @rule(seed=SEEDS)
    def flip_byte(self, seed: int) -> None:
        """A byte of an entry on a device is not what it was."""
        space = self._space(seed)
        slots = self._some(space, seed)
        on_device = [
            slot
            for slot, tag in zip(slots.tolist(), self.rig.tags(slots), strict=True)
            if tag is Tag.PHYS and slot not in self.damaged
        ]
        if on_device:
            self.rig.damage(on_device[0], byte=seed % 9)
            self.damaged.add(on_device[0])

    @rule()
    def recover(self) -> None:
        self._recover()

    def _recover(self) -> None:
        """The process is killed: all is as it was, ids and charges and ages included."""
        before = self._picture()
        self.counted += self._caused()
        pool = self.rig.pool_bytes
        self.rig.recover()
        there = self.rig.engine.core.spaces
        assert sorted(there) == sorted(self.model)
        self.spaces = [there[space.id] for space in self.spaces]
        assert self._picture() == before
        assert self.rig.pool_bytes <= pool
        for space in self.spaces:
            assert not space.attached

    def _picture(self) -> list[object]:
        """All that is to outlive a process."""
        core = self.rig.engine.core
        zswap = core.zswap
        segments = zswap.oldest_first()
        return [
            self._words(),
            core.slot_counts[1:].tolist(),
            [(g.name, g.index, g.pool_bytes, g.device_bytes, g.spaces) for g in core.groups],
            [
                (
                    (s.id, s.group.name, s.uid, s.opened_at),
                    (s.zero_pages, s.backed_pages, s.compressed_bytes),
                    (s.slots.slots, sorted(s.slots.clusters)),
                )
                for s in sorted(core.spaces.values(), key=lambda space: space.id)
            ],
            [(pool.codec.spec, pool.entries, pool.live_bytes) for pool in zswap.pools],
            [(s, zswap.age_of(s), zswap.stream_of(s)) for s in segments.tolist()],
            zswap.stamps_of(segments).tolist(),
            zswap.live_bytes[segments].tolist(),
            zswap.live_entries[segments].tolist(),
            zswap._sequence,
            (core.clusters.retired, core.clusters.in_use),
            [
                (
                    (d.index, d.device.path, d.priority, d.added, d.map.bad),
                    (d.live_bytes.tolist(), d.live_entries.tolist()),
                    (d.sequence.tolist(), d.pool.tolist(), d.group.tolist()),
                )
                for d in core.devices
            ],
            core.budget_left(),
        ]

    # After every step

    @invariant()
    def all_holds(self) -> None:
        if not self.spaces:
            return
        self.steps += 1
        rig = self.rig
        assert not (problems := rig.sums()), problems
        for space in self.spaces:
            self._check_states(space)
            self._check_pages(space)
        self._check_limits()
        self._check_causes()
        if self.steps % 5 == 0:
            self._check_verify()

    def _check_states(self, space: Space) -> None:
        held = self.model[space.id]
        slots = ids(*sorted(held))
        for slot, tag in zip(slots.tolist(), self.rig.tags(slots), strict=True):
            content = held[slot]
            if content is None:
                assert tag is Tag.UNBACKED
            elif content == ZERO:
                assert tag is Tag.ZERO
            elif slot in self.damaged:
                assert tag in {Tag.ZSWAP, Tag.PHYS, Tag.LOST}
            else:
                assert tag in {Tag.ZSWAP, Tag.PHYS}
        assert space.slots.slots == len(held)

    def _check_pages(self, space: Space) -> None:
        held = {s: p for s, p in self.model[space.id].items() if p is not None}
        slots = sorted(held)
        found = self.rig.peek(space, ids(*slots))
        for slot, got in zip(slots, found, strict=True):
            assert got == (None if slot in self.damaged else held[slot])

    def _check_limits(self) -> None:
        """What the pool occupies only grows up to the limit."""
        now = self.rig.pool_bytes
        assert now <= max(self.rig.engine.core.settings.pool_max, self.pool_before)
        self.pool_before = now

    def _caused(self) -> int:
        """What this engine has counted of bytes written to devices."""
        stats = self.rig.engine.snapshot().stats
        return (
            stats.writeback_bytes
            + stats.reclaim_bytes
            + stats.fallback_bytes
            + stats.swapoff_bytes
            + stats.device_compact_bytes
        )

    def _check_causes(self) -> None:
        assert self.counted + self._caused() == self.written_off + sum(
            d.written for d in self.rig.devices
        )

    def _check_verify(self) -> None:
        faults = [(device, device.fails) for device in self.rig.devices]
        before = [(d, d.read_errors) for d in self.rig.engine.core.devices]
        for device in self.rig.devices:
            device.fails = None
        report = self.rig.verify()
        for device, fails in faults:
            device.fails = fails
        assert [(d, d.read_errors) for d in self.rig.engine.core.devices] == before
        assert report.slots == sum(map(len, self.model.values()))
        tags = self.rig.tags(ids(*self.damaged))
        assert report.ok == all(tag is Tag.LOST for tag in tags), report.problems


class _Both(Rig):
    """An engine, and another shard's that is told the same."""

    other: Rig

    def set(self, **changes: Any) -> None:
        super().set(**changes)
        self.other.set(**changes)


class ShardMachine(EngineMachine):
    """The same beside another shard, which stores, frees and moves pages within the same limits."""

    other: Rig

    @initialize(pool_max=SIZES, devices=st.lists(st.integers(1, 12), max_size=2))
    def begin(self, pool_max: int, devices: list[int]) -> None:
        region = shared_region(2)
        one = make_engine(pool_max, ledger=Ledger(region, 0))
        rig = _Both(one.engine, one.clock)
        self.rig = rig
        rig.other = self.other = make_engine(
            pool_max, clock=one.clock, ledger=Ledger(region, 1), devices=devices
        )
        for extents in devices:
            rig.swapon(extents)
        self.theirs = [(group, self.other.space(group)) for group in GROUPS]
        self.held: list[tuple[Space, U64]] = []
        self.before = self._held_in_sum()
        self.open_space(0)

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            for _, space in self.theirs:
                self.other.close(space)
            self.other.settle()
            self.other.check()
        super().teardown()

    @rule(seed=SEEDS, kind=st.sampled_from(KINDS), count=st.sampled_from([1, 12, 60, 150]))
    def other_stores(self, seed: int, kind: str, count: int) -> None:
        _, space = self.theirs[seed % 2]
        stored = self.other.store(space, self._pages([(kind, count)]))
        if stored.reason is None:
            self.held.append((space, stored.slots))

    @precondition(lambda self: bool(self.held))
    @rule(seed=SEEDS)
    def other_frees(self, seed: int) -> None:
        space, slots = self.held.pop(seed % len(self.held))
        self.other.free(space, slots)

    @rule(nbytes=st.sampled_from([1, 300 * KIB, 1 << 40]))
    def other_writes_back(self, nbytes: int) -> None:
        self.other.writeback(nbytes)

    @precondition(lambda self: bool(self.other.devices))
    @rule()
    def other_swaps_off(self) -> None:
        with contextlib.suppress(SwapoffError):
            self.other.swapoff(self.other.devices[0])
            self.other.swapon(12)

    @rule()
    def other_shrinks(self) -> None:
        shrinker = self.other.engine.shrinker
        if count := shrinker.count():
            run(shrinker.scan(count))
        run(self.other.engine.compact())
        run(shrinker.recompression.step(young=True))

    def _held_in_sum(self) -> dict[str, int]:
        """What both hold of all that is limited."""
        both = self.rig.engine.core, self.other.engine.core
        held = {"pool": sum(core.zswap.in_use_bytes for core in both)}
        for name in GROUPS:
            groups = [core.groups.get(name) for core in both]
            held[f"{name} in pools"] = sum(group.pool_bytes for group in groups)
            held[f"{name} on devices"] = sum(group.device_bytes for group in groups)
        return held

    def _check_limits(self) -> None:
        """Of all shards together nothing grows beyond its limit, and the books of both agree."""
        self.other.check()
        settings = self.rig.engine.core.settings
        limits: dict[str, int | None] = {"pool": settings.pool_max}
        for name in GROUPS:
            limits[f"{name} in pools"] = settings.limits_of(name).pool_max
            limits[f"{name} on devices"] = settings.limits_of(name).device_max
        now = self._held_in_sum()
        for what, held in now.items():
            limit = limits[what]
            assert limit is None or held <= max(limit, self.before[what]), what
        self.before = now


class KilledMachine(EngineMachine):
    """The same, killed after every third step."""

    @invariant()
    def all_survives(self) -> None:
        if self.spaces and self.steps % 3 == 0:
            self._recover()


def test_engine_agrees_with_a_dict_however_often_it_is_killed() -> None:
    """The same for an engine that is killed, and recovered, again and again."""
    run_state_machine_as_test(KilledMachine, settings=PROFILE)


def test_engine_agrees_with_a_dict_beside_another_shard() -> None:
    """The same for one of two shards: no limit is passed in sum, and their ledger agrees."""
    run_state_machine_as_test(ShardMachine, settings=PROFILE)


def test_engine_agrees_with_a_dict() -> None:
    """Whatever is done to it, each slot answers with its page, and every sum agrees."""
    run_state_machine_as_test(EngineMachine, settings=PROFILE)
