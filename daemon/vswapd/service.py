"""The service: everything wired together, from the configuration to the last close.

This is the one module that names concrete devices, and that knows all the others.

Invariants:
- READY is told once devices are in use and the socket is served.
- The watchdog is fed only after a beat has gone through the event loop and the engine's lock, and
  the shrinker's thread has taken a turn since the last beat or is asleep.
- Stopping finishes what is under way, and removes what the start has made.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import ClassVar, Final

from vswap.protocol import HEADER_BYTES, PAGE_BYTES, SLOT_BYTES
from vswapd import __version__, journal, status
from vswapd.config import Config, load
from vswapd.config_schema import Device
from vswapd.driver import Driver
from vswapd.errors import EngineError
from vswapd.host import Host
from vswapd.listener import Listener
from vswapd.notify import ServiceManager
from vswapd.peer import peer_of
from vswapd.server import Server
from vswapd.session import Limits, Peer, Session
from vswapd.shrinker_thread import ShrinkerThread
from vswapd.steering import Reloaded, Steering
from vswapd.vswap import Engine
from vswapd_blockdev.device import BlockDevice
from vswapd_blockdev.sealed import SealedDevice
from vswapd_blockdev.swapfile import SwapFile

_LOG: Final = logging.getLogger(__name__)
_PATIENCE: Final = 30.0
"""Seconds that requests under way are given to end when the daemon stops."""
_SWITCH_INTERVAL: Final = 0.0005
"""Seconds after which a thread must let another run: the shrinker's Python is not to hold the event
loop up for the default of 5 ms."""


class ServiceError(Exception):
    """The daemon cannot start as it was told to; the text says what to do. EX_OSERR."""

    exit_code: ClassVar[int] = 71


class Service:
    """One daemon."""

    def __init__(self, config: Config, source: Path | None, overrides: tuple[str, ...]) -> None:
        self.version: Final = __version__
        self._source = source
        self._overrides = overrides
        self._host = Host.here()
        self._manager = ServiceManager()
        self._started = time.monotonic()
        self._boot_id = secrets.token_bytes(16)
        self._engine = Engine.create(config.settings(self._host), time.time)
        self._driver = Driver()
        self._shrinker = ShrinkerThread(self._engine.shrinker, self._driver, time.time)
        self._engine.on_pressure = self._shrinker.poke
        self._steering = Steering(
            engine=self._engine,
            driver=self._driver,
            service=self,
            host=self._host,
            config=config,
            open_device=self._open_device,
            clock=time.time,
        )
        self._server = self._make_server(config)
        self._stop = asyncio.Event()
        self._cleanup = contextlib.ExitStack()
        self._tasks: set[asyncio.Task[None]] = set()

    def _make_server(self, config: Config) -> Server:
        batch = config.server.max_batch
        limits = Limits(
            max_batch=batch,
            max_frame=max(HEADER_BYTES + batch * (PAGE_BYTES + SLOT_BYTES), 1 << 16),
            max_pipeline=config.server.max_pipeline,
        )

        def new_session(peer: Peer) -> Session:
            return Session(self._engine, self._driver, self._steering, peer, limits)

        return Server(
            new_session=new_session,
            peer_of=peer_of,
            max_connections=config.server.max_connections,
            max_frame=limits.max_frame,
            buffer_memory=int(config.server.buffer_memory),
            request_timeout=float(config.server.request_timeout),
        )

    def _open_device(self, entry: Device) -> BlockDevice:
        device: BlockDevice = SwapFile.open(
            entry.path,
            size=None if entry.size is None else int(entry.size),
            boot_id=self._boot_id,
            encrypted=entry.encrypt,
        )
        return SealedDevice(device) if entry.encrypt else device

    # Running

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            ListenError, ServiceError, OutOfServiceError, ConfigError: it could not start.
        """
        with self._cleanup:
            await self._start()
            await self._stop.wait()
            await self._end()

    async def _start(self) -> None:
        sys.setswitchinterval(_SWITCH_INTERVAL)
        if self._steering.config.pool.lock_memory:
            self._lock_memory()
        # The socket first: a second daemon must not get as far as the devices of the first.
        listeners = self._listeners()
        for entry in self._steering.config.devices:
            await self._steering.swapon(entry)
        self._start_metrics()
        self._shrinker.start()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        for listener in listeners:
            await self._server.listen(listener)
        # What has been made so far stays: no collection need look at it again.
        gc.collect()
        gc.freeze()
        if self._manager.watchdog_s is not None:
            self._spawn(self._feed_watchdog(self._manager.watchdog_s))
        self._manager.tell(READY="1", STATUS=self._headline())
        _LOG.info("vswapd %s serves %s", self.version, self._where)

    def _lock_memory(self) -> None:
        try:
            self._engine.lock_memory()
        except OSError as error:
            raise ServiceError(
                f"pool.lock_memory: {error.strerror or error}: raise RLIMIT_MEMLOCK "
                "(LimitMEMLOCK=infinity in a unit), or set pool.lock_memory=false"
            ) from None

    def _listeners(self) -> list[socket.socket]:
        passed = self._manager.take_sockets()
        if passed:
            self._where = "the socket that it was handed"
            return passed
        server = self._steering.config.server
        path = self._steering.config.socket_path(self._host)
        listener = Listener.open(path, mode=int(server.socket_mode), group=server.socket_group)
        self._cleanup.callback(listener.close)
        self._where = path
        return [listener.socket]

    def _start_metrics(self) -> None:
        metrics = self._steering.config.metrics
        if metrics.listen:
            from vswapd.metrics import start

            self._cleanup.callback(start(metrics.listen, self._steering.status).close)
        if metrics.textfile:
            from vswapd.metrics import TextfileWriter

            writer = TextfileWriter(Path(metrics.textfile), self._steering.status)
            self._cleanup.callback(writer.close)

    async def _end(self) -> None:
        _LOG.info("stopping: requests under way are finished first")
        self._manager.tell(STOPPING="1", STATUS="Stopping")
        await self._server.stop(_PATIENCE)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._shrinker.stop)
        self._driver.close()
        for device in self._steering.devices.values():
            device.close()
        _LOG.info("stopped")

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # The service manager

    async def _feed_watchdog(self, period: float) -> None:
        turns = -1
        while True:
            # Through the loop, and through the lock that every request takes.
            with self._driver.lock:
                headline = self._headline()
            if self._shrinker.asleep or self._shrinker.turns != turns:
                turns = self._shrinker.turns
                self._manager.tell(WATCHDOG="1", STATUS=headline)
            await asyncio.sleep(period / 4)

    def _headline(self) -> str:
        snapshot = self._engine.snapshot()
        return (
            f"{snapshot.slots.allocated} pages of {len(self._server.connections)} clients, "
            f"{snapshot.saved_bytes >> 20} MiB saved"
        )

    # What steering asks

    def facts(self) -> status.Facts:
        """See steering.Service."""
        return status.Facts(
            version=self.version,
            state="stopping" if self._server.stopping else "running",
            pid=os.getpid(),
            uptime_s=time.monotonic() - self._started,
            clients=len(self._server.connections),
            shrinker_errors=self._shrinker.errors,
            settings=self._steering.config.flat(),
        )

    def configure(self, config: Config) -> None:
        """See steering.Service."""
        settings = config.settings(self._host)
        with self._driver.lock:
            self._engine.apply(settings)
        journal.set_up(config.log.level)
        self._steering.config = config
        self._shrinker.poke()

    async def reload(self) -> Reloaded:
        """See steering.Service."""
        old = self._steering.config
        new = await asyncio.to_thread(load, self._source, self._overrides)
        config = old.reloaded(new)
        self.configure(config)
        before, after = old.flat(), config.flat()
        changed = tuple(
            sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
        )
        return Reloaded(changed=changed, ignored=old.fixed_changes(new))

    def _hang_up(self) -> None:
        self._spawn(self._reload_and_tell())

    async def _reload_and_tell(self) -> None:
        self._manager.reloading()
        try:
            done = await self.reload()
        except Exception as error:
            expected = isinstance(error, EngineError) or hasattr(error, "exit_code")
            _LOG.error("reload: %s; nothing was changed", error, exc_info=not expected)
        else:
            _LOG.info("reload: changed %s", ", ".join(done.changed) or "nothing")
            if done.ignored:
                _LOG.warning("reload: needs a restart to take effect: %s", ", ".join(done.ignored))
        self._manager.tell(READY="1", STATUS=self._headline())


def serve(config: Config, source: Path | None, overrides: tuple[str, ...]) -> None:
    """Run a daemon until it is told to stop."""

    async def main() -> None:
        await Service(config, source, overrides).run()

    asyncio.run(main())
