"""Runs the engine's operations: each step under the one lock, what they wait for outside of it.

Two threads take steps: the event loop (`start`, `finish`) and the shrinker (`run`). Workers only
perform device requests and computations; they never take the lock.

Invariants:
- The engine is only touched between taking the lock and giving it back, one step at a time.
- Taking turns is fair: a thread that gives the lock back and wants it again at once comes after one
  that has waited meanwhile.
- An operation that was started is driven to its end, or closed under the lock when none of its
  requests is under way any more: its cleanup is the engine's consistency.
- No wake-up is lost: whoever yields WAIT notes the epoch in the same step, under the lock.

This module must not know what operations do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Generic, TypeVar

from vswapd.causes import explained
from vswapd.trouble import Trouble
from vswapd.turns import Turns
from vswapd_backends.base import PAUSE, WAIT, Breath, Compute, IoBatch, StuckError, Submit

T = TypeVar("T")
_LOG: Final = logging.getLogger(__name__)

IO_DEPTH: Final = 4
"""Device requests performed at a time, a writeback's and those of loads together."""
_LATELY_S: Final = 0.01
"""How long after a request others still step back for the next one."""
_STEP_BACK_S: Final = 50e-6
"""How long they do: twice that with the timer's slack, enough for a request for one page."""
_AHEAD: Final = 3
"""Turns that long work in the event loop takes one after the other while there were no requests
lately: standing in line is 30 us."""
COMPUTE_DEPTH: Final = 2
"""Slow computations at a time. More would only take turns at the interpreter."""


class FairLock:
    """A mutex whose waiters come before whoever has just held it."""

    def __init__(self) -> None:
        # Whoever waits for the room holds the door, so that who leaves the room cannot come back
        # in before. Lock order: door, room.
        self.door: Final = threading.Lock()
        self.room: Final = threading.Lock()

    def acquire(self, timeout: float = -1.0) -> bool:
        """Take it; False if that was not possible within `timeout` seconds (-1: no bound)."""
        if not self.door.acquire(timeout=timeout):
            return False
        try:
            return self.room.acquire(timeout=timeout)
        finally:
            self.door.release()

    def release(self) -> None:
        """Give it back."""
        self.room.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.room.release()


@dataclass(slots=True)
class Elsewhere:
    """What an operation yields to have something done by somebody else, and wait for the end."""

    begin: Callable[[Callable[[], None]], None]
    """Called once, in the thread that drives the operation, outside the lock; it must not wait, and
    have what it is given called, from any thread, when all is done."""


Need = IoBatch | Submit | Breath | Compute[Any] | Elsewhere
Task = Generator[Need, None, T]
"""An engine's operation, or one around it that computes as well."""


@dataclass(slots=True)
class Pending(Generic[T]):
    """A task that could not end at once, what it needs, and the epoch in which it said so."""

    task: Task[T]
    need: Need
    epoch: int


@dataclass(slots=True)
class Progress:
    """How a task fares that a thread of its own drives: the thread writes, others look."""

    steps: int = 0
    """Steps it has taken under the lock; two looks that see the same number saw no progress."""
    waiting: bool = False
    """For a device, or for others' operations: no progress is to be expected."""
    stop: bool = False
    """Set by others: give the task up after its next step."""


class _Flight:
    """Work under way in workers: `parts` pieces of it."""

    def __init__(self, parts: int) -> None:
        self._lock = threading.Lock()
        self._left = parts
        self._callback: Callable[[], None] | None = None
        self.error: BaseException | None = None
        """A mistake of ours, from any of the parts; what devices do wrong is in their requests."""

    def part_done(self, error: BaseException | None) -> None:
        with self._lock:
            self.error = self.error or error
            self._left -= 1
            callback = None if self._left else self._callback
        if callback is not None:
            callback()

    @property
    def done(self) -> bool:
        """Whether all parts are."""
        return not self._left

    def when_done(self, callback: Callable[[], None]) -> None:
        """Call it when all parts are done: at once if they are."""
        with self._lock:
            if self._left:
                self._callback = callback
                return
        callback()


