"""The shrinker's thread: it works when it is poked or due, and sleeps when it can do nothing.

Invariants (numbers as in "What must never be"): 20.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from support.engine import MIB, Rig, UnkindDevice, ids, make_engine, pages_of
from vswapd.driver import Driver
from vswapd.shrinker import Shrinker
from vswapd.shrinker_thread import ShrinkerThread
from vswapd.swap_table import Tag
from vswapd_backends.base import U64, Operation

PATIENCE_S = 20.0


class Watched:
    """A shrinker that tells how often it is asked."""

    def __init__(self, shrinker: Shrinker) -> None:
        self._shrinker = shrinker
        self.counts = 0
        self.scans = 0
        self.idle = threading.Semaphore(0)
        """Released whenever a count was 0: the thread is about to sleep."""
        self.mistake: Exception | None = None
        self.before_sleep: Callable[[], None] | None = None
        """Called once, by the thread, when it has found nothing to do and is about to sleep."""

    def count(self) -> int:
        self.counts += 1
        if self.mistake is not None:
            self.idle.release()
            raise self.mistake
        count = self._shrinker.count()
        if not count:
            self.idle.release()
        return count

    def next_wakeup(self) -> float | None:
        call, self.before_sleep = self.before_sleep, None
        if call is not None:
            call()
        return self._shrinker.next_wakeup()

    def scan(self, nbytes: int) -> Operation[int]:
        self.scans += 1
        return self._shrinker.scan(nbytes)


class Running:
    """A shrinker's thread at work on an engine."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.driver = Driver()
        self.shrinker = Watched(rig.engine.shrinker)
        self.thread = ShrinkerThread(
            self.shrinker,  # type: ignore[arg-type] # the three methods that it needs
            self.driver,
            rig.clock,
        )

    def until_idle(self) -> None:
        """Until it has counted 0 once more."""
        assert self.shrinker.idle.acquire(timeout=PATIENCE_S)

    def poke(self) -> None:
        """Poke, and wait until it has nothing to do any more."""
        self.thread.poke()
        self.until_idle()

    @property
    def cpu_s(self) -> float:
        """What the thread has had of the processor so far."""
        ident = self.thread._thread.ident
        assert ident is not None
        return time.clock_gettime(time.pthread_getcpuclockid(ident))


@contextmanager
def _running(rig: Rig) -> Iterator[Running]:
    running = Running(rig)
    running.thread.start()
    try:
        running.until_idle()
        yield running
    finally:
        running.thread.stop()
        assert running.driver.pending == 0
        running.driver.close()


def _fill(running: Running, first: int = 0) -> U64:
    """Noise pages until the pool is above its high watermark."""
    rig = running.rig
    space, slots = rig.space(), list[int]()
    zswap, most = rig.engine.core.zswap, 0.95 * rig.engine.core.settings.pool_max
    with running.driver.lock:
        while zswap.in_use_bytes <= most:
            slots += rig.put(space, pages_of("noise", 4, first + len(slots))).tolist()
    return ids(*slots)


def _sleeps(running: Running) -> None:
    """It uses no processor and asks nothing, however long it is watched."""
    counts, cpu_s = running.shrinker.counts, running.cpu_s
    assert not running.shrinker.idle.acquire(timeout=0.3)
    assert running.shrinker.counts == counts
    assert running.cpu_s - cpu_s < 0.02
    assert running.thread.steps() is None


def test_a_poke_is_work_done() -> None:
    """Past the watermark, one poke takes the pool down to the low one, through the driver."""
    rig = make_engine(4 * MIB, devices=[32])
    with _running(rig) as running:
        slots = _fill(running)
        running.poke()
        assert running.shrinker.scans
        with running.driver.lock:
            assert rig.engine.core.zswap.in_use_bytes <= 0.85 * 4 * MIB
            assert set(rig.tags(slots)) == {Tag.PHYS, Tag.ZSWAP}
            rig.check()


def test_the_engine_pokes_it() -> None:
    """Wired as the service does it, a store that passes the watermark is news enough."""
    rig = make_engine(4 * MIB, devices=[32])
    with _running(rig) as running:
        rig.engine.on_pressure = running.thread.poke
        _fill(running)
        running.until_idle()
        with running.driver.lock:
            assert rig.devices[0].writes > 0


@pytest.mark.parametrize("obstacle", ["nothing", "no device", "full", "budget", "off", "errors"])
def test_it_does_not_spin_when_it_can_do_nothing(obstacle: str) -> None:
    """20: whatever keeps it from working, it sleeps: no wake-ups and no processor time."""
    rig = make_engine(2 * MIB, devices=[] if obstacle == "no device" else [40])
    match obstacle:
        case "full":
            rig.swapoff(rig.devices[0])
            rig.swapon(1)
        case "budget":
            rig.set(write_budget=300 << 10)
        case "off":
            rig.set(shrinker_enabled=False)
        case "errors":
            rig.devices[0].fails = lambda kind, _: kind == "write"
    with _running(rig) as running:
        for turn in range(0 if obstacle == "nothing" else 3):
            _fill(running, 1000 * turn)
            running.poke()
        _sleeps(running)


