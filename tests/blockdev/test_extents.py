"""Which extents are free, used, or out of use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswapd_blockdev.extents import ExtentMap


def test_lowest_first() -> None:
    """The lowest free extent is handed out, whatever the order in which they were given back."""
    extents = ExtentMap(5)
    assert [extents.take() for _ in range(5)] == [0, 1, 2, 3, 4]
    for extent in (3, 1, 2):
        extents.give(extent)
    assert [extents.take() for _ in range(3)] == [1, 2, 3]


def test_full_is_none() -> None:
    """A map without a free extent says None, and goes on as soon as one is given back."""
    extents = ExtentMap(1)
    assert extents.take() == 0
    assert extents.take() is None
    extents.give(0)
    assert extents.take() == 0


def test_bad_stays_used_until_given_back() -> None:
    """A bad extent counts as used while something is in it, and is out of use afterwards."""
    extents = ExtentMap(2)
    bad = extents.take()
    assert bad == 0
    extents.mark_bad(bad)
    extents.mark_bad(bad)
    assert (extents.free, extents.used, extents.bad) == (1, 1, 1)
    extents.give(bad)
    assert (extents.free, extents.used, extents.bad) == (1, 0, 1)
    assert extents.take() == 1
    assert extents.take() is None


def test_giving_twice_is_a_mistake() -> None:
    """An extent that is not taken cannot be given back, nor be marked bad."""
    extents = ExtentMap(3)
    assert extents.take() == 0
    extents.give(0)
    for extent in (0, 2):
        with pytest.raises(AssertionError):
            extents.give(extent)
        with pytest.raises(AssertionError):
            extents.mark_bad(extent)


@given(
    size=st.integers(1, 12),
    steps=st.lists(
        st.tuples(st.sampled_from(["take", "give", "bad", "forgive"]), st.integers(0, 11))
    ),
)
def test_agrees_with_sets(size: int, steps: list[tuple[str, int]]) -> None:
    """Any sequence of calls agrees with three plain sets, and every extent is in one of them."""
    extents = ExtentMap(size)
    free, used, bad = set(range(size)), set[int](), set[int]()
    for verb, number in steps:
        if verb == "take":
            taken = extents.take()
            assert taken == min(free, default=None)
            if taken is not None:
                free.remove(taken)
                used.add(taken)
        elif verb == "forgive":
            forgiven = sorted(bad - used)[:number]
            assert extents.forgive(number) == forgiven
            bad -= set(forgiven)
            free |= set(forgiven)
        elif used:
            extent = sorted(used)[number % len(used)]
            if verb == "bad":
                extents.mark_bad(extent)
                bad.add(extent)
            else:
                extents.give(extent)
                used.remove(extent)
                free |= {extent} - bad
        assert (extents.free, extents.used, extents.bad) == (len(free), len(used), len(bad))
        assert extents.retired == len(bad - used)
        assert extents.free + extents.used + extents.retired == size


def test_a_closed_map_forgives_nothing() -> None:
    """A device that is lost stays so."""
    extents = ExtentMap(4)
    extents.restore([1], [2])
    extents.retire_free()
    assert (extents.retired, extents.forgive(9), extents.take()) == (0, [], None)
