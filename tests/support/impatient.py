"""A client whose tasks give calls up at any moment, and know what may have become of each slot.

Invariants:
- No two tasks are at a slot at once, so what it may hold follows from what was answered.
- A slot's content is in doubt only after an overwriting that nobody has waited for.

This module must not know how the daemon is run, or what happens to it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from typing import Any, Final, TypeVar

import vswap
import vswap.aio
from support.clients import TaskClient
from vswap import aio_lane
from vswap.protocol import PAGE_BYTES

T = TypeVar("T")

GIVEN_UP: Final = 0.3
"""Part of the calls that is given up, if they are not over before."""
ROUNDS: Final = (1, 4, 40, 400)
"""After how many rounds of the loop at most."""
MOST_SLOTS: Final = 1500
SETTLING: Final = 100
"""Rounds of requests in which what was given up must have come to its end."""


class GivenUpError(Exception):
    """The call was cancelled."""


class ImpatientClient(TaskClient):
    """See the module. Its memory is the daemon's window, or not, as it happens.

    It is to be alone in its process.
    """

    def __init__(self, seed: int, space: vswap.aio.Space) -> None:
        super().__init__(seed, space)
        # A piece at a time: other tasks are at work, and calls are given up, within a reply.
        aio_lane._READ_BYTES = 1  # type: ignore[misc]
        self._may_be: dict[int, set[bytes | None]] = {}
        """What each slot can hold; None: nothing."""
        self._events = 0
        self._problems: list[str] = []

    @property
    def events(self) -> int:
        """Calls that were not given up."""
        return self._events

    @property
    def problems(self) -> list[str]:
        """Pages and slots that were not as they should be."""
        return self._problems

    async def finish(self) -> None:
        """Load what is left, and free it; nothing is left then of calls that were given up."""
        for slot in list(self._may_be):
            await self._check([slot])
        left = list(self._may_be)
        for at in range(0, len(left), 500):
            await self.space.free(left[at : at + 500])
        for _ in range(SETTLING):
            if not len(await self.space.slots()):
                return
        self._problems.append(f"{len(await self.space.slots())} slots were left")

    # Calls

    async def _call(self, call: Coroutine[Any, Any, T]) -> T:
        """What a call returns.

        Raises:
            GivenUpError: it was begun, and cancelled.
        """
        task = asyncio.create_task(call)
        await asyncio.sleep(0)  # it has begun
        if self.chooser.random() < GIVEN_UP:
            for _ in range(self.chooser.randrange(self.chooser.choice(ROUNDS))):
                if task.done():
                    break
                await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait([task])
        if task.cancelled():
            raise GivenUpError
        self._events += 1
        return task.result()

    async def store(self) -> None:
        if len(self._may_be) > MOST_SLOTS:
            await self.free()
            return
        pages = self.fresh(self.chooser.choice([1, 5, 64, 200]))
        memory = self._memory(pages)
        try:
            slots = (await self._call(self.space.store(memory))).tolist()
        except vswap.Rejected as error:
            self.rejects += 1
            if len(error.slots) or len(error.done):
                self._problems.append(f"a store that was rejected names slots: {error!r}")
            await self.free()
        except GivenUpError:
            pass
        else:
            memory[:] = bytes(len(memory))  # it is ours again
            for slot, content in zip(slots, pages, strict=True):
                if slot in self._may_be:
                    self._problems.append(f"slot {slot:#x} was given out twice")
                self._may_be[slot] = {content}

    async def overwrite(self) -> None:
        slots = self._some()
        if not slots:
            return
        self.busy |= set(slots)
        pages = dict(zip(slots, self.fresh(len(slots)), strict=True))
        memory = self._memory(list(pages.values()))
        try:
            await self._call(self.space.store(memory, slots=slots))
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
        self.busy -= set(slots)

    async def load(self) -> None:
        slots = self._some()
        if not slots:
            return
        self.busy |= set(slots)
        with contextlib.suppress(GivenUpError):
            await self._call(self._check(slots))
        self.busy -= set(slots)

    async def _check(self, slots: Sequence[int]) -> None:
        """Load, and compare."""
        memory = self._memory([bytes(PAGE_BYTES)] * len(slots))
        found: dict[int, bytes | None] = {}
        try:
            await self.space.load(slots, into=memory)
        except vswap.Unbacked as error:
            found = dict.fromkeys(error.slots.tolist())
        else:
            for index, slot in enumerate(slots):
                found[slot] = bytes(memory[index * PAGE_BYTES : (index + 1) * PAGE_BYTES])
        for slot, content in found.items():
            if content not in self._may_be[slot]:
                said = "nothing" if content is None else content[:24]
                may_be = [each and each[:24] for each in self._may_be[slot]]
                self._problems.append(f"slot {slot:#x} has {said!r}, and may have {may_be}")
            self._may_be[slot] = {content}

    async def free(self) -> None:
        slots = self._some()
        for slot in slots:
            del self._may_be[slot]
        try:
            if slots:
                await self._call(self.space.free(slots))
        except GivenUpError:
            pass  # they are freed all the same

    # What they are about

    def _some(self) -> list[int]:
        return self.some_of(self._may_be, [1, 3, 40, 150])

    def _memory(self, pages: Sequence[bytes]) -> memoryview:
        """A buffer that holds these pages."""
        size = len(pages) * PAGE_BYTES
        shared = self.chooser.random() < 0.4
        memory = self.space.buffer(len(pages)) if shared else memoryview(bytearray(size))
        memory[:] = b"".join(pages)
        return memory
