"""Zero detection against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vswapd_backends.base import PAGE_BYTES, U64
from vswapd_backends.zero import ZERO_PAGE, zero_pages

WORDS = PAGE_BYTES // 8


def _words(pages: list[bytes]) -> U64:
    return np.frombuffer(b"".join(pages), np.uint64).reshape(len(pages), WORDS)


def _plain(pages: list[bytes]) -> list[bool]:
    return [not any(page) for page in pages]


def _found(pages: list[bytes]) -> list[bool]:
    found = zero_pages(_words(pages))
    return [False] * len(pages) if found is None else found.tolist()


def _with(*positions: int) -> bytes:
    page = bytearray(PAGE_BYTES)
    for position in positions:
        page[position] = 1
    return bytes(page)


def test_one_byte_anywhere_is_not_zero() -> None:
    """A page with a single byte set is never zero, wherever the byte is."""
    pages = [_with(position) for position in range(PAGE_BYTES)]
    assert zero_pages(_words(pages)) is None
    assert _found([*pages, ZERO_PAGE]) == [False] * PAGE_BYTES + [True]


@settings(deadline=None)
@given(
    folio=st.lists(
        st.one_of(
            st.just(ZERO_PAGE),
            st.lists(st.integers(0, PAGE_BYTES - 1), max_size=3).map(lambda at: _with(*at)),
            st.just(b"\xff" * PAGE_BYTES),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_agrees_with_a_plain_loop(folio: list[bytes]) -> None:
    """Whatever the mixture, exactly the pages of nothing but zeros are found."""
    assert _found(folio) == _plain(folio)


@pytest.mark.parametrize("count", [1, 2, 64, 4096])
def test_folios_of_all_sizes(count: int) -> None:
    """All zero, none zero, and every third: up to the largest folio."""
    assert _found([ZERO_PAGE] * count) == [True] * count
    assert zero_pages(_words([_with(4095)] * count)) is None
    mixed = [ZERO_PAGE if i % 3 == 0 else _with(i % PAGE_BYTES) for i in range(count)]
    assert _found(mixed) == _plain(mixed)


def test_none_when_no_page_is_zero() -> None:
    """A folio without zero pages is told by None, also if some look zero at first."""
    assert zero_pages(_words([_with(0), _with(4088), b"\1" * PAGE_BYTES])) is None


def test_the_zero_page_is_a_page_of_zeros() -> None:
    """What loads of ZERO slots return is as long as a page, and all zero."""
    assert bytes(PAGE_BYTES) == ZERO_PAGE
