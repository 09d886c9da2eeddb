"""Writeback and compaction by the extent, on a device that takes no time."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import rig
from bench.rig import Rig
from vswapd_backends.base import U64, run
from vswapd_blockdev.device import EXTENT_BYTES
from vswapd_blockdev.memory import MemoryDevice


def bench_write_extent(benchmark: BenchmarkFixture, bench_rig: Rig, folios: list[bytes]) -> None:
    benchmark.group = "write one extent back"
    engine = bench_rig.engine
    engine.swapon(MemoryDevice(1024), 0)
    slots: list[U64] = []

    def setup() -> None:
        if engine.snapshot().pool.live_bytes < 2 * EXTENT_BYTES:
            bench_rig.free(slots)
            bench_rig.shrink()
            slots[:] = bench_rig.store(folios)

    done = rig.by_the_round(benchmark, lambda: run(engine.writeback(1)), setup=setup, rounds=128)
    assert done.bytes > EXTENT_BYTES // 2


@pytest.mark.parametrize("freed", [0.5, 0.75], ids=["half_freed", "three_quarters_freed"])
def bench_compact(
    benchmark: BenchmarkFixture, bench_rig: Rig, folios: list[bytes], freed: float
) -> None:
    benchmark.group = f"compact a pool of {len(folios) * rig.FOLIO} pages"
    engine = bench_rig.engine
    slots: list[U64] = []

    def setup() -> None:
        bench_rig.free(slots)
        order = rig.shuffled(bench_rig.store(folios))
        cut = int(len(order) * freed)
        bench_rig.free(rig.batches_of(order[:cut]))
        slots[:] = rig.batches_of(order[cut:])

    done = rig.by_the_round(benchmark, lambda: run(engine.compact()), setup=setup, rounds=8)
    assert done.moved_bytes
