"""Each space's last request that gave it slots, or took some: what it was answered with.

A client that was not answered cannot know whether its request was carried out. It asks for the
answer then, or sends the request again. So that either is right, what a request is about to change
is written down before the first word of the table changes, and recovery makes it whole or undone:
a store to new slots whose words were not all published is undone, a free is finished. (A store over
slots needs none of it: it can be sent again.)

    row:  state | request | count | 5 * 0 | slot ids ...       words of 8 bytes

Invariants:
- A row is filled while its state is NOTHING, and then published by its state.
- Whoever begins a request has had the answers to all earlier ones: one row per space is enough.

This module must not know words, or what the requests store.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from vswapd.memory import ANSWER_WORDS, MOST_ANSWERED, ShardMemory
from vswapd_backends.base import U64

_REQUEST: Final = 1
_COUNT: Final = 2
_IDS: Final = 8
_WORD: Final = (1 << 64) - 1

_NOTHING: Final = 0
_STORING: Final = 1
_STORED: Final = 2
_FREEING: Final = 3
_FREED: Final = 4


@dataclass(frozen=True, slots=True)
class Answer:
    """A request that was carried out."""

    request: int
    """As its client numbers it."""
    slots: U64
    """The new slots of a store; those that were freed."""
    freed: bool
    """Whether it was a free, not a store."""


class Answers:
    """See the module. Spaces are named by where they are kept."""

    def __init__(self, memory: ShardMemory) -> None:
        self._memory = memory
        # A view, not an array: single words are written in half the time, 0.5 us per request.
        # As numpy says int64 here, or slices of arrays could not be assigned.
        self._words: Final[memoryview] = memory.answers.cast("l")

    def storing(self, record: int, request: int, ids: U64) -> None:
        """Slots are about to be given to a space, all of them or none."""
        self._begin(record, request, ids, _STORING)

    def stored(self, record: int) -> None:
        """They are."""
        self._words[record * ANSWER_WORDS] = _STORED

    def withdrawn(self, record: int) -> None:
        """They are not; or nobody will ask whether they are."""
        self._words[record * ANSWER_WORDS] = _NOTHING

    def freeing(self, record: int, request: int, ids: U64) -> None:
        """Slots are about to be taken from a space; nothing can keep that from being done."""
        self._begin(record, request, ids, _FREEING)

    def freed(self, record: int) -> None:
        """They are."""
        self._words[record * ANSWER_WORDS] = _FREED

    def _begin(self, record: int, request: int, ids: U64, state: int) -> None:
        words, at, count = self._words, record * ANSWER_WORDS, len(ids)
        assert count <= MOST_ANSWERED
        words[at] = _NOTHING
        words[at + _REQUEST] = request - (request >> 63 << 64)  # as a signed word
        words[at + _COUNT] = count
        if count == 1:
            words[at + _IDS] = ids.view(np.int64).item()
        else:
            words[at + _IDS : at + _IDS + count] = ids.view(np.int64).data
        words[at] = state

    def unfinished(self, record: int) -> U64:
        """Slots that a space must not have: to be freed before anything else is done."""
        if self._state(record) in {_STORING, _FREEING}:
            return self._ids(record)
        return np.empty(0, np.uint64)

    def finished(self, record: int) -> None:
        """It has them no more."""
        if self._state(record) == _STORING:
            self.withdrawn(record)
        else:
            self.freed(record)

    def last(self, record: int) -> Answer | None:
        """The last request of a space; None: it is not known to have been carried out."""
        state = self._state(record)
        if state not in {_STORED, _FREED}:
            return None
        request = self._words[record * ANSWER_WORDS + _REQUEST]
        return Answer(request & _WORD, self._ids(record), state == _FREED)

    def forget(self, record: int) -> None:
        """Forget all of a space, and give its memory back."""
        self._memory.wipe_answers(record)

    def _state(self, record: int) -> int:
        state: int = self._words[record * ANSWER_WORDS]
        return state

    def _ids(self, record: int) -> U64:
        at = record * ANSWER_WORDS
        count = self._words[at + _COUNT]
        return np.array(self._words[at + _IDS : at + _IDS + count], np.int64).view(np.uint64)
