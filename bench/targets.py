"""What must come out: each figure as a ratio within one run, beside its target.

    python -m bench.targets [--json FILE] [--only NAME] [--directory DIR]

The pages are captured from live processes (see corpora.py). What is compared is measured in turns
after a warm-up, and the median of the rounds' ratios is what counts: absolute times of a shared
machine mean little. The exit code is 0 whether or not a target is met; the table says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import mmap
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it can be run by its path

import lz4.block
import numpy as np

from bench import bench_recovery, corpora, interference, rig
from bench.rig import Rig
from vswapd.capture import PAGE_BYTES
from vswapd.driver import Driver
from vswapd_backends.base import U64, run
from vswapd_blockdev.device import EXTENT_BYTES, BlockDevice
from vswapd_blockdev.header import DATA_OFFSET
from vswapd_blockdev.sealed import SealedDevice
from vswapd_blockdev.swapfile import SwapFile

PAGES: Final = 8192
"""Pages per pass: 32 MiB, more than a cache holds."""
ROUNDS: Final = 15
_WRITE_PAGES: Final = 49_152
_WRITE_ROUNDS: Final = 9
_BULK: Final = 4096
_DISTINCT: Final = 4096
_RECOVERED: Final = 10_002_432
_RECOVERIES: Final = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the table."""

    name: str
    value: float
    target: float
    at_least: bool = False
    """Whether the target is a least or a most."""
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether the target is met, to the digits that are printed."""
        value = round(self.value, 3)
        return value >= self.target if self.at_least else value <= self.target


def speed() -> Iterator[Figure]:
    """Store and load of folios, against bare loops of the codec."""
    pages = corpora.mixed(PAGES)
    singles, folios = rig.single_pages(pages), rig.folios_of(pages)
    blobs = corpora.compressed(pages)
    compress, decompress = lz4.block.compress, lz4.block.decompress
    bench = Rig()
    slots: list[list[U64]] = []

    def bare_compress() -> None:
        for page in singles:
            compress(page, store_size=False)

    def bare_decompress() -> None:
        for blob in blobs:
            decompress(blob, PAGE_BYTES)

    stored = rig.compare(
        lambda: slots.append(bench.store(folios)),
        bare_compress,
        rounds=ROUNDS,
        between=lambda: bench.free(slots.pop()),
    )
    yield Figure(
        name="store / bare compress", value=stored.ratio, target=1.25, detail=_both(stored)
    )
    batches = bench.store(folios)
    loaded = rig.compare(lambda: bench.load(batches), bare_decompress, rounds=ROUNDS)
    yield Figure(
        name="load / bare decompress", value=loaded.ratio, target=1.5, detail=_both(loaded)
    )


def _both(compared: rig.Compared) -> str:
    ours = rig.us_per_page(compared.ours_s, PAGES)
    theirs = rig.us_per_page(compared.theirs_s, PAGES)
    return f"+-{compared.spread:.3f}; {ours:.2f} and {theirs:.2f} us/page"


def memory() -> Iterator[Figure]:
    """What pool and table occupy: full, thinned out and compacted, empty."""
    pages = corpora.mixed(2 * PAGES)
    bench = Rig()
    slots = bench.store(rig.folios_of(pages))
    full = bench.engine.snapshot()
    yield _resident("pool, filled", 1.03, full.pool.bytes, full.pool.live_bytes)
    per_slot = full.table_bytes / full.slots.allocated
    yield Figure(name="table bytes per used slot", value=per_slot, target=10)

    order = rig.shuffled(slots)
    three_quarters = len(order) * 3 // 4
    bench.free(rig.batches_of(order[:three_quarters]))
    before = bench.engine.snapshot().pool.bytes
    bench.shrink()
    thin = bench.engine.snapshot()
    yield _resident(
        "pool, 3/4 freed and compacted",
        1.25,
        thin.pool.bytes,
        thin.pool.live_bytes,
        f"; {before / 1e6:.1f} MB before",
    )

    bench.free(rig.batches_of(order[three_quarters:]))
    bench.shrink()
    empty = bench.engine.snapshot()
    yield Figure(name="table bytes when empty", value=empty.table_bytes, target=0)
    yield Figure(name="pool bytes when empty", value=empty.pool.bytes, target=0)


def _resident(name: str, target: float, resident: int, live: int, more: str = "") -> Figure:
    detail = f"{resident / 1e6:.1f} MB for {live / 1e6:.1f} MB compressed{more}"
    return Figure(name=f"{name} / compressed", value=resident / live, target=target, detail=detail)


def table_size() -> Iterator[Figure]:
    """Loads of the same pages, from a table of 10 million slots and from one of 10 thousand."""
    large, small = _filled(10_000_000), _filled(10_000)
    compared = rig.compare(
        lambda: large[0].load(large[1]), lambda: small[0].load(small[1]), rounds=ROUNDS
    )
    ours = rig.us_per_page(compared.ours_s, _DISTINCT)
    theirs = rig.us_per_page(compared.theirs_s, _DISTINCT)
    yield Figure(
        name="load, 10 million / 10 thousand slots",
        value=compared.ratio,
        target=1.3,
        detail=f"+-{compared.spread:.3f}; {ours:.2f} and {theirs:.2f} us/page, random slots",
    )


def _filled(count: int) -> tuple[Rig, list[U64]]:
    """A table with `count` slots in use, of which _DISTINCT random ones hold a page with data."""
    bench = Rig()
    zeros = [bytes(_BULK * PAGE_BYTES)] * (count // _BULK) + [bytes(count % _BULK * PAGE_BYTES)]
    slots = rig.shuffled(bench.store(zeros))[:_DISTINCT]
    batches = rig.batches_of(slots)
    engine = bench.engine
    folios = rig.folios_of(corpora.mixed(_DISTINCT))
    for batch, folio in zip(batches, folios, strict=True):
        run(engine.store(bench.space, engine.prepare(folio), batch))
    assert engine.snapshot().slots.allocated == count
    # Another order than that of the stores, which is the order in which they lie in the pool.
    return bench, rig.batches_of(rig.shuffled(batches, seed=1))


def recovery() -> Iterator[Figure]:
    """Making an engine again from what a killed one has left; one thread, and no other runs."""
    engine = bench_recovery.filled(_RECOVERED)
    seconds = [rig.timed(lambda: bench_recovery.recovered(engine)) for _ in range(_RECOVERIES)]
    found = bench_recovery.recovered(engine).core
    slots, segments = int(found.slot_counts[1:].sum()), len(found.zswap.all_segments())
    yield Figure(
        name="seconds to recover 10 million slots",
        value=statistics.median(seconds),
        target=2,
        detail=f"{min(seconds):.2f} to {max(seconds):.2f}; {slots} slots, {segments} segments",
    )


def writeback(directory: str) -> Iterator[Figure]:
    """Writing back through the daemon's driver, against sequential writes to the same file."""
    folios = rig.folios_of(corpora.mixed(_WRITE_PAGES // 2)) * 2
    for encrypted in (True, False):
        with tempfile.TemporaryDirectory(prefix="vswapd-bench-", dir=directory) as place:
            yield from _writeback(os.path.join(place, "swap"), folios, encrypted=encrypted)


def _writeback(path: str, folios: Sequence[bytes], *, encrypted: bool) -> Iterator[Figure]:
    kind = "encrypted" if encrypted else "plain"
    file = SwapFile.open(path, size=256 << 20, encrypted=encrypted)
    device: BlockDevice = SealedDevice(file) if encrypted else file
    bench, driver = Rig(), Driver()
    bench.engine.swapon(device, 0)
    slots: list[list[U64]] = [bench.store(folios)]
    live = bench.engine.snapshot().pool.live_bytes
    amount = live // EXTENT_BYTES * EXTENT_BYTES
    written: list[tuple[int, int]] = []

    def ours() -> None:
        driver.run(bench.engine.writeback(amount))

    def between() -> None:
        """Back to a full pool and a device whose extents were all discarded, for both sides."""
        after = bench.engine.snapshot()
        written.append((after.stats.writeback_bytes, after.devices[0].live_bytes))
        bench.free(slots.pop())
        bench.shrink()
        file.discard(0, file.extents)
        slots.append(bench.store(folios))

    fd = os.open(path, os.O_RDWR | (os.O_DIRECT if file.direct else 0))
    block = memoryview(mmap.mmap(-1, EXTENT_BYTES))
    block[:] = os.urandom(EXTENT_BYTES)

    def theirs() -> None:
        # After the extents that ours fills, in a part that was discarded alike.
        start = DATA_OFFSET + file.extents // 2 * EXTENT_BYTES
        for at in range(start, start + amount, EXTENT_BYTES):
            os.pwrite(fd, block, at)

    try:
        compared = rig.compare(ours, theirs, rounds=_WRITE_ROUNDS, between=between, warm_up=1)
    finally:
        os.close(fd)
        driver.close()
    bytes_written, pages_live = written[0]
    yield Figure(
        name=f"writeback speed / sequential writes, {kind}",
        value=1 / compared.ratio,
        target=0.7,
        at_least=True,
        detail=f"+-{compared.spread / compared.ratio**2:.3f}; "
        f"{amount / compared.ours_s / 1e6:.0f} and {amount / compared.theirs_s / 1e6:.0f} MB/s"
        + ("" if file.direct else ", no O_DIRECT here"),
    )
    yield Figure(
        name=f"bytes written back / compressed, {kind}",
        value=bytes_written / pages_live,
        target=1.05,
        detail=f"{bytes_written / 1e6:.1f} MB for {pages_live / 1e6:.1f} MB",
    )


def latency(directory: str) -> Iterator[Figure]:
    """Loads of a page alone while the shrinker works, against a daemon at rest."""
    for shards in ("1", "auto"):
        with tempfile.TemporaryDirectory(prefix="vswapd-bench-", dir=directory) as place:
            results = list(interference.measure(Path(place), shards, interference.some_pages()))
        for one in results[: len(interference.KINDS)]:
            yield Figure(
                name=f"p99 of loads, {one.kind} / at rest, {shards} shard{'s' * (shards != '1')}",
                value=one.ratio,
                target=3,
                detail=f"+-{one.spread:.2f}; {one.busy_p99:.0f} and {one.rest_p99:.0f} us",
            )


def table(figures: Sequence[Figure]) -> str:
    """The table for people."""
    width = max(len(figure.name) for figure in figures)
    lines = [f"{'':{width}}  measured    target"]
    for figure in figures:
        bound = f"{'>=' if figure.at_least else '<='} {figure.target:g}"
        verdict = "ok" if figure.ok else "SHORT"
        lines.append(
            f"{figure.name:{width}}  {figure.value:8.3f}  {bound:>8}  {verdict:5}  {figure.detail}"
        )
    return "\n".join(line.rstrip() for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(
        prog="bench.targets", description=(__doc__ or "").split("\n")[0]
    )
    parts: dict[str, Callable[[], Iterator[Figure]]] = {
        "speed": speed,
        "memory": memory,
        "table": table_size,
        "recovery": recovery,
        "writeback": lambda: writeback(options.directory),
        "latency": lambda: latency(options.directory),
    }
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--only", choices=parts, help="measure this part alone")
    parser.add_argument(
        "--directory", default=os.getcwd(), help="where the swap file is made (default: here)"
    )
    options = parser.parse_args(argv)
    print(corpora.describe(), flush=True)
    figures = [f for name, part in parts.items() if options.only in {None, name} for f in part()]
    print(f"\n{table(figures)}")
    if options.json:
        document = {
            "cpus": os.cpu_count(),
            "numpy": np.__version__,
            "python": sys.version.split()[0],
            "figures": [dataclasses.asdict(f) | {"ok": f.ok} for f in figures],
        }
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
