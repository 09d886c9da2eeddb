"""The write budget's day, while somebody sets the clock."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.engine import DAY, MIB, Clock, Rig, make_engine, pages_of
from vswapd.ledger import Ledger, shared_region
from vswapd_backends.base import I64, SEGMENT_BYTES

BUDGET = 4 * SEGMENT_BYTES
HOUR = 3600.0
YEAR = 365.0 * DAY
TODAY = 20_000 * DAY


def _rig(clock: Clock, ledger: Ledger | None = None) -> Rig:
    """An engine that can write more than its budget, several times."""
    rig = make_engine(
        64 * MIB,
        arena_bytes=72 * MIB,
        devices=[64],
        clock=clock,
        ledger=ledger,
        write_budget=BUDGET,
    )
    space = rig.space()
    for first in range(0, 3000, 100):
        rig.put(space, pages_of("noise", 100, first))
    return rig


def _at(hour: float) -> Clock:
    """A machine that was started a day ago, whose clock shows that hour of today."""
    clock = Clock(DAY)
    clock.set_by = TODAY + hour * HOUR - clock.now
    return clock


def _left(rig: Rig) -> int:
    left = rig.engine.core.budget_left()
    assert left is not None
    return left


def _spend(rig: Rig) -> int:
    """Write as much as is allowed; returns how much that was."""
    before = rig.devices[0].written
    rig.writeback(BUDGET)
    return rig.devices[0].written - before


@pytest.mark.parametrize("process", ["the same", "another"])
@pytest.mark.parametrize("back", [HOUR, DAY, 30 * DAY, YEAR])
def test_a_clock_that_is_set_back_gives_no_second_budget(back: float, process: str) -> None:
    """Neither at once, nor when it comes to the same day again before 24 hours have passed."""
    clock = _at(13)
    rig = _rig(clock)
    assert _spend(rig) == BUDGET
    clock.set_by -= back
    if process == "another":
        rig.recover()
    assert _spend(rig) == 0
    clock.advance(10 * HOUR)
    assert _spend(rig) == 0
    clock.advance(14 * HOUR)
    assert _spend(rig) == BUDGET


def test_a_clock_that_goes_back_over_midnight_gives_neither_day_twice() -> None:
    """An hour back at half past midnight: yesterday is over, and today has begun."""
    clock = _at(23)
    rig = _rig(clock)
    assert _spend(rig) == BUDGET
    clock.advance(1.5 * HOUR)
    assert _spend(rig) == BUDGET
    clock.set_by -= HOUR
    rig.recover()
    assert _spend(rig) == 0
    clock.advance(HOUR)
    assert _spend(rig) == 0
    clock.advance(DAY)
    assert _spend(rig) == BUDGET


@pytest.mark.parametrize("leap", [DAY, 3 * DAY, 10 * YEAR])
def test_a_leap_forwards_that_is_corrected_gives_one_budget_early(leap: float) -> None:
    """From then on there is one every 24 hours: not less, and none for the days that come twice."""
    clock = _at(12)
    rig = _rig(clock)
    assert _spend(rig) == BUDGET
    clock.set_by += leap
    assert _spend(rig) == BUDGET
    clock.set_by -= leap
    rig.recover()
    for _ in range(6):
        assert _spend(rig) == 0
        clock.advance(DAY - 1)
        assert _spend(rig) == 0
        clock.advance(1)
        assert _spend(rig) == BUDGET
        rig.recover()


def test_leaping_to_and_fro_gives_nothing_more() -> None:
    """The day that a clock names for the second time was given its budget the first time."""
    clock = _at(12)
    rig = _rig(clock)
    _spend(rig)
    clock.set_by += DAY
    assert _spend(rig) == BUDGET
    for _ in range(5):
        clock.set_by -= DAY
        assert _spend(rig) == 0
        clock.set_by += DAY
        assert _spend(rig) == 0


@pytest.mark.parametrize("step", [-2.0, 2.0])
def test_a_clock_that_is_put_right_by_seconds_gives_each_day_once(step: float) -> None:
    """24 hours end just before midnight then, or just after it: that is one new day, not two."""
    clock = _at(0)
    rig = _rig(clock)
    given = []
    for day in range(1, 5):
        clock.set_by += step
        clock.now = (1 + day) * DAY - 20
        given += [_spend(rig) for _ in map(clock.advance, [1.0] * 40)]
    assert sum(given) == 5 * BUDGET


def test_all_shards_have_one_day() -> None:
    """What one has taken for a new day, for whatever reason, is the others' day too."""
    clocks = [_at(12), _at(12)]
    region = shared_region(2)
    one, two = (_rig(clock, Ledger(region, n)) for n, clock in enumerate(clocks))
    assert _spend(one) == BUDGET
    assert _spend(two) == 0
    clocks[0].set_by += YEAR
    assert _spend(one) == BUDGET
    clocks[0].set_by -= YEAR
    assert _spend(two) == 0
    for _ in range(3):
        for clock in clocks:
            clock.advance(DAY)
        assert _spend(two) == BUDGET
        assert _spend(one) == 0
        one.recover()
        two.recover()


