"""The service: everything wired together, from the configuration to the last close.

This is the one module that names concrete devices, and that knows all the others.

Invariants:
- READY is told once devices are in use and the socket is served.
- The socket comes first: a second daemon gets no further, and touches no device of the first.
- Stopping finishes what is under way, and removes what the start has made, also when the start
  fails half-way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import secrets
import signal
import socket
import time
from pathlib import Path
from typing import Any, ClassVar, Final

from vswapd import __version__, journal, status
from vswapd.config import Config, ConfigError
from vswapd.config_schema import Device
from vswapd.errors import EngineError, OutOfServiceError
from vswapd.host import Host
from vswapd.listener import Listener
from vswapd.notify import ServiceManager
from vswapd.shard import Shard, beside
from vswapd.sizes import human_size
from vswapd.steering import Opened
from vswapd.watchdog import Watchdog
from vswapd_blockdev.sealed import SealedDevice
from vswapd_blockdev.swapfile import SwapFile

_LOG: Final = logging.getLogger(__name__)
_STATUS_S: Final = 10.0
"""How often the line that `systemctl status` shows is made anew."""
_OTHER_DESCRIPTORS: Final = 128
"""What the daemon needs besides its connections, generously."""


class ServiceError(Exception):
    """The daemon cannot start as it was told to; the text says what to do. EX_OSERR."""

    exit_code: ClassVar[int] = 71


class Service:
    """One daemon, made inside a running event loop."""

    def __init__(self, config: Config, source: Path | None, overrides: tuple[str, ...]) -> None:
        self._host = Host.here()
        self._manager = ServiceManager()
        self._started = time.monotonic()
        self._boot_id = secrets.token_bytes(16)
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._metrics: Any = None
        """The exporter, once metrics are switched on for the first time."""
        self._shard = Shard(
            config=config,
            host=self._host,
            source=source,
            overrides=overrides,
            surroundings=self,
            open_device=self._open_device,
        )

    def _open_device(self, entry: Device) -> Opened:
        device = SwapFile.open(
            entry.path,
            size=None if entry.size is None else int(entry.size),
            boot_id=self._boot_id,
            encrypted=entry.encrypt,
        )
        return Opened(SealedDevice(device) if entry.encrypt else device, device.discards)

    # Running

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            ListenError, ServiceError, OutOfServiceError, ConfigError: it could not start.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stopping.set)
        async with contextlib.AsyncExitStack() as made:
            where = await self._start(made)
            if self._stopping.is_set():
                return
            self._loop.add_signal_handler(signal.SIGHUP, self._hang_up)
            self._manager.tell(READY="1", STATUS=self._headline())
            _LOG.info("vswapd %s serves %s", __version__, where)
            await self._stopping.wait()
            self._loop.remove_signal_handler(signal.SIGHUP)
            _LOG.info("stopping: requests under way are finished first")
            self._manager.tell(STOPPING="1", STATUS="Stopping")
        _LOG.info("stopped")

    async def _start(self, made: contextlib.AsyncExitStack) -> str:
        """Make everything, and leave in `made` how it is unmade; returns where it listens."""
        shard = self._shard
        config = shard.steering.config
        _raise_descriptors(config.server.max_connections)
        where, listeners = self._listeners(config, made)
        if config.pool.lock_memory:
            self._lock_memory()
        await shard.start(made)
        for entry in config.devices:
            opened = await shard.drive(shard.steering.swapon(entry))
            size = human_size(opened["size_bytes"])
            _LOG.info("%s: %s, priority %d", opened["path"], size, opened["priority"])
        made.push_async_callback(asyncio.to_thread, self._close_metrics)
        await asyncio.to_thread(self.configure, config)
        shard.serve(made)
        for listener in listeners:
            shard.server.listen(listener)
        beside(made, self._tell_status())
        if self._manager.watchdog_s is not None:
            watchdog = Watchdog(
                shard.driver, shard.shrinker, lambda: self._manager.tell(WATCHDOG="1")
            )
            beside(made, watchdog.run(self._manager.watchdog_s))
        return where

    def _lock_memory(self) -> None:
        try:
            self._shard.engine.lock_memory()
        except OSError as error:
            soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
            raise ServiceError(
                f"pool.lock_memory: {error.strerror or error}; RLIMIT_MEMLOCK is "
                f"{'unlimited' if soft == resource.RLIM_INFINITY else human_size(soft)}: raise it "
                "(LimitMEMLOCK=infinity in a unit), or set pool.lock_memory to false"
            ) from None

    def _listeners(
        self, config: Config, made: contextlib.AsyncExitStack
    ) -> tuple[str, list[socket.socket]]:
        try:
            passed = self._manager.take_sockets()
        except ValueError as error:
            raise ServiceError(f"LISTEN_FDS: {error}") from None
        if passed:
            # They are the service manager's: it keeps listening when we are gone.
            return ", ".join(str(sock.getsockname()) for sock in passed), passed
        listener = Listener.open(
            config.socket_path(self._host),
            mode=int(config.server.socket_mode),
            group=config.server.socket_group,
        )
        made.callback(listener.close)
        return listener.path, [listener.socket]

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.close()

    # What the service manager shows

    async def _tell_status(self) -> None:
        told = ""
        while True:
            line = self._headline()
            if line != told:
                told = line
                self._manager.tell(STATUS=line)
            await asyncio.sleep(_STATUS_S)

    def _headline(self) -> str:
        with self._shard.driver.lock:
            snapshot = self._shard.engine.snapshot()
        return (
            f"{snapshot.slots.allocated:,} pages of {self._shard.server.clients} clients, "
            f"{human_size(snapshot.saved_bytes)} saved"
        )

    # What steering asks

    def facts(self, config: Config) -> status.Facts:
        """See steering.Surroundings."""
        return status.Facts(
            version=__version__,
            state="stopping" if self._stopping.is_set() else "running",
            pid=os.getpid(),
            uptime_s=time.monotonic() - self._started,
            clients=self._shard.server.clients,
            shrinker_errors=self._shard.shrinker.errors,
            settings=config.flat(),
        )

    def configure(self, config: Config) -> None:
        """See steering.Surroundings."""
        keys = config.metrics
        if self._metrics is None and (keys.listen or keys.textfile):
            # Only now: it brings a library of 3 MB.
            from vswapd.metrics import Exporter

            self._metrics = Exporter(self._document)
        if self._metrics is not None:
            self._metrics.apply(keys.listen, keys.textfile)
        journal.set_up(config.log.level)

    def _document(self) -> dict[str, Any]:
        """The status document, for threads."""
        document = self._shard.driver.run(self._shard.steering.status())
        assert document is not None
        return document

    # SIGHUP

    def _hang_up(self) -> None:
        self._shard.server.spawn(self._reload())

    async def _reload(self) -> None:
        self._manager.reloading()
        try:
            done = await self._shard.drive(self._shard.steering.reload())
        except (ConfigError, EngineError) as error:
            _LOG.error("reload: nothing was changed: %s", error)
        else:
            _LOG.info("reload: changed %s", ", ".join(done.changed) or "nothing")
            if done.ignored:
                _LOG.warning("reload: needs a restart to take effect: %s", ", ".join(done.ignored))
        finally:
            self._manager.tell(READY="1", STATUS=self._headline())


def _raise_descriptors(connections: int) -> None:
    """Allow as many descriptors as the connections need, or say that they cannot be had."""
    wanted = connections + _OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
        if soft < wanted:
            _LOG.warning(
                "server.max_connections = %d needs more descriptors than the %d of RLIMIT_NOFILE",
                connections,
                soft,
            )


def serve(config: Config, source: Path | None, overrides: tuple[str, ...]) -> None:
    """Run a daemon until it is told to stop.

    Raises:
        ListenError, ServiceError, ConfigError: it could not start; the text says why.
    """

    async def main() -> None:
        await Service(config, source, overrides).run()

    try:
        asyncio.run(main())
    except OutOfServiceError as error:
        raise ServiceError(str(error)) from None
