"""Stores: the whole of them, and the part that is not the codec's, one folio at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import rig
from bench.rig import Rig
from vswapd.capture import PAGE_BYTES, Pages
from vswapd_backends.base import U64, run

SIZES = [1, 16, 64, 512]


def paced(
    benchmark: BenchmarkFixture, bench_rig: Rig, folios: list[bytes], work: Callable[[int], U64]
) -> None:
    """Measure `work` on all folios in turn; what it has stored is freed in between, unmeasured."""
    for slots in [work(number) for number in range(len(folios))]:
        bench_rig.free([slots])
    stored: list[U64] = []

    def one(number: int) -> None:
        stored.append(work(number))

    turn = iter(range(1 << 62))

    def setup() -> tuple[tuple[int], dict[str, object]]:
        if len(stored) == len(folios):
            bench_rig.free(stored)
            stored.clear()
        return (next(turn) % len(folios),), {}

    rig.by_the_round(benchmark, one, setup=setup, rounds=4 * len(folios))


@pytest.mark.parametrize("size", SIZES)
def bench_store(benchmark: BenchmarkFixture, bench_rig: Rig, pages: Pages, size: int) -> None:
    benchmark.group = "store a folio, codec included"
    folios = rig.folios_of(pages, size)[:256]
    engine, space = bench_rig.engine, bench_rig.space
    paced(
        benchmark,
        bench_rig,
        folios,
        lambda number: run(engine.store(space, engine.prepare(folios[number]))).slots,
    )


@pytest.mark.parametrize("size", SIZES)
def bench_append(benchmark: BenchmarkFixture, bench_rig: Rig, pages: Pages, size: int) -> None:
    benchmark.group = "store a folio that is compressed already: append and publish"
    folios = rig.folios_of(pages, size)[:256]
    engine, space = bench_rig.engine, bench_rig.space
    ready = [engine.prepare(folio) for folio in folios]
    paced(
        benchmark,
        bench_rig,
        folios,
        lambda number: run(engine.store(space, ready[number])).slots,
    )


def bench_zero(benchmark: BenchmarkFixture, bench_rig: Rig) -> None:
    benchmark.group = "store a folio, codec included"
    folios = [bytes(rig.FOLIO * PAGE_BYTES)] * 256
    engine, space = bench_rig.engine, bench_rig.space
    paced(
        benchmark,
        bench_rig,
        folios,
        lambda number: run(engine.store(space, engine.prepare(folios[number]))).slots,
    )


def bench_overwrite(benchmark: BenchmarkFixture, bench_rig: Rig, folios: list[bytes]) -> None:
    benchmark.group = "store a folio, codec included"
    engine, space = bench_rig.engine, bench_rig.space
    slots = bench_rig.store(folios)
    turn = iter(range(1 << 62))

    def one() -> None:
        number = next(turn) % len(folios)
        run(engine.store(space, engine.prepare(folios[number]), slots[number]))

    benchmark(one)


def bench_free(benchmark: BenchmarkFixture, bench_rig: Rig, folios: list[bytes]) -> None:
    benchmark.group = "free 64 slots"
    engine, space = bench_rig.engine, bench_rig.space
    ready = [engine.prepare(folio) for folio in folios]
    slots: list[U64] = []

    def setup() -> tuple[tuple[U64], dict[str, object]]:
        if not slots:
            slots.extend(run(engine.store(space, folio)).slots for folio in ready)
        return (slots.pop(),), {}

    rig.by_the_round(benchmark, lambda some: run(engine.free(space, some)), setup=setup, rounds=256)