def test_the_shrinker_wakes_when_there_is_a_budget_again() -> None:
    """Also while the clock is behind, when no midnight brings one."""
    clock = _at(12)
    rig = _rig(clock)
    rig.set(idle_age=1)
    clock.advance(10)
    rig.settle()
    assert rig.engine.shrinker.next_wakeup() == DAY + 12 * HOUR
    clock.set_by -= 2 * DAY
    due = rig.engine.shrinker.next_wakeup()
    assert due is not None
    assert DAY + 24 * HOUR <= due <= DAY + 24 * HOUR + 10
    clock.now = due
    assert rig.shrink()


class _KilledError(Exception):
    """At one of the stores of the words that are kept."""


class _Mortal:
    """The kept words, until one of them is to be stored once too often."""

    def __init__(self, head: I64, stores: int) -> None:
        self._head, self._left = head, stores

    def __setitem__(self, index: int, value: int) -> None:
        if not self._left:
            raise _KilledError
        self._left -= 1
        self._head[index] = value

    def item(self, index: int) -> int:
        return self._head.item(index)


@pytest.mark.parametrize("set_by", [0.0, -YEAR])
@pytest.mark.parametrize("stores", range(5))
def test_a_kill_at_the_turn_of_the_day_gives_no_budget_twice(stores: int, set_by: float) -> None:
    """Before each of the stores with which the day begins, and its first bytes are counted."""
    clock = _at(12)
    rig = make_engine(clock=clock, write_budget=BUDGET)
    rig.engine.core.spend(BUDGET)
    clock.set_by += set_by
    given = 0
    for _ in range(4):
        clock.advance(DAY)
        rig.recover()
        budget = rig.engine.core.budget
        budget._head = _Mortal(budget._head, stores)  # type: ignore[assignment]
        with contextlib.suppress(_KilledError):
            assert budget.left(BUDGET) in {0, BUDGET}
            budget.spend(budget.left(BUDGET), bounded=True)
        rig.recover()
        given += _left(rig)
        rig.engine.core.spend(_left(rig))
    # Who is killed before the last of them has not counted what it spent.
    assert given == (4 * BUDGET if stores < 4 else 0)


_SETTINGS = st.sampled_from([-YEAR, -DAY, -HOUR, -1.0, 1.0, HOUR, DAY, 3 * DAY, YEAR])
_STEPS = st.one_of(
    st.tuples(st.just("pass"), st.sampled_from([1.0, HOUR, 5 * HOUR, DAY - 1, DAY, 9 * DAY])),
    st.tuples(st.just("set"), _SETTINGS),
    st.tuples(st.just("process"), st.just(0.0)),
)


@given(st.lists(_STEPS, max_size=25))
def test_whatever_is_done_to_the_clock(steps: list[tuple[str, float]]) -> None:
    """A new budget: only on a later day than any before, or after 24 hours; and then always."""
    clock = _at(12)
    rig = make_engine(clock=clock, write_budget=BUDGET)
    core = rig.engine.core
    latest, begun = clock.wall() // DAY, clock.now
    core.spend(BUDGET)
    for what, value in steps:
        match what:
            case "pass":
                clock.advance(value)
            case "set":
                clock.set_by = max(clock.set_by + value, -clock.now)
            case _:
                rig.recover()
        core = rig.engine.core
        day = clock.wall() // DAY
        if day > latest or clock.now - begun >= DAY:
            assert core.budget_left() == BUDGET
            latest, begun = max(day, latest + 1), clock.now
            core.spend(BUDGET)
        assert core.budget_left() == 0
        assert core.budget.renews_at() > clock.now
