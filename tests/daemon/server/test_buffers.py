"""The memory of requests and replies: how much is given out at a time, and in which order."""

from __future__ import annotations

import random
from functools import partial
from typing import Final

import pytest

from vswapd.buffers import LARGE, Buffers

SIZE: Final = 16 << 20
CONNECTIONS: Final = 20


@pytest.mark.parametrize("largest", [LARGE, SIZE // 4])
def test_no_more_is_out_than_there_is(largest: int) -> None:
    """Whatever is asked for and given back: everybody gets it, in the order of asking."""
    rng = random.Random(largest)
    buffers = Buffers(SIZE, CONNECTIONS)
    out: list[int] = []
    asked: dict[int, list[int]] = {}
    granted: dict[int, list[int]] = {}

    def grant(amount: int, number: int) -> None:
        lane = id(buffers.lane(amount))
        granted.setdefault(lane, []).append(number)
        out.append(amount)

    for number in range(2000):
        amount = rng.randint(1, largest)
        lane = buffers.lane(amount)
        asked.setdefault(id(lane), []).append(number)
        if lane.take(amount, partial(grant, amount, number)):
            grant(amount, number)
        assert buffers.used == sum(out) <= SIZE
        while len(out) > rng.randint(0, 10):
            back = out.pop(rng.randrange(len(out)))
            buffers.lane(back).give(back)
            assert buffers.used == sum(out) <= SIZE
    while out:
        back = out.pop()
        buffers.lane(back).give(back)
    assert granted == asked
    assert not buffers.used
    assert not buffers.crowded


def test_each_connection_can_have_a_small_one() -> None:
    """Also while all of the memory for large ones is out, and others wait for it."""
    buffers = Buffers(SIZE, CONNECTIONS)
    small = SIZE * 3 // 8 // CONNECTIONS
    for amount in (small + 1, LARGE + 1):
        while buffers.lane(amount).take(amount, lambda: None):
            pass
    for _ in range(CONNECTIONS):
        assert buffers.lane(small).take(small, lambda: None)
    assert buffers.lane(small) is not buffers.lane(small + 1)


def test_large_ones_hold_up_each_other_only() -> None:
    """However little memory there is, so that hardly anything is small."""
    buffers = Buffers(SIZE, 1000)
    while buffers.lane(SIZE // 3).take(SIZE // 3, lambda: None):
        pass
    assert buffers.lane(SIZE // 3).crowded
    for _ in range(4):
        assert buffers.lane(LARGE).take(LARGE, lambda: None)


def test_what_is_larger_than_all_is_served_alone() -> None:
    """There is always progress: when nothing else is out it is given."""
    buffers = Buffers(SIZE, CONNECTIONS)
    lane = buffers.lane(SIZE)
    news: list[str] = []
    assert lane.take(LARGE + 1, lambda: None)
    assert not lane.take(SIZE, lambda: news.append("granted"))
    lane.give(LARGE + 1)
    assert news == ["granted"]
