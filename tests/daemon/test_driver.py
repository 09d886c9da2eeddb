"""Who takes a step when: the fair lock, waiting for others, and tasks that are given up."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.engine import UnkindDevice
from vswapd.driver import Driver, FairLock, Pending, Progress, Task
from vswapd.turns import Turns
from vswapd_backends.base import (
    PAGE_BYTES,
    PAUSE,
    WAIT,
    Compute,
    IoBatch,
    IoKind,
    IoRequest,
    StuckError,
    Submit,
)

PATIENCE_S = 20.0
BLOCK = bytes(PAGE_BYTES)


@pytest.fixture
def driver() -> Iterator[Driver]:
    made = Driver()
    yield made
    assert made.pending == 0
    made.close()


def _thread(call: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


# Who steps back


def test_it_steps_back_for_requests_and_for_nobody_else(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps a thread that can wait sleeps for a moment, if a request came just now."""
    now = [1000.0]
    slept: list[float] = []
    monkeypatch.setattr("vswapd.driver.time.monotonic", lambda: now[0])
    monkeypatch.setattr("vswapd.driver.time.sleep", slept.append)

    def steps() -> Task[None]:
        yield PAUSE
        yield PAUSE

    def request() -> Task[None]:
        return
        yield PAUSE

    driver.run(steps())
    driver.run(steps())
    assert not slept
    driver.start(request())
    driver.run(steps())
    assert len(slept) == 2
    assert max(slept) < 0.001
    now[0] += 1.0
    driver.run(steps())
    assert len(slept) == 2


# The fair lock


class Room:
    """The inner of a fair lock's two, which tells when somebody at the door wants to come in."""

    def __init__(self, room: threading.Lock) -> None:
        self._room = room
        self.wanted = threading.Event()
        self.locked = room.locked
        self.release = room.release

    def acquire(self, timeout: float = -1.0) -> bool:
        self.wanted.set()
        return self._room.acquire(timeout=timeout)


