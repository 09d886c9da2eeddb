"""The logs of compressed pages against a plain list of what is alive."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from support.engine import MIB, page
from support.pages import compress
from vswapd_backends.base import I64, SEGMENT_BYTES, Places
from vswapd_backends.zpool import ZPool
from vswapd_backends.zswap import Stream, Zswap


@dataclass
class Held:
    """An entry that is alive, and what it should say."""

    place: int
    length: int
    content: bytes
    number: int
    stream: Stream


@dataclass
class Model:
    held: list[Held] = field(default_factory=list)
    pins: list[int] = field(default_factory=list)


class ZswapMachine(RuleBasedStateMachine):
    """Appends to several streams, deaths, pins and seals, against a list of what is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.zswap = Zswap(ZPool(2 * MIB), "lz4")
        self.model = Model()
        self.made = 0
        self.now = 0.0

    @rule(
        group=st.integers(0, 2),
        spec=st.sampled_from(["lz4", "zstd:1"]),
        kind=st.sampled_from(["text", "noise", "repeat"]),
        count=st.sampled_from([1, 2, 30, 64, 400]),
    )
    def append(self, group: int, spec: str, kind: str, count: int) -> None:
        pages = [page(kind, (self.made + i) % 1000) for i in range(count)]
        compressed = compress(self.zswap, pages, spec)
        if not self.zswap.has_segments_for(compressed):
            return
        before = self.zswap.resident_bytes
        numbers = np.arange(self.made, self.made + count, dtype=np.int64)
        self.now += 1
        places = self.zswap.append(group, numbers, compressed, self.now)
        self.made += count
        assert self.zswap.resident_bytes <= before + self.zswap.growth(compressed)
        stream = (compressed.pool, group)
        self.model.held += [
            Held(*row, stream)
            for row in zip(
                places.address.tolist(),
                places.length.tolist(),
                pages,
                numbers.tolist(),
                strict=True,
            )
        ]

    @precondition(lambda self: self.model.held)
    @rule(seed=st.integers(0, 1 << 16), share=st.sampled_from([0.02, 0.5, 0.9, 1.0]))
    def give_up(self, seed: int, share: float) -> None:
        chooser = random.Random(seed)
        gone = [held for held in self.model.held if chooser.random() < share]
        if not gone:
            return
        self.zswap.give_up(_places(gone))
        dead = {held.place for held in gone}
        self.model.held = [held for held in self.model.held if held.place not in dead]

    @rule(seed=st.integers(0, 100))
    def pin(self, seed: int) -> None:
        segments = self.zswap.all_segments().tolist()
        if segments:
            segment = segments[seed % len(segments)]
            self.zswap.pin(segment)
            self.model.pins.append(segment)

    @precondition(lambda self: self.model.pins)
    @rule(seed=st.integers(0, 100))
    def unpin(self, seed: int) -> None:
        self.zswap.unpin(self.model.pins.pop(seed % len(self.model.pins)))

    @rule(seed=st.integers(0, 100))
    def seal(self, seed: int) -> None:
        is_open = [s for s in self.zswap.all_segments().tolist() if self.zswap.is_open(s)]
        if is_open:
            self.zswap.seal(self.zswap.stream_of(is_open[seed % len(is_open)]))

    @rule()
    def trim(self) -> None:
        self.zswap.arena.trim()

    @invariant()
    def counts_agree(self) -> None:
        held = _places(self.model.held)
        shape = self.zswap.arena.segments
        entries = np.bincount(held.number, minlength=shape)
        assert (self.zswap.live_entries == entries).all()
        lengths = np.bincount(held.number, held.length, minlength=shape)
        assert (self.zswap.live_bytes == lengths).all()
        assert self.zswap.total_entries == len(self.model.held)
        assert sum(pool.entries for pool in self.zswap.pools) == len(self.model.held)
        assert self.zswap.arena.resident_bytes == self.zswap.arena.region.resident_bytes

    @invariant()
    def segments_are_those_that_live_or_are_pinned(self) -> None:
        wanted = {held.place // SEGMENT_BYTES for held in self.model.held} | set(self.model.pins)
        assert set(self.zswap.all_segments().tolist()) == wanted
        assert self.zswap.arena.in_use == len(wanted)

    @invariant()
    def entries_are_where_they_were(self) -> None:
        places = _places(self.model.held)
        assert self.zswap.wrong(places.address, places.length) == []
        if self.model.held:
            found = [bytes(got) for got in self.zswap.read(places.address, places.length)]
            assert found == [held.content for held in self.model.held]
        directories = {s: self.zswap.directory(s) for s in self.zswap.all_segments().tolist()}
        listed = {
            (segment * SEGMENT_BYTES + offset, number)
            for segment, directory in directories.items()
            for number, offset in zip(
                directory.numbers.tolist(), directory.offsets.tolist(), strict=True
            )
        }
        assert {(held.place, held.number) for held in self.model.held} <= listed

    @invariant()
    def each_stream_is_in_the_order_of_its_appends(self) -> None:
        """Walking a stream's segments by age meets its entries in the order of their numbers."""
        for stream in {held.stream for held in self.model.held}:
            rank = {s: i for i, s in enumerate(self.zswap.oldest_first(stream).tolist())}
            mine = [h for h in self.model.held if h.stream == stream]
            walked = [
                (rank[h.place // SEGMENT_BYTES], h.place)
                for h in mine
                if h.place // SEGMENT_BYTES in rank
            ]
            assert walked == sorted(walked)


def _places(held: list[Held]) -> Places:
    address: I64 = np.array([entry.place for entry in held], np.int64)
    return Places(address, np.array([entry.length for entry in held], np.int64))


def test_logs_agree_with_a_list() -> None:
    """Whatever is appended, given up, pinned and sealed, counts and bytes are those of a list."""
    run_state_machine_as_test(
        ZswapMachine,
        settings=settings(
            max_examples=30,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
        ),
    )
