"""The swap table: one tagged word per slot, in sparse shared memory.

    tag:3 | referenced:1 | length:13 | offset:18 | number:29      (least significant first)

`number` is a segment's for ZSWAP and an extent's for PHYS; all others carry no place. Because the
offset stands right under the number, `word >> 17` is the entry's address in an arena of segments.
Helpers come in threes: make a word, ask its tag, take its fields; all of them work on whole batches
(arrays of shape (n,)). Those for one word (`tag_of`, `length_of`, `address_of`) work on numbers of
Python's, which for a page alone take a fifth of the time that arrays of one take.

Invariants:
- A word of 0 is FREE: an untouched table is an empty table, and a punched page of it too.
- A word is written after the bytes that it names, in one aligned 8-byte store.
- One cluster is 512 words, exactly one page; freeing a cluster gives that page back.

The table must not know spaces, backends, or what a number refers to. The layout follows
mm/swap_table.h of Linux (one tagged word per entry), which also has the helpers in threes.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from vswapd_backends.base import I64, U64, Places
from vswapd_backends.shared import SharedRegion

TAG_BITS: Final = 3
LENGTH_SHIFT: Final = 4
OFFSET_SHIFT: Final = 17
WORD_BYTES: Final = 8
CLUSTER_SLOTS: Final = 512
CLUSTER_SHIFT: Final = 9

_TAGS_BITS: Final = 0b111
_TAG_MASK: Final = np.uint64(_TAGS_BITS)
REFERENCED: Final = 0b1000
_REFERENCED: Final = np.uint64(REFERENCED)
_LENGTH_BITS: Final = (1 << 13) - 1
_LENGTH_MASK: Final = np.uint64(_LENGTH_BITS)
_LENGTH_SHIFT: Final = np.uint64(LENGTH_SHIFT)
_OFFSET_SHIFT: Final = np.uint64(OFFSET_SHIFT)


class Tag(IntEnum):
    """What stands behind a slot."""

    FREE = 0
    UNBACKED = 1
    """Allocated, but without content: its last store was rejected."""
    LOST = 2
    """Allocated, and its content is lost: its device could not be read when it was taken off."""
    ZERO = 3
    ZSWAP = 4
    PHYS = 5


BACKED: Final = Tag.ZERO
"""The first of those that have content."""
FREE_WORD: Final = np.uint64(Tag.FREE)
UNBACKED_WORD: Final = np.uint64(Tag.UNBACKED)
LOST_WORD: Final = np.uint64(Tag.LOST)
ZERO_WORD: Final = np.uint64(Tag.ZERO)
TAGS: Final = 1 << TAG_BITS


def make_words(tag: Tag, places: Places) -> U64:
    """Words of `tag` (ZSWAP or PHYS) for n places, not referenced; shape (n,)."""
    assert tag in (Tag.ZSWAP, Tag.PHYS)
    if len(places.address) == 1:
        address, length = places.address.item(0), places.length.item(0)
        word = (address << OFFSET_SHIFT) | (length << LENGTH_SHIFT) | int(tag)
        return np.array([word], np.uint64)
    words = places.address << OFFSET_SHIFT
    words |= places.length << LENGTH_SHIFT
    words |= int(tag)
    return words.view(np.uint64)


def tags_of(words: U64) -> I64:
    """The tags of n words, shape (n,), as int64 (ready for bincount)."""
    return (words & _TAG_MASK).view(np.int64)


def tag_of(word: int) -> int:
    """The tag of one word."""
    return word & _TAGS_BITS


def length_of(word: int) -> int:
    """The compressed length of one word."""
    return (word >> LENGTH_SHIFT) & _LENGTH_BITS


def address_of(word: int) -> int:
    """Where the entry of one word begins, as `addresses_of`."""
    return word >> OFFSET_SHIFT


def by_tag(words: U64) -> list[tuple[int, U64]]:
    """N words, n > 0, by their tags: mostly they have only one. Their order is kept."""
    tags = words & _TAG_MASK
    first = tags.item(0)
    if (tags == tags[0]).all():
        return [(first, words)]
    return [(tag, words[tags == tag]) for tag in np.unique(tags).tolist()]


def total_length(words: U64) -> int:
    """Compressed bytes of n ZSWAP or PHYS words together."""
    return int(lengths_of(words).sum())


def all_tagged(words: U64, tag: Tag) -> bool:
    """Whether every word has this tag; looks at each of them, not at the first."""
    # int(): numpy takes its time to find out what an enum member is.
    return bool(((words & _TAG_MASK) == int(tag)).all())


def places_of(words: U64) -> Places:
    """The places of n ZSWAP or PHYS words."""
    return Places(addresses_of(words), lengths_of(words))


def lengths_of(words: U64) -> I64:
    """Compressed lengths of n ZSWAP or PHYS words; 0 for all others."""
    return ((words >> _LENGTH_SHIFT) & _LENGTH_MASK).view(np.int64)


def addresses_of(words: U64) -> I64:
    """Number * 256 KiB + offset of n words: where their entries begin in an arena of segments."""
    return (words >> _OFFSET_SHIFT).view(np.int64)


def referenced(words: U64) -> npt.NDArray[np.bool_]:
    """Which of n words were loaded since somebody looked."""
    marked: npt.NDArray[np.bool_] = (words & _REFERENCED) != 0
    return marked


def with_reference(words: U64) -> U64:
    """The same words, marked as loaded."""
    return words | _REFERENCED


def reference_bits(words: U64) -> U64:
    """Only the reference bits of n words, in their place."""
    return words & _REFERENCED


def without_reference(words: U64) -> U64:
    """The same words, unmarked: what a place is compared by."""
    return words & ~_REFERENCED


class SwapTable:
    """`max_slots` words. Reading and writing goes through `words`, by arrays of slot numbers."""

    def __init__(self, max_slots: int, region: SharedRegion | None = None) -> None:
        """A table of so many words, in a region of that size; None: one of its own."""
        assert max_slots % CLUSTER_SLOTS == 0
        self.max_slots: Final = max_slots
        size = max_slots * WORD_BYTES
        self.region: Final = SharedRegion("vswapd-table", size) if region is None else region
        assert self.region.size == size
        self.words: Final[U64] = self.region.words_array()
        self.untrimmed = False
        """Whether it may occupy pages that are not needed: the system did not take them back."""

    def give_back(self, clusters: I64) -> None:
        """Return the pages of clusters whose words are all FREE; shape (k,), any order."""
        for first, count in runs(clusters):
            assert not self.words[first << CLUSTER_SHIFT : (first + count) << CLUSTER_SHIFT].any()
            size = CLUSTER_SLOTS * WORD_BYTES
            if not self.region.give_back(first * size, count * size):
                self.untrimmed = True

    def wipe(self, clusters: I64) -> None:
        """Make all words of clusters FREE, whatever they were, and return their pages."""
        for first, count in runs(clusters):
            size = CLUSTER_SLOTS * WORD_BYTES
            self.region.punch(first * size, count * size)

    @property
    def resident_bytes(self) -> int:
        """Memory that the table takes: nothing when empty, 8 bytes per slot when full."""
        return self.region.resident_bytes


def runs(numbers: I64) -> list[tuple[int, int]]:
    """Distinct numbers as (first, count) of neighbouring ones, ascending."""
    ordered = np.unique(numbers)
    if not len(ordered):
        return []
    breaks = np.flatnonzero(np.diff(ordered) != 1) + 1
    firsts = ordered[np.concatenate(([0], breaks))].tolist()
    counts = np.diff(np.concatenate(([0], breaks, [len(ordered)]))).tolist()
    return list(zip(firsts, counts, strict=True))