@pytest.fixture
def room(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Room:
    """That of the driver's lock."""
    made = Room(driver.lock.room)
    monkeypatch.setattr(driver.lock, "room", made)
    return made


@pytest.fixture
def _restless() -> Iterator[None]:
    """Threads take turns all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_restless")
def test_one_at_a_time() -> None:
    """Nobody is inside together with anybody else, however many want to be."""
    lock, inside, most, turns = FairLock(), [0], [0], [0]

    def work() -> None:
        for _ in range(300):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                turns[0] += 1
                inside[0] -= 1

    threads = [_thread(work) for _ in range(4)]
    for thread in threads:
        thread.join()
    assert (most[0], turns[0]) == (1, 1200)


@pytest.mark.parametrize("how", ["lock", "start"])
def test_who_gives_it_back_comes_after_who_has_waited(driver: Driver, room: Room, how: str) -> None:
    """A thread that wants the lock again at once does not get it before one that was waiting."""
    lock, order = driver.lock, list[str]()

    def wait() -> None:
        with lock:
            order.append("waited")

    def again() -> Task[None]:
        order.append("again")
        return
        yield PAUSE

    for _ in range(100):
        lock.acquire()
        room.wanted.clear()
        waiter = _thread(wait)
        assert room.wanted.wait(PATIENCE_S)
        lock.release()
        if how == "start":
            driver.start(again())
        else:
            with lock:
                order.append("again")
        waiter.join()
    assert order == ["waited", "again"] * 100


def test_waiting_for_the_lock_can_be_bounded(driver: Driver, room: Room) -> None:
    """Whoever gives up waiting, at the room or at the door, leaves everything as it was."""
    lock = driver.lock
    lock.acquire()
    assert not lock.acquire(timeout=0.001)
    assert not lock.door.locked()

    def wait() -> None:
        with lock:
            pass

    room.wanted.clear()
    waiter = _thread(wait)
    assert room.wanted.wait(PATIENCE_S)
    assert not lock.acquire(timeout=0.001)
    lock.release()
    waiter.join()
    assert lock.acquire(timeout=PATIENCE_S)
    lock.release()


def test_the_lock_is_given_back_whatever_happens_inside() -> None:
    """An exception under the lock does not keep it."""
    lock = FairLock()
    with pytest.raises(ZeroDivisionError), lock:
        raise ZeroDivisionError
    assert lock.acquire(timeout=0)
    lock.release()


# Tasks


class Gate(UnkindDevice):
    """A device of which writes to extent 1 wait until they are let through.

    Writes to extent 0 end when one to extent 1 is under way.
    """

    def __init__(self) -> None:
        super().__init__(4)
        self.events: list[str] = []
        self.reached = threading.Event()
        self.open = threading.Event()
        self.patience_s = PATIENCE_S
        self.meanwhile: Callable[[], object] = self.reached.is_set
        """Called when a write to extent 0 ends."""

    def write(self, extent: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        if extent == 1:
            self.reached.set()
            self.open.wait(self.patience_s)
        else:
            self.reached.wait(PATIENCE_S)
            self.meanwhile()
        super().write(extent, offset, data)
        self.events.append(f"wrote {extent}")


def _write(device: UnkindDevice, extent: int) -> IoBatch:
    return IoBatch([IoRequest(IoKind.WRITE, device, extent, 0, PAGE_BYTES, BLOCK)])


def test_a_task_that_needs_nothing_ends_at_once(driver: Driver) -> None:
    """Steps that can be taken are taken by the call itself, computations in between too."""

    def task() -> Task[int]:
        compute = Compute(lambda: 6 * 7)
        yield compute
        return compute.result()

    assert driver.start(task()) == 42
    assert driver.run(task()) == 42


def test_the_lock_is_free_while_a_task_waits(driver: Driver) -> None:
    """Device requests are performed outside of the lock, steps under it."""
    device = Gate()

    def task() -> Task[bool]:
        assert driver.lock.room.locked()
        yield _write(device, 1)
        return driver.lock.room.locked()

    found: list[bool | None] = []
    thread = _thread(lambda: found.append(driver.run(task())))
    device.reached.wait(PATIENCE_S)
    assert driver.lock.acquire(timeout=PATIENCE_S)
    driver.lock.release()
    device.open.set()
    thread.join()
    assert found == [True]


def test_who_waits_for_others_is_resumed_by_their_next_step(driver: Driver) -> None:
    """WAIT ends when another pending task has moved on, and not before."""
    device = Gate()
    order: list[str] = []

    def other() -> Task[None]:
        yield _write(device, 1)
        order.append("moved on")

    def waiting() -> Task[None]:
        yield WAIT
        order.append("resumed")

    one = _thread(lambda: driver.run(other()))
    device.reached.wait(PATIENCE_S)
    outcome = driver.start(waiting())
    assert isinstance(outcome, Pending)
    device.open.set()
    asyncio.run(driver.finish(outcome))
    one.join()
    assert order == ["moved on", "resumed"]


def test_waiting_for_nobody_is_told(driver: Driver) -> None:
    """A task that waits for others where there are none gets an error, not eternity."""

    def waiting() -> Task[None]:
        yield WAIT

    with pytest.raises(StuckError):
        driver.run(waiting())
    outcome = driver.start(waiting())
    assert isinstance(outcome, Pending)
    with pytest.raises(StuckError):
        asyncio.run(driver.finish(outcome))


def test_a_stopped_task_is_closed_under_the_lock(driver: Driver) -> None:
    """A task that is told to stop is given up after its step, and its cleanup has the lock."""
    progress = Progress()
    locked: list[bool] = []

    def task() -> Task[None]:
        try:
            while True:
                progress.stop = True
                yield PAUSE
        finally:
            locked.append(driver.lock.room.locked())

    assert driver.run(task(), progress) is None
    assert locked == [True]


def _two_writes(device: Gate) -> Task[None]:
    """Begins two writes, waits for the first, and notes when it is cleaned up."""
    try:
        first, second = _write(device, 0), _write(device, 1)
        yield Submit(first)
        yield Submit(second)
        yield first
        yield second
    finally:
        device.events.append("closed")
        device.open.set()


def test_no_task_is_closed_while_one_of_its_writes_is_under_way(driver: Driver) -> None:
    """Stopped between two writes that it has begun, a task is closed when both have ended."""
    device, progress = Gate(), Progress()
    device.patience_s = 0.2
    device.meanwhile = lambda: setattr(progress, "stop", True)
    assert driver.run(_two_writes(device), progress) is None
    assert device.events == ["wrote 0", "wrote 1", "closed"]


def test_no_task_is_cancelled_while_one_of_its_writes_is_under_way(driver: Driver) -> None:
    """Cancelled in the event loop, a task is closed when all that it has begun has ended."""
    device = Gate()
    device.patience_s = 0.2

    async def cancelled() -> None:
        outcome = driver.start(_two_writes(device))
        assert isinstance(outcome, Pending)
        finishing = asyncio.create_task(driver.finish(outcome))
        await asyncio.to_thread(device.reached.wait, PATIENCE_S)
        finishing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await finishing

    asyncio.run(cancelled())
    assert sorted(device.events[:2]) == ["wrote 0", "wrote 1"]
    assert device.events[2:] == ["closed"]


def test_a_mistake_in_a_worker_is_the_tasks(driver: Driver) -> None:
    """What the device's contract forbids is raised inside the task that asked for it."""
    device = UnkindDevice(1)

    def task() -> Task[str]:
        try:
            yield _write(device, 9)
        except AssertionError:
            return "told"
        return "not told"

    assert driver.run(task()) == "told"


# Turns of long work


async def _in_line(tasks: int, turns: int) -> list[list[int]]:
    """Who had a turn, by round of the loop, of tasks that stand in line so many times."""
    loop = asyncio.get_running_loop()
    line = Turns()
    rounds: list[list[int]] = [[]]

    def next_round() -> None:
        rounds.append([])
        if not all(one.done() for one in running):
            loop.call_soon(next_round)

    async def work(number: int) -> None:
        for _ in range(turns):
            await line.mine()
            rounds[-1].append(number)

    running = [asyncio.create_task(work(number)) for number in range(tasks)]
    loop.call_soon(next_round)
    await asyncio.gather(*running)
    return rounds


@pytest.mark.parametrize("tasks", [1, 2, 7])
def test_long_work_has_one_turn_in_each_round_of_the_loop(tasks: int) -> None:
    """However many stand in line, one of them goes on, and each when it is its turn."""
    rounds = asyncio.run(_in_line(tasks, 20))
    assert max(map(len, rounds)) == 1
    assert [who for each in rounds for who in each] == [*range(tasks)] * 20


def test_a_turn_that_nobody_takes_is_the_next_ones() -> None:
    """Who has left the line, at its head or in its middle, holds nobody up."""

    async def main() -> list[int]:
        line = Turns()
        went: list[int] = []

        async def work(number: int) -> None:
            await line.mine()
            went.append(number)

        running = [asyncio.create_task(work(number)) for number in range(5)]
        await asyncio.sleep(0)  # all stand in line
        for number in (0, 2, 4):
            running[number].cancel()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*running, return_exceptions=True)
            await line.mine()
        return went

    assert asyncio.run(main()) == [1, 3]