class _Workers:
    """Threads that perform what is put into their queue, made when they are first needed.

    Where none can be had (others may take all that the system gives), whoever submits performs it:
    that keeps others waiting, but no request fails, and nobody waits for a thread that is none.
    """

    def __init__(self, name: str, depth: int) -> None:
        self.depth: Final = depth
        self._name = name
        self._queue: queue.SimpleQueue[tuple[Callable[[], None], _Flight] | None] = (
            queue.SimpleQueue()
        )
        self._making = threading.Lock()
        self._threads: list[threading.Thread] = []
        """Those that run."""
        self._short = False
        """Whether the journal says that there are too few."""

    def submit(self, calls: list[Callable[[], None]]) -> _Flight:
        """Perform these calls, at the same time as far as there are workers."""
        if len(self._threads) < self.depth:
            self._make()
        flight = _Flight(len(calls))
        if self._threads:
            for call in calls:
                self._queue.put((call, flight))
        else:
            for call in calls:
                _perform(call, flight)
        return flight

    def _make(self) -> None:
        """Start what threads are missing, or as many of them as can be had."""
        with self._making:
            try:
                while len(self._threads) < self.depth:
                    name = f"{self._name}-{len(self._threads)}"
                    # Daemons: a device that hangs must not keep the process from ending.
                    thread = threading.Thread(target=self._work, name=name, daemon=True)
                    thread.start()
                    self._threads.append(thread)
                self._short = False
            except (RuntimeError, MemoryError) as error:
                if not self._short:
                    there = f"{len(self._threads)} of {self.depth} {self._name} threads are there"
                    _LOG.warning("%s; %s, and requests take longer", explained(error), there)
                self._short = True

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            _perform(*item)
            del item  # an idle worker holds on to nothing

    def close(self) -> None:
        """End the threads, once what is in the queue is done."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()


def _perform(call: Callable[[], None], flight: _Flight) -> None:
    error: BaseException | None = None
    try:
        call()
    except BaseException as caught:  # noqa: BLE001 - handed to whoever waits
        error = caught
    flight.part_done(error)


class Driver:
    """The lock, the workers, and the news that somebody's operation has moved on."""

    def __init__(self, depth: int = IO_DEPTH) -> None:
        self.lock: Final = FairLock()
        self._devices: Final = _Workers("vswapd-io", depth)
        self._computers: Final = _Workers("vswapd-compute", COMPUTE_DEPTH)
        self._trouble: Final = Trouble()
        self.turns: Final = Turns()
        """For long work in the event loop."""
        # All that follows is guarded by the lock.
        self._epoch = 0
        """How often a task that had to wait for something has moved on."""
        self._pending = 0
        """Tasks that were started and have not ended."""
        self._waiters: list[Callable[[], None]] = []
        """Whom to resume at the next epoch."""
        self._asked_at = -math.inf
        """When a request was begun for the last time; by the clock of `time.monotonic`."""

    # Steps

    def start(self, task: Task[T]) -> T | Pending[T]:
        """Take the first steps of a request's task; most end here, and cost no more than a call.

        Raises:
            BaseException: whatever the task raises.
        """
        self._asked_at = time.monotonic()
        return self._start(task)

    def _start(self, task: Task[T]) -> T | Pending[T]:
        door, room = self.lock.door, self.lock.room
        while True:
            # FairLock.acquire, unrolled: this is once per request.
            with door:
                room.acquire()
            try:
                need = next(task)
                if not isinstance(need, Compute) or need.slow:
                    self._pending += 1
                    return Pending(task, need, self._epoch)
            except StopIteration as end:
                result: T = end.value
                return result
            finally:
                room.release()
            need.perform()

    async def finish(self, pending: Pending[T]) -> T:
        """Drive a task from the event loop to its end.

        Raises:
            asyncio.CancelledError: cancelled; what was under way has ended, the task is closed.
            BaseException: whatever the task raises.
        """
        task, need, epoch = pending.task, pending.need, pending.epoch
        loop = asyncio.get_running_loop()
        begun: list[_Flight] = []
        ahead = 0
        while True:
            mistake: BaseException | None = None
            try:
                if need is PAUSE:
                    quiet = time.monotonic() - self._asked_at > _LATELY_S
                    ahead = ahead + 1 if quiet and ahead < _AHEAD else 0
                    if not ahead:
                        await self.turns.mine()
                elif need is WAIT:
                    mistake = await _once(loop, partial(self._subscribe, epoch))
                elif isinstance(need, Compute) and not need.slow:
                    need.perform()
                else:
                    flight = self._begin(need, begun)
                    if flight is not None:
                        await _once(loop, flight.when_done)
                        mistake = flight.error
                if mistake is not None:
                    await _landed(loop, begun)
            except asyncio.CancelledError:
                with contextlib.suppress(asyncio.CancelledError):
                    await _landed(loop, begun)
                self._close(task)
                raise
            step = self._step(task, mistake)
            if not isinstance(step, Pending):
                return step[0]
            need, epoch = step.need, step.epoch

    def run(self, task: Task[T], progress: Progress | None = None) -> T | None:
        """Drive a task from a thread of its own to its end; None if it was stopped before.

        Raises:
            BaseException: whatever the task raises.
        """
        progress = progress or Progress()
        begun: list[_Flight] = []
        outcome = self._start(task)
        while isinstance(outcome, Pending):
            need = outcome.need
            mistake: BaseException | None = None
            progress.waiting = need is not PAUSE
            if need is WAIT:
                mistake = _wait_for(partial(self._subscribe, outcome.epoch))
            elif need is PAUSE:
                self.step_back()
            else:
                flight = self._begin(need, begun)
                if flight is not None:
                    _wait_for(flight.when_done)
                    mistake = flight.error
            if progress.stop or mistake is not None:
                for flight in begun:
                    _wait_for(flight.when_done)
            progress.waiting = False
            progress.steps += 1
            if progress.stop and mistake is None:
                self._close(task)
                return None
            step = self._step(task, mistake)
            if not isinstance(step, Pending):
                return step[0]
            outcome = step
        return outcome

    def step_back(self) -> None:
        """Let the event loop have the interpreter, if there are requests these days.

        For threads that can wait, between two pieces of work, without the lock. Whoever only gives
        the interpreter's lock back, for the time of a short call, mostly has it again before a
        waiting thread is awake; and each such time the wait for a switch begins anew.
        """
        if time.monotonic() - self._asked_at < _LATELY_S:
            time.sleep(_STEP_BACK_S)

    def _step(self, task: Task[T], mistake: BaseException | None) -> Pending[T] | tuple[T]:
        """Resume a pending task; what it waited for has happened (or is a mistake of ours)."""
        ended = True
        with self.lock:
            try:
                need = next(task) if mistake is None else task.throw(mistake)
                ended = False
                return Pending(task, need, self._epoch + 1)
            except StopIteration as end:
                return (end.value,)
            finally:
                self._pending -= ended
                self._wake_waiters()

    def _close(self, task: Task[T]) -> None:
        """Give a pending task up: its cleanup runs under the lock."""
        with self.lock:
            try:
                task.close()
            finally:
                self._pending -= 1
                self._wake_waiters()

    # What tasks need

    def _begin(self, need: Need, begun: list[_Flight]) -> _Flight | None:
        """Put a need to the workers; None: there is nothing to wait for.

        Args:
            need: what the task has yielded.
            begun: the task's flights that it does not wait for yet; kept up to date here.
        """
        if isinstance(need, Submit):
            flight = self._submit(need.batch)
            need.batch.ticket = flight
            begun[:] = [one for one in (*begun, flight) if one is not None and not one.done]
            return None
        if isinstance(need, IoBatch):
            if isinstance(need.ticket, _Flight):
                return need.ticket
            return self._submit(need)
        if isinstance(need, Elsewhere):
            flight = _Flight(1)
            need.begin(lambda: flight.part_done(None))
            return flight
        assert isinstance(need, Compute), need
        return self._computers.submit([need.perform])

    def _submit(self, batch: IoBatch) -> _Flight | None:
        """The requests of a batch, dealt out to as many workers as there are."""
        requests = batch.requests
        if not requests:
            return None
        hands = min(len(requests), self._devices.depth)
        return self._devices.submit(
            [partial(self._perform, IoBatch(requests[hand::hands])) for hand in range(hands)]
        )

    def _perform(self, batch: IoBatch) -> None:
        """In a worker: the requests of a batch, and a word about those that fail."""
        batch.perform()
        self._trouble.of_devices(batch.requests)

    # News

    def _wake_waiters(self) -> None:
        """A pending task has taken a step. Under the lock.

        Whoever cannot be woken any more, as its event loop has gone, is no reason for the task that
        took the step to fail.
        """
        self._epoch += 1
        waiters, self._waiters = self._waiters, []
        for wake in waiters:
            try:
                wake()
            except Exception as error:  # noqa: BLE001 - a border: others' results are at stake
                self._trouble.of_housekeeping("a task that waits cannot be woken", error)

    def _subscribe(self, epoch: int, wake: Callable[[], None]) -> BaseException | None:
        """Call `wake` once the epoch is over: at once if it is.

        Returns:
            StuckError (and no call will come) if nobody is left who could end it.
        """
        with self.lock:
            if self._epoch == epoch:
                if self._pending <= len(self._waiters) + 1:
                    return StuckError("a task waits for the I/O of others, and there are none")
                self._waiters.append(wake)
                return None
        wake()
        return None

    @property
    def pending(self) -> int:
        """Tasks that were started and have not ended."""
        return self._pending

    def close(self) -> None:
        """Wait for what is under way and end the workers. No call may follow."""
        self._devices.close()
        self._computers.close()


_Subscribe = Callable[[Callable[[], None]], BaseException | None]


async def _once(loop: asyncio.AbstractEventLoop, subscribe: _Subscribe) -> BaseException | None:
    """Wait until a callback is called from any thread; cancelled, it still waits, then says so."""
    news: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        loop.call_soon_threadsafe(news.set_result, None)

    mistake = subscribe(wake)
    if mistake is not None:
        return mistake
    cancelled: asyncio.CancelledError | None = None
    while not news.done():
        try:
            await asyncio.shield(news)
        except asyncio.CancelledError as error:
            # What is under way works on the task's buffers: it cannot be left behind.
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return None


async def _landed(loop: asyncio.AbstractEventLoop, flights: list[_Flight]) -> None:
    """Wait until all of them have ended: the task is about to clean up what they work on."""
    cancelled: asyncio.CancelledError | None = None
    for flight in flights:
        try:
            await _once(loop, flight.when_done)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


def _wait_for(subscribe: _Subscribe) -> BaseException | None:
    """Wait until a callback is called."""
    news = threading.Event()
    mistake = subscribe(news.set)
    if mistake is None:
        news.wait()
    return mistake
