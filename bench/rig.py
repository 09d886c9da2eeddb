"""An engine as it is measured: fed with folios, driven on the spot, with time that can be moved."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from pytest_benchmark.fixture import BenchmarkFixture

from vswapd.capture import PAGE_BYTES, Pages
from vswapd.settings import Settings
from vswapd.vswap import Engine
from vswapd_backends.base import U64, run

FOLIO: Final = 64
PLENTY: Final = 2 << 30
"""A pool limit that is never reached: freed segments stay warm, nothing is written back."""


class Clock:
    """Seconds that only pass when told to: the shrinker trims what has been spare for a second."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Rig:
    """An engine with one space."""

    def __init__(self, *, pool_max: int = PLENTY, codec: str = "lz4") -> None:
        self.clock: Final = Clock()
        self.engine: Final = Engine.create(Settings(pool_max=pool_max, codec=codec), self.clock)
        self.space: Final = self.engine.open_space(uid=0, group="0", client="bench")

    def store(self, folios: Sequence[bytes]) -> list[U64]:
        """Store folios to new slots."""
        engine, space = self.engine, self.space
        return [run(engine.store(space, engine.prepare(folio))).slots for folio in folios]

    def load(self, batches: Sequence[U64]) -> None:
        """Load batches and drop the pages."""
        engine, space = self.engine, self.space
        for slots in batches:
            run(engine.load(space, slots))

    def free(self, batches: Sequence[U64]) -> None:
        """Free batches."""
        for slots in batches:
            run(self.engine.free(self.space, slots))

    def shrink(self) -> None:
        """Let the shrinker run until it has nothing to do, and again when spare memory is due."""
        shrinker = self.engine.shrinker
        for _ in range(2):
            while nbytes := shrinker.count():
                run(shrinker.scan(nbytes))
            self.clock.now += 2.0


def folios_of(pages: Pages, size: int = FOLIO) -> list[bytes]:
    """Pages in folios of `size`."""
    return [pages[at : at + size].tobytes() for at in range(0, len(pages), size)]


def batches_of(slots: U64, size: int = FOLIO) -> list[U64]:
    """Slots in batches of `size`."""
    return [slots[at : at + size] for at in range(0, len(slots), size)]


def single_pages(pages: Pages) -> list[bytes]:
    """Each page by itself."""
    return [page.tobytes() for page in pages]


def shuffled(slots: Sequence[U64], seed: int = 0) -> U64:
    """All slots of batches in random order."""
    return np.random.default_rng(seed).permutation(np.concatenate(slots))


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Two ways of doing the same, measured in turns."""

    ratio: float
    """The median over the rounds of (ours by theirs)."""
    spread: float
    """Half the distance between the quartiles of that."""
    ours_s: float
    theirs_s: float
    """Medians, seconds per pass."""


def timed(work: Callable[[], object]) -> float:
    """Seconds that one pass takes, with the garbage of what was before collected."""
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    rounds: int,
    between: Callable[[], object] = lambda: None,
    warm_up: int = 2,
) -> Compared:
    """Measure two passes in turns, so that what else the machine does hits both alike.

    Garbage collection is on for both, as it is in a daemon; what was there before is frozen out.

    Args:
        ours: one pass of what is judged.
        theirs: one pass of what it is held against.
        rounds: how often both are measured.
        between: called, unmeasured, after each pass of ours.
        warm_up: rounds that do not count: buffers are touched, memory is allocated.
    """
    gc.collect()
    gc.freeze()
    measured = []
    for number in range(warm_up + rounds):
        # Who comes first changes from round to round.
        if number % 2:
            a, b = timed(ours), timed(theirs)
        else:
            b, a = timed(theirs), timed(ours)
        between()
        measured.append((a, b))
    gc.unfreeze()
    kept = measured[warm_up:]
    low, middle, high = statistics.quantiles([a / b for a, b in kept], n=4)
    return Compared(
        ratio=middle,
        spread=(high - low) / 2,
        ours_s=statistics.median(a for a, _ in kept),
        theirs_s=statistics.median(b for _, b in kept),
    )


def by_the_round(
    benchmark: BenchmarkFixture,
    work: Callable[..., Any],
    *,
    setup: Callable[[], object],
    rounds: int,
) -> Any:
    """Measure work that needs something set up before each time; returns its last result."""
    measure: Any = benchmark  # its types say nothing of pedantic
    return measure.pedantic(work, setup=setup, rounds=rounds, warmup_rounds=rounds // 8)


def us_per_page(seconds: float, pages: int) -> float:
    """Microseconds per page."""
    return seconds / pages * 1e6


def megabytes_per_s(seconds: float, pages: int) -> float:
    """MB of pages per second."""
    return pages * PAGE_BYTES / seconds / 1e6
