"""The table's words: made, asked, taken apart; and a table that costs what it holds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vswapd.swap_table import (
    CLUSTER_SLOTS,
    FREE_WORD,
    TAGS,
    UNBACKED_WORD,
    ZERO_WORD,
    SwapTable,
    Tag,
    addresses_of,
    all_tagged,
    lengths_of,
    make_words,
    places_of,
    reference_bits,
    referenced,
    runs,
    tags_of,
    with_reference,
    without_reference,
)
from vswapd_backends.base import PAGE_BYTES, SEGMENT_BYTES, Places

NUMBERS = st.one_of(st.integers(0, (1 << 29) - 1), st.sampled_from([0, (1 << 29) - 1]))
ENTRIES = st.lists(
    st.tuples(
        st.sampled_from([Tag.ZSWAP, Tag.PHYS]),
        NUMBERS,
        st.integers(0, SEGMENT_BYTES - 1),
        st.integers(1, PAGE_BYTES),
    ),
    min_size=1,
    max_size=20,
)


@settings(deadline=None)
@given(entries=ENTRIES, marked=st.booleans())
def test_what_goes_into_a_word_comes_out(
    entries: list[tuple[Tag, int, int, int]], *, marked: bool
) -> None:
    """Tag, number, offset and length survive for every value they can have, marked or not."""
    for tag, number, offset, length in entries:
        places = Places.within(number, np.array([offset]), np.array([length]))
        words = make_words(tag, places)
        if marked:
            words = with_reference(words)
        assert tags_of(words).tolist() == [tag]
        assert referenced(words).tolist() == [marked]
        found = places_of(words)
        assert (found.number[0], found.offset[0], found.length[0]) == (number, offset, length)
        assert addresses_of(words).tolist() == [number * SEGMENT_BYTES + offset]
        assert lengths_of(words).tolist() == [length]


def test_the_bits_are_those_of_the_documentation() -> None:
    """tag:3 | referenced:1 | length:13 | offset:18 | number:29, least significant first."""
    places = Places.within(0x155_5555, np.array([0x2_AAAA]), np.array([0x0FFF]))
    (word,) = with_reference(make_words(Tag.PHYS, places)).tolist()
    assert word & 0b111 == Tag.PHYS
    assert word >> 3 & 1
    assert word >> 4 & 0x1FFF == 0x0FFF
    assert word >> 17 & 0x3FFFF == 0x2_AAAA
    assert word >> 35 == 0x155_5555


def test_words_without_a_place_carry_none() -> None:
    """FREE is 0, so an untouched table is an empty one; the others differ in their tag only."""
    words = np.array([FREE_WORD, UNBACKED_WORD, ZERO_WORD])
    assert int(FREE_WORD) == 0
    assert tags_of(words).tolist() == [Tag.FREE, Tag.UNBACKED, Tag.ZERO]
    assert lengths_of(words).tolist() == [0, 0, 0]
    assert not referenced(words).any()
    assert all(tag < TAGS for tag in Tag)


@pytest.mark.parametrize("tag", [Tag.FREE, Tag.UNBACKED, Tag.ZERO])
def test_only_pool_and_device_have_places(tag: Tag) -> None:
    """A place for a tag that has none is a mistake that is noticed."""
    with pytest.raises(AssertionError):
        make_words(tag, Places.within(0, np.array([64]), np.array([10])))


def test_marks_come_and_go_without_a_trace() -> None:
    """Marking changes one bit; unmarked, a word is the one that it was."""
    plain = make_words(Tag.ZSWAP, Places(np.array([64, 1 << 46]), np.array([1, 4096])))
    marked = with_reference(plain)
    assert (marked != plain).all()
    assert without_reference(marked).tolist() == plain.tolist()
    assert without_reference(plain).tolist() == plain.tolist()
    assert (plain | reference_bits(marked)).tolist() == marked.tolist()
    assert reference_bits(plain).tolist() == [0, 0]


@pytest.mark.parametrize("odd", [0, 1, 63])
def test_every_word_of_a_batch_is_looked_at(odd: int) -> None:
    """One word of another kind anywhere, the first and the last included, is noticed."""
    words = make_words(Tag.ZSWAP, Places(np.arange(64) * 128, np.full(64, 100)))
    assert all_tagged(words, Tag.ZSWAP)
    assert all_tagged(with_reference(words), Tag.ZSWAP)
    assert not all_tagged(words, Tag.PHYS)
    words[odd] = ZERO_WORD
    assert not all_tagged(words, Tag.ZSWAP)


@settings(deadline=None)
@given(numbers=st.lists(st.integers(0, 30), max_size=40))
def test_runs_agree_with_a_set(numbers: list[int]) -> None:
    """Neighbours are put together, doubles count once, and the runs are as few as can be."""
    found = runs(np.array(numbers, np.int64))
    covered = [first + i for first, count in found for i in range(count)]
    assert covered == sorted(set(numbers))
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(found))


def test_an_empty_table_costs_nothing() -> None:
    """Room for a thousand million slots is address space; used, it is a page per cluster."""
    table = SwapTable(1 << 30)
    assert table.resident_bytes == 0
    numbers = np.array([0, 1, 511, 512, 1 << 29, (1 << 30) - 1])
    table.words[numbers] = ZERO_WORD
    assert table.resident_bytes == 4 * 4096
    table.words[numbers] = FREE_WORD
    table.give_back(np.array([(1 << 21) - 1, 0, 1 << 20, 1]))
    assert table.resident_bytes == 0


def test_giving_back_leaves_the_neighbours_alone() -> None:
    """A cluster that goes takes no word of another with it."""
    table = SwapTable(8 * CLUSTER_SLOTS)
    table.words[:] = ZERO_WORD
    for cluster in (2, 3, 6):
        table.words[cluster * CLUSTER_SLOTS : (cluster + 1) * CLUSTER_SLOTS] = FREE_WORD
    table.give_back(np.array([6, 2, 3]))
    assert table.resident_bytes == 5 * 4096
    left = table.words.reshape(8, CLUSTER_SLOTS) == ZERO_WORD
    assert left.all(axis=1).tolist() == [True, True, False, False, True, True, False, True]


def test_a_cluster_in_use_cannot_be_given_back() -> None:
    """Punching a page with a word that is not FREE would lose a page: it is a mistake."""
    table = SwapTable(2 * CLUSTER_SLOTS)
    table.words[700] = UNBACKED_WORD
    with pytest.raises(AssertionError):
        table.give_back(np.array([0, 1]))
    assert table.words[700] == UNBACKED_WORD
