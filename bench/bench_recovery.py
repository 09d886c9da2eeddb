"""Recovery: an engine made again from the memory that another one has left, by slots in use."""

from __future__ import annotations

import os
from typing import Final

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.rig import Clock
from vswapd.capture import PAGE_BYTES
from vswapd.clusters import slots_of
from vswapd.memory import ShardMemory
from vswapd.settings import Settings
from vswapd.swap_table import Tag, make_words
from vswapd.vswap import Engine
from vswapd_backends.base import SEGMENT_BYTES, Places, run

_FOLIO: Final = 4096
_SPACES: Final = 16
_ENTRY: Final = 1100
SETTINGS: Final = Settings(pool_max=16 << 30)


def filled(slots: int) -> Engine:
    """An engine with so many slots in use: words of 16 spaces in 4 groups, in random places.

    Stored as zero pages; then two thirds of the words name entries in segments that are all in
    use, of 1100 bytes each, as if they had been compressed. Recovery looks at words and columns
    alone, and the entries would be 7 GB.
    """
    engine = Engine.create(SETTINGS, Clock())
    core = engine.core
    spaces = [engine.open_space(uid=i, group=str(i % 4)) for i in range(_SPACES)]
    zeros = engine.prepare(bytes(_FOLIO * PAGE_BYTES))
    for turn in range(slots // _FOLIO):
        run(engine.store(spaces[turn % _SPACES], zeros))
    numbers = slots_of(core.clusters.open_clusters())
    chooser = np.random.default_rng(0)
    some = numbers[chooser.random(len(numbers)) < 2 / 3]
    per_segment = (SEGMENT_BYTES - 64) // (_ENTRY + 16)
    place = chooser.permutation(len(some))
    address = place // per_segment * SEGMENT_BYTES + 64 + place % per_segment * (_ENTRY + 8)
    lengths = np.full(len(some), _ENTRY)
    core.table.words[some] = make_words(Tag.ZSWAP, Places(address, lengths))
    segments = -(-len(some) // per_segment)
    columns = core.memory.segments
    columns.head[0] = segments
    columns.age[:segments] = np.arange(segments) + 1
    columns.count[:segments] = per_segment
    columns.low[:segments], columns.high[:segments] = 60, 1
    columns.sealed[:segments] = 1
    return engine


def recovered(engine: Engine) -> Engine:
    """Another engine, from the same memory."""
    fds = {kind: os.dup(fd) for kind, fd in engine.core.memory.fds.items()}
    memory = ShardMemory.adopt(fds)
    return Engine.recover(SETTINGS, Clock(), memory=memory, reopen=lambda _: None)


@pytest.mark.parametrize("slots", [1 << 16, 1 << 20])
def bench_recover(benchmark: BenchmarkFixture, slots: int) -> None:
    benchmark.group = "recover an engine"
    engine = filled(slots)
    found = benchmark(lambda: recovered(engine))
    assert int(found.core.slot_counts[1:].sum()) == slots
