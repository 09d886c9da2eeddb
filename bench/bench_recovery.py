"""Recovery: an engine with ten million slots in use, made again from its memory on one core.

python -m bench.bench_recovery [SLOTS]
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it can be run by its path

from vswapd.groups import Space
from vswapd.memory import ShardMemory
from vswapd.settings import Settings
from vswapd.vswap import Engine, shape_for
from vswapd_backends.base import PAGE_BYTES, run

SLOTS: Final = 10_000_000
ROUNDS: Final = 5
_FOLIO: Final = 4096
_SPACES: Final = 16
_DISTINCT: Final = 61
"""Pages that compress to about 60 bytes, each of another length."""


def settings() -> Settings:
    """A pool that all of it fits into."""
    return Settings(pool_max=4 << 30)


def clock() -> float:
    """Time does not matter here."""
    return 1000.0


def filled(slots: int) -> Engine:
    """An engine of `slots` slots: three quarters in the pool, the rest zero pages; some freed."""
    engine = Engine.create(settings(), clock)
    spaces = [engine.open_space(uid=i, group=str(i % 4)) for i in range(_SPACES)]
    data = b"".join(
        (bytes([1 + i]) * (16 + i)).ljust(PAGE_BYTES, bytes([255 - i])) for i in range(_DISTINCT)
    )
    pages = (data * (_FOLIO // _DISTINCT + 1))[: _FOLIO * PAGE_BYTES]
    folio, zeros = engine.prepare(pages), engine.prepare(bytes(_FOLIO * PAGE_BYTES))
    done = turn = 0
    while done < slots:
        space: Space = spaces[turn % _SPACES]
        stored = run(engine.store(space, zeros if turn % 4 == 3 else folio))
        assert stored.reason is None
        done += _FOLIO
        turn += 1
    return engine


def recovered(engine: Engine) -> Engine:
    """Another engine, from the same memory."""
    fds = {kind: os.dup(fd) for kind, fd in engine.core.memory.fds.items()}
    return Engine.recover(settings(), clock, memory=ShardMemory.adopt(fds), reopen=lambda _: None)


def measure(slots: int = SLOTS) -> tuple[list[float], Engine]:
    """Seconds of several recoveries, and the last engine."""
    engine = filled(slots)
    assert engine.core.memory.shape == shape_for(settings())
    before = engine.core.slot_counts[1:].tolist()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        engine = recovered(engine)
        seconds.append(time.perf_counter() - start)
        assert engine.core.slot_counts[1:].tolist() == before
    return seconds, engine


def main() -> int:
    """Measure and print."""
    slots = int(sys.argv[1]) if len(sys.argv) > 1 else SLOTS
    seconds, engine = measure(slots)
    core = engine.core
    print(
        f"{int(core.slot_counts[1:].sum())} slots in {core.clusters.in_use} clusters and "
        f"{len(core.zswap.all_segments())} segments: "
        f"{statistics.median(seconds):.3f} s (of {len(seconds)}: "
        f"{', '.join(f'{s:.3f}' for s in seconds)})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