@pytest.mark.parametrize("obstacle", ["time is spent", "busy", "no room", "all tried", "young"])
def test_it_does_not_spin_when_it_cannot_recompress(obstacle: str) -> None:
    """Old pages that cannot be compressed again now cost no processor time while they wait."""
    rig = make_engine(2 * MIB, dense="zstd:3", dense_age=60.0)
    work = rig.engine.shrinker.recompression
    rig.put(rig.space(), pages_of("text", 900))
    match obstacle:
        case "busy":
            work.busy = lambda: True
        case "time is spent":
            ticks = iter(range(1000))
            work.cpu_clock = lambda: 1000.0 * next(ticks)
        case "no room":
            rig.set(pool_max=rig.pool_bytes + 1)
    if obstacle != "young":
        rig.clock.advance(61)
    with _running(rig) as running:
        running.poke()
        _sleeps(running)
        with running.driver.lock:
            moved = rig.engine.core.stats.recompress_pages
            assert (moved > 0) == (obstacle in {"time is spent", "all tried"})


def test_each_poke_is_one_look() -> None:
    """When there is nothing to do, n pokes are at most n counts, and no scan."""
    rig = make_engine(2 * MIB)
    with _running(rig) as running:
        _fill(running)
        running.poke()
        before = running.shrinker.counts
        for _ in range(50):
            running.poke()
        assert running.shrinker.counts == before + 50
        assert running.shrinker.scans == 0


def test_a_poke_between_the_last_look_and_the_sleep_is_not_lost() -> None:
    """What is said when it has just found nothing to do is looked at before it sleeps."""
    with _running(make_engine()) as running:
        for _ in range(30):
            running.shrinker.before_sleep = running.thread.poke
            running.poke()
            running.until_idle()
        assert running.shrinker.counts == 61


def test_it_wakes_when_something_becomes_due() -> None:
    """With a wake-up of the shrinker's it sleeps until then, and needs no poke."""
    rig = make_engine(16 * MIB, arena_bytes=24 * MIB)
    with _running(rig) as running:
        space = rig.space()
        with running.driver.lock:
            rig.free(space, rig.put(space, pages_of("noise", 60)))
            assert rig.pool_bytes > 0
            rig.clock.advance(-0.9)
            rig.engine.shrinker.count()
            rig.clock.advance(0.85)  # due in 50 ms of the real clock
        running.thread.poke()
        running.until_idle()
        rig.clock.advance(0.2)
        running.until_idle()
        with running.driver.lock:
            assert rig.pool_bytes == 0
        assert running.shrinker.scans == 1


def test_a_mistake_is_logged_counted_and_survived(caplog: pytest.LogCaptureFixture) -> None:
    """An exception of the shrinker's ends one round, not the thread; the next poke tries again."""
    rig = make_engine(4 * MIB, devices=[32])
    with _running(rig) as running:
        running.shrinker.mistake = ZeroDivisionError("ours")
        with caplog.at_level(logging.ERROR):
            for _ in range(3):
                running.poke()
            running.shrinker.mistake = None
            running.poke()
        assert running.thread.errors == 3
        assert "it pauses 1 s" in caplog.text
        assert "it pauses 4 s" in caplog.text
        assert "ZeroDivisionError: ours" in caplog.text
        _fill(running)
        running.poke()
        assert rig.devices[0].writes > 0


class Slow(UnkindDevice):
    """A device whose writes wait until they are let through."""

    def __init__(self, extents: int) -> None:
        super().__init__(extents, "slow")
        self.reached = threading.Event()
        self.open = threading.Event()

    def write(self, extent: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.reached.set()
        assert self.open.wait(PATIENCE_S)
        super().write(extent, offset, data)


def test_others_have_the_lock_while_it_writes() -> None:
    """A device that takes its time does not keep the engine from serving, nor looks like a hang."""
    rig = make_engine(4 * MIB)
    device = Slow(64)
    rig.engine.swapon(device, 0)
    with _running(rig) as running:
        slots = _fill(running)
        running.thread.poke()
        assert device.reached.wait(PATIENCE_S)
        space = rig.space()
        for turn in range(20):
            assert running.driver.lock.acquire(timeout=PATIENCE_S)
            rig.free(space, rig.put(space, pages_of("text", 3, turn)))
            running.driver.lock.release()
        assert running.thread.steps() is None, "waiting for a device is no missing progress"
        device.open.set()
        running.until_idle()
        assert Tag.PHYS in rig.tags(slots)


def test_stopping_in_the_middle_leaves_a_sound_engine() -> None:
    """A scan that is given up is cleaned up: pins, extents and sums are as they should be."""
    rig = make_engine(4 * MIB)
    device = Slow(64)
    rig.engine.swapon(device, 0)
    running = Running(rig)
    slots = _fill(running)
    running.thread.start()
    assert device.reached.wait(PATIENCE_S)
    stopping = threading.Thread(target=running.thread.stop)
    stopping.start()
    assert running.thread._news.wait(PATIENCE_S), "it is told to stop"
    device.open.set()
    stopping.join()
    running.driver.close()
    rig.check()
    assert not any(entry.pins.any() for entry in rig.engine.core.devices)
    space = next(iter(rig.engine.core.spaces.values()))
    assert rig.load(space, slots) == pages_of("noise", len(slots))


def test_a_thread_that_is_gone_is_told() -> None:
    """Asked for its progress after its end it raises: the watchdog is not to be fed."""
    running = Running(make_engine())
    running.thread.start()
    running.until_idle()
    running.thread.stop()
    running.driver.close()
    with pytest.raises(RuntimeError, match="ended"):
        running.thread.steps()


def test_a_thread_that_never_started_can_be_stopped() -> None:
    """Stopping before the start does nothing."""
    running = Running(make_engine())
    running.thread.stop()
    running.driver.close()
