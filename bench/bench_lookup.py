"""The table: from slot ids to words and places, 64 at a time, in tables of several sizes."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import rig
from bench.rig import Rig
from vswapd.capture import PAGE_BYTES
from vswapd.swap_table import Tag, all_tagged, make_words, places_of
from vswapd_backends.base import U64

_BULK = 4096


def batches(bench_rig: Rig, count: int) -> list[U64]:
    """64 random slots each, of a table with `count` slots in use."""
    folio = bytes(_BULK * PAGE_BYTES)
    slots = bench_rig.store([folio] * (count // _BULK))
    return rig.batches_of(rig.shuffled(slots)[: 256 * rig.FOLIO])


@pytest.mark.parametrize("count", [16_384, 1 << 20, 10_000_384])
def bench_resolve(benchmark: BenchmarkFixture, bench_rig: Rig, count: int) -> None:
    benchmark.group = "look 64 random slots up"
    some = batches(bench_rig, count)
    core, space = bench_rig.engine.core, bench_rig.space
    turn = iter(range(1 << 62))

    def one() -> bool:
        numbers = core.clusters.resolve(space.id, some[next(turn) % len(some)])
        return all_tagged(core.table.words[numbers], Tag.ZERO)

    assert benchmark(one)


def bench_words(benchmark: BenchmarkFixture, bench_rig: Rig, folios: list[bytes]) -> None:
    benchmark.group = "take 64 words apart and make them again"
    slots = bench_rig.store(folios)[0]
    core, space = bench_rig.engine.core, bench_rig.space
    words = core.table.words[core.clusters.resolve(space.id, slots)]
    made = benchmark(lambda: make_words(Tag.ZSWAP, places_of(words)))
    assert (made == words).all()
