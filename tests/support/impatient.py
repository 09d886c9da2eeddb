"""A client whose tasks give calls up at any moment, and know what may have become of each slot.

Invariants:
- No two tasks are at a slot at once, so what it may hold follows from what was answered.
- A slot's content is in doubt only after an overwriting that nobody has waited for.

This module must not know how the daemon is run, or what happens to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar

import vswap
import vswap.aio
from support.engine import page
from vswap import aio_lane
from vswap.protocol import PAGE_BYTES

T = TypeVar("T")

KINDS: Final = ("text", "mixed", "noise", "noise", "repeat", "zero")
GIVEN_UP: Final = 0.3
"""Part of the calls that is given up, if they are not over before."""
ROUNDS: Final = (1, 4, 40, 400)
"""After how many rounds of the loop at most."""
MOST_SLOTS: Final = 1500
SETTLING: Final = 100
"""Rounds of requests in which what was given up must have come to its end."""


class GivenUpError(Exception):
    """The call was cancelled."""


class ImpatientClient:
    """See the module. Its memory is the daemon's window, or not, as it happens.

    It is to be alone in its process.
    """

    def __init__(self, seed: int, space: vswap.aio.Space) -> None:
        self._chooser = random.Random(seed)
        # A piece at a time: other tasks are at work, and calls are given up, within a reply.
        aio_lane._READ_BYTES = 1  # type: ignore[misc]
        self._space = space
        self._may_be: dict[int, set[bytes | None]] = {}
        """What each slot can hold; None: nothing."""
        self._busy: set[int] = set()
        self._made = seed * 10_000_000
        self.done = 0
        self.rejects = 0
        self.events = 0
        self.problems: list[str] = []

    async def work(self, until: Callable[[int], bool]) -> None:
        """Do this and that until told that so many requests are enough."""
        steps = 0
        while not until(steps):
            steps += 1
            self.done += 1
            what = self._chooser.choices(
                [self._store, self._overwrite, self._load, self._free], [3, 3, 6, 1.5]
            )[0]
            await what()

    async def finish(self) -> None:
        """Load what is left, and free it; nothing is left then of calls that were given up."""
        for slot in list(self._may_be):
            await self._check([slot])
        left = list(self._may_be)
        for at in range(0, len(left), 500):
            await self._space.free(left[at : at + 500])
        for _ in range(SETTLING):
            if not len(await self._space.slots()):
                return
        self.problems.append(f"{len(await self._space.slots())} slots were left")

    # Calls

    async def _call(self, call: Coroutine[Any, Any, T]) -> T:
        """What a call returns.

        Raises:
            GivenUpError: it was begun, and cancelled.
        """
        task = asyncio.create_task(call)
        await asyncio.sleep(0)  # it has begun
        if self._chooser.random() < GIVEN_UP:
            for _ in range(self._chooser.randrange(self._chooser.choice(ROUNDS))):
                if task.done():
                    break
                await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait([task])
        if task.cancelled():
            raise GivenUpError
        self.events += 1
        return task.result()

    async def _store(self) -> None:
        if len(self._may_be) > MOST_SLOTS:
            await self._free()
            return
        pages = self._fresh(self._chooser.choice([1, 5, 64, 200]))
        memory = self._memory(pages)
        try:
            slots = (await self._call(self._space.store(memory))).tolist()
        except vswap.Rejected as error:
            self.rejects += 1
            if len(error.slots) or len(error.done):
                self.problems.append(f"a store that was rejected names slots: {error!r}")
            await self._free()
        except GivenUpError:
            pass
        else:
            memory[:] = bytes(len(memory))  # it is ours again
            for slot, content in zip(slots, pages, strict=True):
                if slot in self._may_be:
                    self.problems.append(f"slot {slot:#x} was given out twice")
                self._may_be[slot] = {content}

    async def _overwrite(self) -> None:
        slots = self._some()
        if not slots:
            return
        self._busy |= set(slots)
        pages = dict(zip(slots, self._fresh(len(slots)), strict=True))
        memory = self._memory(list(pages.values()))
        try:
            await self._call(self._space.store(memory, slots=slots))
        except vswap.Rejected as error:
            self.rejects += 1
            for slot in error.done.tolist():
                self._may_be[slot] = {pages[slot]}
            for slot in error.slots.tolist():
                self._may_be[slot] = {None}
        except GivenUpError:
            for slot, content in pages.items():
                self._may_be[slot] |= {content, None}
        else:
            memory[:] = bytes(len(memory))
            for slot, content in pages.items():
                self._may_be[slot] = {content}
        self._busy -= set(slots)

    async def _load(self) -> None:
        slots = self._some()
        if not slots:
            return
        self._busy |= set(slots)
        with contextlib.suppress(GivenUpError):
            await self._call(self._check(slots))
        self._busy -= set(slots)

    async def _check(self, slots: Sequence[int]) -> None:
        """Load, and compare."""
        memory = self._memory([bytes(PAGE_BYTES)] * len(slots))
        found: dict[int, bytes | None] = {}
        try:
            await self._space.load(slots, into=memory)
        except vswap.Unbacked as error:
            found = dict.fromkeys(error.slots.tolist())
        else:
            for index, slot in enumerate(slots):
                found[slot] = bytes(memory[index * PAGE_BYTES : (index + 1) * PAGE_BYTES])
        for slot, content in found.items():
            if content not in self._may_be[slot]:
                said = "nothing" if content is None else content[:24]
                may_be = [each and each[:24] for each in self._may_be[slot]]
                self.problems.append(f"slot {slot:#x} has {said!r}, and may have {may_be}")
            self._may_be[slot] = {content}

    async def _free(self) -> None:
        slots = self._some()
        for slot in slots:
            del self._may_be[slot]
        try:
            if slots:
                await self._call(self._space.free(slots))
        except GivenUpError:
            pass  # they are freed all the same

    # What they are about

    def _fresh(self, count: int) -> list[bytes]:
        self._made += count
        kinds = self._chooser.choices(KINDS, k=count)
        return [page(kind, self._made + i) for i, kind in enumerate(kinds)]

    def _some(self) -> list[int]:
        there = [slot for slot in self._may_be if slot not in self._busy]
        return self._chooser.sample(there, min(len(there), self._chooser.choice([1, 3, 40, 150])))

    def _memory(self, pages: Sequence[bytes]) -> memoryview:
        """A buffer that holds these pages."""
        size = len(pages) * PAGE_BYTES
        shared = self._chooser.random() < 0.4
        memory = self._space.buffer(len(pages)) if shared else memoryview(bytearray(size))
        memory[:] = b"".join(pages)
        return memory
