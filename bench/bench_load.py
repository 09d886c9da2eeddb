"""Loads of 64 pages: as they were stored, in random order, zero, and from a swap device."""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import rig
from bench.rig import Rig
from vswapd.capture import PAGE_BYTES, Pages
from vswapd_backends.base import U64, run
from vswapd_blockdev.device import BlockDevice
from vswapd_blockdev.sealed import SealedDevice
from vswapd_blockdev.swapfile import SwapFile

GROUP = "load 64 pages"


def in_turn(benchmark: BenchmarkFixture, bench_rig: Rig, batches: list[U64]) -> None:
    """Measure loads of all batches in turn."""
    engine, space = bench_rig.engine, bench_rig.space
    turn = iter(range(1 << 62))
    bench_rig.load(batches)
    benchmark(lambda: run(engine.load(space, batches[next(turn) % len(batches)])))


def bench_in_order(benchmark: BenchmarkFixture, bench_rig: Rig, stored: list[U64]) -> None:
    benchmark.group = GROUP
    in_turn(benchmark, bench_rig, stored)


def bench_random(benchmark: BenchmarkFixture, bench_rig: Rig, stored: list[U64]) -> None:
    benchmark.group = GROUP
    in_turn(benchmark, bench_rig, rig.batches_of(rig.shuffled(stored)))


def bench_zero(benchmark: BenchmarkFixture, bench_rig: Rig) -> None:
    benchmark.group = GROUP
    in_turn(benchmark, bench_rig, bench_rig.store([bytes(rig.FOLIO * PAGE_BYTES)] * 64))


@pytest.mark.parametrize("size", [1, 16, 512])
def bench_batch(benchmark: BenchmarkFixture, bench_rig: Rig, pages: Pages, size: int) -> None:
    benchmark.group = "load a batch of another size"
    in_turn(benchmark, bench_rig, bench_rig.store(rig.folios_of(pages, size)[:256]))


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
@pytest.mark.parametrize("order", ["in_order", "random"])
def bench_device(
    benchmark: BenchmarkFixture,
    bench_rig: Rig,
    stored: list[U64],
    tmp_path: Path,
    order: str,
    *,
    encrypted: bool,
) -> None:
    benchmark.group = "load 64 pages from a swap file"
    file = SwapFile.open(str(tmp_path / "swap"), size=64 << 20, encrypted=encrypted)
    device: BlockDevice = SealedDevice(file) if encrypted else file
    bench_rig.engine.swapon(device, 0)
    run(bench_rig.engine.writeback(1 << 40))
    assert bench_rig.engine.snapshot().slots.zswap == 0
    batches = stored if order == "in_order" else rig.batches_of(rig.shuffled(stored))
    in_turn(benchmark, bench_rig, batches)
    device.close()
