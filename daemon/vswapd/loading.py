"""Loads: pages of any mixture of backings, in the order asked for.

What lies in the pool is read at once, what lies on devices with one read for neighbours; each entry
from a device is held against its check. Nothing is consumed.

Invariants: invariants 14 to 17 of ARCHITECTURE.md.

This module must not know how pages come to be where they are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vswapd.clusters import bad_slots
from vswapd.core import Core
from vswapd.errors import PageLostError, UnbackedError
from vswapd.fallback import Fallback
from vswapd.groups import Space, refuse_closed
from vswapd.shrinker import Shrinker
from vswapd.swap_table import (
    REFERENCED,
    Tag,
    address_of,
    addresses_of,
    all_tagged,
    length_of,
    lengths_of,
    places_of,
    tag_of,
    tags_of,
    with_reference,
)
from vswapd_backends.base import I64, PAUSE, SHORT_PAGES, U64, Operation, turns_of
from vswapd_backends.codec import CorruptError
from vswapd_backends.zero import ZERO_PAGE
from vswapd_backends.zswap import decode


class Loading:
    """Reads pages for clients."""

    def __init__(
        self, core: Core, fallback: Fallback, shrinker: Shrinker, nudge: Callable[[], None]
    ) -> None:
        self._core = core
        self._fallback = fallback
        self._shrinker = shrinker
        self._nudge = nudge

    def load(self, space: Space, slots: U64) -> Operation[list[bytes | memoryview]]:
        """See Engine.load."""
        refuse_closed(space)
        if len(slots) == 1:
            page = self._load_one(space, slots)
            if page is not None:
                return [page]
        if len(slots) > SHORT_PAGES:
            pages = yield from self._load_in_turns(space, slots)
        else:
            pages = yield from self._load_at_once(space, slots)
        self._core.stats.load_pages += len(pages)
        return pages

    def _load_at_once(self, space: Space, slots: U64) -> Operation[list[bytes | memoryview]]:
        numbers = self._core.clusters.resolve(space.id, slots)
        words = self._core.table.words[numbers]
        if all_tagged(words, Tag.ZSWAP):
            try:
                pages = self._read_zswap(words)
            except CorruptError as error:
                raise self._lost(slots[error.indices]) from None
            self._core.table.words[numbers] = with_reference(words)
            return pages
        pages, lost = yield from self._load_moving(space, slots)
        if len(lost):
            raise self._lost(lost)
        return pages

    def _load_in_turns(self, space: Space, slots: U64) -> Operation[list[bytes | memoryview]]:
        """What is in RAM first, a turn at a time; then what is on devices, read in one go.

        Others may move pages between turns: each is looked for when it is its turn.
        """
        numbers = self._core.clusters.resolve(space.id, slots)
        _refuse_missing(slots, self._core.table.words[numbers])
        pages: list[bytes | memoryview] = []
        away: list[int] = []
        lost: list[int] = []
        for turn in turns_of(len(slots)):
            first = turn.start
            if first:
                yield PAUSE
                refuse_closed(space)
            numbers = self._core.clusters.resolve(space.id, slots[turn])
            words = self._core.table.words[numbers]
            _refuse_missing(slots[turn], words)
            tags = tags_of(words)
            some, unreadable = self._read_here(words, tags)
            pages += some
            lost += [first + index for index in unreadable]
            away += (first + np.flatnonzero(tags == Tag.PHYS)).tolist()
            numbers = numbers[tags == Tag.ZSWAP]
            self._core.table.words[numbers] = with_reference(self._core.table.words[numbers])
        gone = slots[lost]
        if away:
            found, more = yield from self._load_moving(space, slots[away])
            gone = np.concatenate([gone, more])
            for index, page in zip(away, found, strict=True):
                pages[index] = page
        if len(gone):
            raise self._lost(np.unique(gone))
        return pages

    def _load_moving(
        self, space: Space, slots: U64
    ) -> Operation[tuple[list[bytes | memoryview], U64]]:
        """As `_load_mixed`, of pages that may be on their way from where they could not be read.

        Returns:
            the pages, and the slots of those that could not be had.
        """
        try:
            while True:
                numbers = self._core.clusters.resolve(space.id, slots)
                words = self._core.table.words[numbers]
                pages, lost = yield from self._load_mixed(slots, numbers, words)
                which = np.unique(np.array(lost, np.int64))
                stays = self._core.words_now(numbers[which]) == words[which]
                if not lost or stays.any():
                    return pages, np.unique(slots[which[stays]])
                # All of them have moved while their device was read: they are somewhere else.
                refuse_closed(space)
        finally:
            # What was pinned meanwhile may be something to do for the shrinker now.
            self._nudge()

    def _load_one(self, space: Space, slots: U64) -> bytes | None:
        """One page in numbers of Python's: a fifth of the time. None: it is not that simple."""
        table = self._core.table.words
        number = self._core.clusters.resolve_one(space.id, slots)
        word = table.item(number)
        if tag_of(word) != Tag.ZSWAP or self._core.settings.verify == "always":
            return None
        try:
            page = self._core.zswap.read_one(address_of(word), length_of(word))
        except CorruptError:
            raise self._lost(slots) from None
        table[number] = word | REFERENCED
        self._core.stats.load_pages += 1
        return page

    def _read_zswap(self, words: U64) -> list[bytes | memoryview]:
        addresses = addresses_of(words)
        lengths = lengths_of(words)
        zswap = self._core.zswap
        if self._core.settings.verify == "always":
            wrong = zswap.wrong(addresses, lengths)
            if wrong:
                zswap.corrupt_entries += len(wrong)
                raise CorruptError(sorted(wrong))
        return zswap.read(addresses, lengths)

    def _lost(self, slots: U64) -> PageLostError:
        self._core.stats.lost_pages += len(slots)
        return PageLostError(
            f"{len(slots)} page(s) are lost, first {int(slots[0]):#x}: their bytes could not be "
            "read back or were not the ones that were stored",
            slots,
        )

    def _load_mixed(
        self, slots: U64, numbers: I64, words: U64
    ) -> Operation[tuple[list[bytes | memoryview], list[int]]]:
        """The pages, and the indices of those that could not be had."""
        _refuse_missing(slots, words)
        tags = tags_of(words)
        # Before the device is waited for: these words are true now.
        pages, lost = self._read_here(words, tags)
        on_device = np.flatnonzero(tags == Tag.PHYS)
        if len(on_device):
            lost += yield from self._load_phys(numbers, words, on_device, pages)
        if lost:
            return pages, lost
        table = self._core.table.words
        same = numbers[(self._core.words_now(numbers) == words) & (tags != Tag.ZERO)]
        table[same] = with_reference(table[same])
        return pages, []

    def _read_here(self, words: U64, tags: I64) -> tuple[list[bytes | memoryview], list[int]]:
        """As `_load_mixed`, of what is not on devices; a zero page stands for what is."""
        pages: list[bytes | memoryview] = [ZERO_PAGE] * len(words)
        lost = np.flatnonzero(tags == Tag.LOST).tolist()
        in_pool = np.flatnonzero(tags == Tag.ZSWAP)
        if len(in_pool):
            try:
                some = self._read_zswap(words[in_pool])
            except CorruptError as error:
                return pages, lost + in_pool[error.indices].tolist()
            for index, page in zip(in_pool.tolist(), some, strict=True):
                pages[index] = page
        return pages, lost

    def _load_phys(
        self, numbers: I64, words: U64, which: I64, pages: list[bytes | memoryview]
    ) -> Operation[list[int]]:
        """Read entries from devices into `pages`; returns the indices of those that are lost."""
        devices = self._core.devices
        places = places_of(words[which])
        pools = devices.pools_of(places.number)
        plan = devices.plan_reads(places)
        yield from devices.read(plan)
        entries = devices.collect(plan, numbers[which])
        self._fallback.close_idle()
        lost = [int(which[i]) for i, entry in enumerate(entries) if entry is None]
        for pool in np.unique(pools).tolist():
            there = [i for i in np.flatnonzero(pools == pool).tolist() if entries[i] is not None]
            codec = self._core.zswap.pools[pool].codec
            for turn in turns_of(len(there)):
                if turn.start:
                    yield PAUSE  # the entries are copies, and nobody's but ours
                mine = there[turn]
                found = [entry for i in mine if (entry := entries[i]) is not None]
                try:
                    decoded = decode(codec, found, places.length[mine])
                except CorruptError as error:
                    lost += [int(which[mine[i]]) for i in error.indices]
                    continue
                for index, page in zip(mine, decoded, strict=True):
                    pages[int(which[index])] = page
        self._core.stats.swapin_pages += len(which) - len(lost)
        length = int(places.length.sum())
        self._core.housekeeping.do(
            "loads cannot be accounted", lambda: self._shrinker.protect(length)
        )
        return lost


def _refuse_missing(slots: U64, words: U64) -> None:
    """Raise if some slots have no page.

    Raises:
        BadSlotError, UnbackedError: they have none.
    """
    if not words.all():
        raise bad_slots(slots[words == 0])
    unbacked = tags_of(words) == Tag.UNBACKED
    if unbacked.any():
        raise UnbackedError(
            f"{int(unbacked.sum())} slot(s) have no content, first "
            f"{int(slots[unbacked][0]):#x}: their last store was rejected, store them again",
            slots[unbacked],
        )
