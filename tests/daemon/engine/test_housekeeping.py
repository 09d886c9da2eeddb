"""Whatever fails besides a request, where its words are published, the request does not feel it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, Final

import pytest

from support.engine import KIB, MIB, Rig, make_engine, pages_of
from vswap.protocol import Reason
from vswapd.groups import Space
from vswapd.housekeeping import Housekeeping
from vswapd.pressure import Free
from vswapd_backends.base import U64

ERRORS: Final = {
    "no descriptors": lambda: OSError(errno.EMFILE, "Too many open files"),
    "no memory": lambda: MemoryError("none left"),
    "nonsense": lambda: ValueError("invalid literal for int()"),
    "a mistake": lambda: AssertionError("a mistake of ours"),
}


class Nth:
    """Lets the n-th of all calls that go through it fail."""

    def __init__(self, number: int, make_error: Callable[[], Exception]) -> None:
        self.number = number
        self.calls = 0
        self._make_error = make_error

    def through(self, work: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
        def called(*args: Any, **keywords: Any) -> Any:
            self.calls += 1
            fails = self.calls == self.number
            if fails and not after:
                raise self._make_error()
            result = work(*args, **keywords)
            if fails:
                raise self._make_error()
            return result

        return called


def afflicted(nth: Nth, told: list[str]) -> Rig:
    """An engine in which all that may fail besides a request goes through `nth`."""
    rig = make_engine(pool_max=2 * MIB, pool_reserve=MIB, devices=[24])
    engine = rig.engine
    engine.report_to(lambda what, error: told.append(f"{what}: {error}"))
    engine.on_pressure = nth.through(lambda: None)
    engine.watch_memory(nth.through(lambda: Free(64 * MIB, "x")))
    keeping = engine.core.housekeeping
    done = keeping.do

    def do(what: str, work: Callable[[], object]) -> None:
        done(what, nth.through(nth.through(work, after=True)))

    keeping.do = do  # type: ignore[method-assign]
    return rig


Kept = list[tuple[list[bytes], U64]]
"""Pages, and the slots that they were acknowledged in."""


def live(rig: Rig) -> tuple[Space, Kept]:
    """All that clients do; returns what one of them still has."""
    space, other = rig.space(), rig.space()
    kept: Kept = []
    for number in range(12):
        rig.clock.advance(0.3)
        pages = pages_of("noise", 40, 100 * number)
        kept.append((pages, rig.put(space, pages)))
        rig.put(other, pages_of("text", 30, 100 * number))
    one = pages_of("noise", 1, 9000)
    kept.append((one, rig.put(space, one)))
    rig.writeback(512 * KIB)
    for number in (1, 5, 9):
        pages = pages_of("mixed", 40, 5000 + number)
        assert rig.store(space, pages, kept[number][1]).reason is None
        kept[number] = pages, kept[number][1]
    for number in (12, 4, 0):
        rig.clock.advance(0.3)
        rig.free(space, kept.pop(number)[1])
    rig.set(pool_enabled=False)
    for number in (200, 201):
        pages = pages_of("noise", 30, 7000 + 100 * number)
        kept.append((pages, rig.put(space, pages)))
    rig.set(pool_enabled=True)
    for pages, slots in kept:
        rig.clock.advance(0.3)
        assert rig.load(space, slots) == pages
    rig.close(other)
    rig.set(store_enabled=False)
    rejected = rig.store(space, pages_of("text", 30, 1), kept.pop()[1])
    assert rejected.reason is Reason.DISABLED
    rig.set(store_enabled=True)
    return space, kept


def check(rig: Rig, space: Space, kept: Kept) -> None:
    for pages, slots in kept:
        assert rig.load(space, slots) == pages
    rig.check()
    assert rig.verify().ok


@pytest.mark.parametrize("kind", ERRORS)
def test_each_failure_in_its_turn(kind: str) -> None:
    """Let the first fail, then the second, ...: each request is carried out, each page stays."""
    number = 1
    while True:
        told: list[str] = []
        nth = Nth(number, ERRORS[kind])
        rig = afflicted(nth, told)
        space, kept = live(rig)
        nth.number = 0
        check(rig, space, kept)
        if not told:
            break  # there were not so many
        assert len(told) == rig.engine.core.stats.housekeeping_errors == 1
        number += 1 + number // 20
    assert number > 50


def test_nobody_takes_memory_back() -> None:
    """Where the kernel takes no memory back all goes on, and what is spare is used again."""
    rig = make_engine(pool_max=2 * MIB, devices=[24])
    told: list[str] = []
    rig.engine.report_to(lambda what, error: told.append(f"{what}: {error}"))

    def refuse(offset: int, length: int) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    memory = rig.engine.core.memory
    for region in (memory.table, memory.pool, memory.state):
        region.punch = refuse  # type: ignore[method-assign]
    space, kept = live(rig)
    rig.engine.core.zswap.arena.trim()
    check(rig, space, kept)
    assert set(told) == {"memory cannot be given back: [Errno 1] Operation not permitted"}
    for region in (memory.table, memory.pool, memory.state):
        del region.punch
    rig.settle()
    rig.engine.core.zswap.arena.trim()
    check(rig, space, kept)
    arena = rig.engine.core.zswap.arena
    assert arena.spare_bytes == 0
    assert arena.resident_bytes == arena.region.resident_bytes


def test_with_nobody_to_tell_it_is_raised() -> None:
    """An engine by itself raises what goes wrong: mistakes of ours are not overheard."""
    rig = make_engine()
    rig.engine.on_pressure = lambda: None

    def fail() -> Free:
        raise AssertionError("a mistake of ours")

    with pytest.raises(AssertionError, match="mistake"):
        rig.engine.core.housekeeping.do("x", fail)
    keeping = Housekeeping(rig.engine.core.stats)
    told: list[str] = []
    keeping.report = lambda what, error: told.append(f"{what}: {error}")
    keeping.do("x", fail)
    assert told == ["x: a mistake of ours"]
    assert rig.engine.core.stats.housekeeping_errors == 2
