"""One shard: an engine, the thread that shrinks it, and the connections that it serves.

A daemon is one shard in one process, or several of them behind a supervisor.

Invariants:
- What was started is stopped in the reverse order: connections first, the engine's workers last.
- It is here that the engine gets its clocks: one for ages, and the machine's for days.

This module must not know where connections come from, the service manager, or concrete devices.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vswap.protocol import HEADER_BYTES, MAX_TEXT_BYTES, PAGE_BYTES, SLOT_BYTES
from vswapd import __version__, session
from vswapd.beside import beside
from vswapd.compressor import Compressor
from vswapd.config import Config
from vswapd.control import KeptDevice
from vswapd.driver import Driver, Pending, T, Task
from vswapd.free_memory import FreeMemory
from vswapd.groups import Holder, Space
from vswapd.host import Host
from vswapd.idleness import Busy
from vswapd.ledger import Ledger
from vswapd.lost_device import LostDevice
from vswapd.memory import ShardMemory
from vswapd.peer import Peer, started
from vswapd.seats import Judge, Seats
from vswapd.server import Server
from vswapd.session import Context, Limits, Session
from vswapd.settings import Settings
from vswapd.shrinker_thread import ShrinkerThread
from vswapd.steering import OpenDevice, Opened, Steering, Surroundings
from vswapd.trouble import Trouble
from vswapd.vswap import Engine
from vswapd.window import Windows
from vswapd_blockdev.device import BlockDevice
from vswapd_blockdev.extents import ExtentMap

_LOG: Final = logging.getLogger(__name__)
_PATIENCE_S: Final = 30.0
"""Seconds that requests under way are given to end when the daemon stops."""
_LOOK_S: Final = 1.0
"""Between two looks at whether processes still live that may come back for their spaces."""
_SWITCH_S: Final = 0.0001
"""Seconds after which a thread must let another run: the shrinker's Python is not to hold the event
loop up for the default of 5 ms. A request may have to wait for it three times: when it is noticed,
when it has been read, when it was answered."""


def clock() -> float:
    """Seconds since the machine started, asleep or not: the same for every process of it.

    Ages are kept by it. What is kept never outlives the machine, and a clock that somebody sets
    would make pages idle at once, or for years not.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME)


Reopen = Callable[[KeptDevice], tuple[Opened, ExtentMap | None] | None]
"""Opens a device again, and says which of its extents are this shard's (None: all). Returns None
where it cannot be had."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A shard's memory, and how to go on with what is in it."""

    memory: ShardMemory
    reopen: Reopen | None = None
    """Opens devices that were in use; None: nothing is kept in the memory yet."""
    beyond_daemon: bool = False
    """Whether it is there for the next daemon, too."""


def _lives(holder: Holder) -> bool:
    """Whether a client's process has not ended, as far as that can be told."""
    try:
        return holder.started > 0 and started(holder.pid) == holder.started
    except OSError:
        return True  # not to be told at the moment: nobody's pages are given up for that


def _engine(
    settings: Settings, ledger: Ledger, kept: Kept | None
) -> tuple[Engine, dict[str, Opened]]:
    """An engine, and the devices that it has in use already, by path."""
    if kept is None:
        return Engine.create(settings, clock, wall=time.time, ledger=ledger), {}
    # A name of its own: what follows must see that it is not None.
    reopen = kept.reopen
    if reopen is None:
        memory = kept.memory
        return Engine.create(settings, clock, wall=time.time, ledger=ledger, memory=memory), {}
    devices: dict[str, Opened] = {}

    def open_again(device: KeptDevice) -> tuple[BlockDevice, ExtentMap | None] | None:
        found = reopen(device)
        if found is None:
            devices[device.path] = Opened(LostDevice(device.path, device.extents), discards=False)
            return None
        opened, extents = found
        devices[device.path] = opened
        return opened.device, extents

    engine = Engine.recover(
        settings, clock, wall=time.time, ledger=ledger, memory=kept.memory, reopen=open_again
    )
    return engine, devices