def test_short_computations_need_no_worker(driver: Driver) -> None:
    """Those of a task that has waited are done in the loop's thread as well; slow ones are not."""
    threads: list[int] = []

    def task() -> Task[None]:
        for slow in (False, True, False):
            yield PAUSE
            yield Compute(lambda: threads.append(threading.get_ident()), slow)

    async def main() -> None:
        begun = driver.start(task())
        assert isinstance(begun, Pending)
        await driver.finish(begun)

    asyncio.run(main())
    here = threading.get_ident()
    assert [one == here for one in threads] == [True, False, True]


@pytest.mark.parametrize(("lately", "most"), [(True, 24), (False, 6)])
def test_who_works_alone_stands_in_line_less_often(
    driver: Driver,
    monkeypatch: pytest.MonkeyPatch,
    lately: bool,  # noqa: FBT001 - a parameter of the test
    most: int,
) -> None:
    """While requests come there is a turn for each pause; else several turns are taken in a row."""
    now = [1000.0]
    monkeypatch.setattr("vswapd.driver.time.monotonic", lambda: now[0])
    asked: list[object] = []
    ask = driver.turns.ask

    def counting(go: Callable[[], None]) -> None:
        asked.append(go)
        ask(go)

    monkeypatch.setattr(driver.turns, "ask", counting)

    def task() -> Task[None]:
        for _ in range(24):
            yield PAUSE

    async def main() -> None:
        begun = driver.start(task())
        now[0] += 0.001 if lately else 1.0
        assert isinstance(begun, Pending)
        await driver.finish(begun)

    asyncio.run(main())
    assert len(asked) == most


# Threads that cannot be had


@pytest.fixture
def no_threads() -> Iterator[None]:
    """No thread can be started meanwhile: no stack is of such a size."""
    before = threading.stack_size(1 << 50)
    yield
    threading.stack_size(before)


def _work(done: list[str]) -> Task[str]:
    yield Compute(lambda: done.append(threading.current_thread().name), slow=True)
    request = IoRequest(IoKind.READ, UnkindDevice(1), 0, 0, PAGE_BYTES)
    yield IoBatch([request])
    done.append("failed" if request.result is None else "read")
    return "ended"


@pytest.mark.usefixtures("no_threads")
def test_who_has_no_thread_does_it_himself(
    driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    """A task ends that no thread can be started for, others after it, and the journal says why."""
    here = threading.current_thread().name
    for _ in range(2):
        done: list[str] = []
        assert driver.run(_work(done)) == "ended"
        assert done == [here, "read"]

    async def ask() -> str:
        outcome = driver.start(_work(done))
        assert isinstance(outcome, Pending)
        return await driver.finish(outcome)

    assert asyncio.run(ask()) == "ended"
    assert caplog.text.count("no thread can be started") == 2  # for computations, and for devices
    threading.stack_size(0)
    done.clear()
    assert driver.run(_work(done)) == "ended"
    assert done[0].startswith("vswapd-compute-")
