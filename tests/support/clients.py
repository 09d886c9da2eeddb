"""Clients that do this and that with a daemon, and know what they should find.

Invariants:
- What a client does follows from its seed, as far as the daemon's answers do.

This module must not know how the daemon is run, or what happens to it.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import vswap
import vswap.aio
from support.engine import page
from support.history import History, Kind

KINDS: Final = ("text", "mixed", "noise", "repeat", "zero")
TASKS: Final = 3


class TaskClient(abc.ABC):
    """What several tasks do with one space at once, in a process of their own."""

    def __init__(self, seed: int, space: vswap.aio.Space) -> None:
        self.chooser = random.Random(seed)
        self.space = space
        self.busy: set[int] = set()
        """Slots that a task has to itself: nobody else may name them."""
        self.rejects = 0
        self.done = 0
        """Requests so far."""
        self._made = seed * 10_000_000

    def fresh(self, count: int) -> list[bytes]:
        """Pages that no client has had."""
        self._made += count
        kinds = self.chooser.choices(KINDS, k=count)
        return [page(kind, self._made + i) for i, kind in enumerate(kinds)]

    def some_of(self, slots: Iterable[int], counts: Sequence[int]) -> list[int]:
        """Some that are not busy, so many or fewer."""
        there = [slot for slot in slots if slot not in self.busy]
        return self.chooser.sample(there, min(len(there), self.chooser.choice(counts)))

    async def work(self, until: Callable[[int], bool]) -> None:
        """A task: do this and that until told that so many requests are enough."""
        steps = 0
        while not until(steps):
            steps += 1
            self.done += 1
            what = self.chooser.choices(
                [self.store, self.overwrite, self.load, self.free], [3, 3, 6, 1.5]
            )[0]
            await what()

    @abc.abstractmethod
    async def store(self) -> None:
        """Store new pages."""

    @abc.abstractmethod
    async def overwrite(self) -> None:
        """Store over some slots."""

    @abc.abstractmethod
    async def load(self) -> None:
        """Load some, and look at them now or at the end."""

    @abc.abstractmethod
    async def free(self) -> None:
        """Free some."""

    @abc.abstractmethod
    async def finish(self) -> None:
        """Load what is left, and free it."""

    @property
    @abc.abstractmethod
    def events(self) -> int:
        """How much it has seen."""

    @property
    @abc.abstractmethod
    def problems(self) -> list[str]:
        """What was not as it should be."""


class OverlappingClient(TaskClient):
    """Slots are shared by its tasks; what they may find follows from when calls began and ended."""

    def __init__(self, seed: int, space: vswap.aio.Space) -> None:
        super().__init__(seed, space)
        self.history = History()
        self.slots: list[int] = []

    def some(self) -> list[int]:
        return self.some_of(self.slots, [1, 3, 40])

    async def store(self) -> None:
        pages = self.fresh(self.chooser.choice([1, 5, 64, 200]))
        begin = time.monotonic()
        try:
            slots = (await self.space.store(b"".join(pages))).tolist()
        except vswap.Rejected:
            self.rejects += 1
            await self.free()
            return
        self.note("store", slots, pages, begin)
        self.slots += slots

    async def overwrite(self) -> None:
        slots = self.some()
        if not slots:
            return
        pages = self.fresh(len(slots))
        self.busy |= set(slots)  # two overlapping overwrites of one slot could end in any order
        begin = time.monotonic()
        try:
            await self.space.store(b"".join(pages), slots=slots)
        except vswap.Rejected as error:
            self.rejects += 1
            written, empty = set(error.done.tolist()), error.slots.tolist()
            done = [(slot, new) for slot, new in zip(slots, pages, strict=True) if slot in written]
            self.note("store", [slot for slot, _ in done], [new for _, new in done], begin)
            for slot in empty:
                self.slots.remove(slot)
            await self.space.free(empty)
            self.busy -= set(slots)
            return
        self.note("store", slots, pages, begin)
        self.busy -= set(slots)

    async def load(self) -> None:
        slots = self.some()
        if not slots:
            return
        begin = time.monotonic()
        data = bytes(await self.space.load(slots))
        self.note("load", slots, [data[i : i + 4096] for i in range(0, len(data), 4096)], begin)

    async def free(self) -> None:
        slots = self.some()
        self.busy |= set(slots)
        for slot in slots:
            self.slots.remove(slot)
        # Loads that are under way are answered first: replies come in the order of requests.
        if slots:
            await self.space.free(slots)
        self.busy -= set(slots)

    def note(self, kind: Kind, slots: Sequence[int], pages: Sequence[bytes], begin: float) -> None:
        end = time.monotonic()
        for slot, content in zip(slots, pages, strict=True):
            # What tells a page from others: a long history of pages would take gigabytes.
            self.history.add(kind, slot, blake2b(content, digest_size=12).digest(), begin, end)

    async def finish(self) -> None:
        """Load what is left, and free it."""
        left = [slot for slot in self.slots if slot not in self.busy]
        begin = time.monotonic()
        for at in range(0, len(left), 500):
            data = bytes(await self.space.load(left[at : at + 500]))
            pages = [data[i : i + 4096] for i in range(0, len(data), 4096)]
            self.note("load", left[at : at + 500], pages, begin)
        if left:
            await self.space.free(left)

    @property
    def events(self) -> int:
        """Pages that were stored or loaded."""
        return len(self.history.events)

    @property
    def problems(self) -> list[str]:
        """Loads that no order of the stores explains."""
        return self.history.problems()


def run_tasks(
    path: Path,
    seed: int,
    pipe: Connection,
    until: Callable[[int], bool] | None = None,
    make: Callable[[int, vswap.aio.Space], TaskClient] = OverlappingClient,
) -> None:
    """A process's whole life: a client with TASKS tasks.

    Args:
        path: the daemon's socket.
        seed: what it does.
        pipe: told (problems, events, rejects) at the end.
        until: given the requests of a task, whether they are enough; None: until something comes
            through the pipe, through which the number of requests is told in between.
        make: what kind of client it is.
    """

    async def run() -> tuple[list[str], int, int]:
        async with vswap.aio.connect(path, label=f"client {seed}", patience=60) as space:
            client = make(seed, space)

            def enough(_: int) -> bool:
                if client.done % 20 == 0:
                    pipe.send(client.done)
                return pipe.poll()

            await asyncio.gather(*(client.work(until or enough) for _ in range(TASKS)))
            await client.finish()
            return client.problems, client.events, client.rejects

    try:
        pipe.send(asyncio.run(run()))
    except BaseException as error:  # noqa: BLE001 - the parent reports it
        pipe.send(([f"client {seed} failed: {error!r}"], 0, 0))


class Worker(threading.Thread):
    """A client that does this and that, and knows what it should find."""

    def __init__(self, path: Path, seed: int) -> None:
        super().__init__()
        self.chooser = random.Random(seed)
        self.path = path
        self.done = 0
        self.stop = False
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with vswap.connect(self.path, timeout=60) as space:
                self.work(space)
        except BaseException as error:  # noqa: BLE001 - told by whoever joins
            self.error = error

    def page(self) -> bytes:
        stamp = self.chooser.randbytes(16)
        kind = self.chooser.random()
        if kind < 0.1:
            return bytes(4096)
        if kind < 0.5:
            return self.chooser.randbytes(4096)
        return (stamp * 256)[:4096]

    def work(self, space: vswap.Space) -> None:
        held: dict[int, bytes | None] = {}
        while not self.stop:
            some = self.chooser.sample(list(held), min(len(held), self.chooser.choice([1, 9, 150])))
            match self.chooser.choice(["new", "new", "over", "load", "load", "free"]):
                case "new" if len(held) < 1500:
                    pages = [self.page() for _ in range(self.chooser.choice([1, 9, 150, 400]))]
                    with contextlib.suppress(vswap.Rejected):
                        slots = space.store(b"".join(pages)).tolist()
                        assert not set(slots) & set(held), "a slot was given out twice"
                        held.update(zip(slots, pages, strict=True))
                case "over" if some:
                    pages = [self.page() for _ in some]
                    try:
                        space.store(b"".join(pages), slots=some)
                        held.update(zip(some, pages, strict=True))
                    except vswap.Rejected as error:
                        written = dict(zip(some, pages, strict=True))
                        held.update({slot: written[slot] for slot in error.done.tolist()})
                        held.update(dict.fromkeys(error.slots.tolist()))
                case "load" if some:
                    backed = [slot for slot in some if held[slot] is not None]
                    if backed:
                        expected = b"".join(held[slot] or b"" for slot in backed)
                        assert space.load(backed) == expected
                case "free" if some:
                    space.free(some)
                    for slot in some:
                        del held[slot]
            self.done += 1
        backed = [slot for slot in held if held[slot] is not None]
        assert space.load(backed) == b"".join(held[slot] or b"" for slot in backed)
        if held:
            space.free(list(held))