class Shard:
    """See the module. Made inside a running event loop."""

    def __init__(
        self,
        *,
        config: Config,
        host: Host,
        source: Path | None,
        overrides: tuple[str, ...],
        surroundings: Surroundings,
        open_device: OpenDevice,
        ledger: Ledger | None = None,
        operators: session.Steering | None = None,
        judge: Judge | None = None,
        kept: Kept | None = None,
    ) -> None:
        """Make a shard, and start nothing yet.

        Args:
            config: what it starts with.
            host: what is known of the machine.
            source: the file that a reload reads.
            overrides: what holds on top of it.
            surroundings: the rest of the service, for its steering.
            open_device: how a device is opened.
            ledger: what it shares limits through; None: it is the only shard.
            operators: who answers STATUS and CONTROL; None: the shard's own steering.
            judge: who says which client may have which space; None: it is the only shard.
            kept: memory that outlives this process; None: what is stored dies with it.

        Raises:
            RecoveryError, ArgumentError: what another process has left cannot be gone on with.
        """
        self.ledger: Final = ledger or Ledger()
        settings = config.settings(host).of_one(self.ledger.shards)
        self._resumable = kept is not None
        self._resume_timeout = float(config.server.resume_timeout)
        self._beyond_daemon = kept is not None and kept.beyond_daemon
        engine, devices = _engine(settings, self.ledger, kept)
        self.engine: Final = engine
        self.driver: Final = Driver()
        self.shrinker: Final = ShrinkerThread(self.engine.shrinker, self.driver, clock)
        self.engine.on_pressure = self.shrinker.poke
        self.engine.report_to(Trouble().of_housekeeping)
        tell = self.engine.core.housekeeping.failed
        self.engine.shrinker.recompression.busy = Busy(clock, tell=tell)
        self.engine.watch_memory(FreeMemory(tell=tell))
        self.engine.shrinker.recompression.step_back = self.driver.step_back
        self.steering: Final = Steering(
            version=__version__,
            engine=self.engine,
            surroundings=surroundings,
            host=host,
            config=config,
            source=source,
            overrides=overrides,
            open_device=open_device,
        )
        self.steering.devices.update(devices)
        self.seats: Final = Seats(judge)
        self.server: Final = self._make_server(config, host, operators or self.steering)

    def _make_server(
        self,
        config: Config,
        host: Host,
        operators: session.Steering,
    ) -> Server:
        keys, budget = config.server, config.budget(host)
        limits = Limits(
            max_batch=budget.max_batch,
            # Text has a limit of its own, which small batches must not cut.
            max_frame=HEADER_BYTES
            + max(budget.max_batch * (PAGE_BYTES + SLOT_BYTES), MAX_TEXT_BYTES),
            max_pipeline=keys.max_pipeline,
            max_named_spaces=keys.max_named_spaces,
            max_window=int(keys.window),
        )
        context = Context(
            engine=self.engine,
            compressor=Compressor(self.engine),
            steering=operators,
            limits=limits,
            resumable=self._resumable,
            kept=self._beyond_daemon,
            seats=self.seats,
            windows=Windows(budget.windows // self.ledger.shards),
        )

        def new_session(peer: Peer) -> Session:
            return Session(context, peer)

        return Server(
            driver=self.driver,
            new_session=new_session,
            max_connections=keys.max_connections,
            max_user_connections=keys.max_user_connections,
            max_frame=limits.max_frame,
            buffer_memory=budget.buffers // self.ledger.shards,
            most_unsent=budget.replies,
            request_timeout=float(keys.request_timeout),
        )

    async def start(self, made: contextlib.AsyncExitStack) -> None:
        """Start everything but the service of connections; leaves in `made` how it is ended."""
        sys.setswitchinterval(_SWITCH_S)
        # Last, when no worker is left: what is read of a closed descriptor would pass for lost, and
        # what is written to it could go into whatever has its number by then.
        made.callback(self._close_devices)
        made.callback(self.driver.close)
        self.shrinker.start()
        made.push_async_callback(asyncio.to_thread, self.shrinker.stop)
        if self.engine.orphans():
            beside(made, self._free_orphans())

    def serve(self, made: contextlib.AsyncExitStack) -> None:
        """Connections may come from now on."""
        # What has been made so far stays: no collection need look at it again.
        gc.collect()
        gc.freeze()
        made.push_async_callback(self.server.stop, _PATIENCE_S)

    async def _free_orphans(self) -> None:
        """Free the spaces that nobody has come back for in time; ends when there are none.

        A client that makes no calls does not know that the daemon has died: as long as its process
        lives, it may come back.
        """
        while True:
            with self.driver.lock:
                # One that is named is kept for whoever asks for it.
                orphans = [space for space in self.engine.orphans() if not space.name]
            if not orphans:
                return
            left = orphans[0].since + self._resume_timeout - clock()
            late = [space for space in orphans if space.since + self._resume_timeout <= clock()]
            gone = next((space for space in late if not _lives(space.holder)), None)
            if gone is not None:
                _LOG.info("space %d of %s is freed: nobody came back", gone.id, gone.client)
                await self.drive(self._close_orphan(gone))
            else:
                await asyncio.sleep(left if left > 0 else _LOOK_S)

    def _close_orphan(self, space: Space) -> Task[None]:
        if not space.attached:  # nobody has come at the last moment
            yield from self.engine.close_space(space)

    def _close_devices(self) -> None:
        for opened in self.steering.devices.values():
            opened.device.close()

    async def drive(self, task: Task[T]) -> T:
        """Drive a task of the engine's or the steering's to its end."""
        outcome = self.driver.start(task)
        return await self.driver.finish(outcome) if isinstance(outcome, Pending) else outcome
