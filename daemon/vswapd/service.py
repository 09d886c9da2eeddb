"""The service: everything wired together, from the configuration to the last close.

This is the one module that names concrete devices, and that knows all the others.

Invariants:
- Devices are opened, and locked, by the process that the service manager knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import secrets
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

from vswapd import status
from vswapd.config import Config
from vswapd.config_schema import Device
from vswapd.errors import OutOfServiceError
from vswapd.front import Front, ServiceError, Tally, open_sockets
from vswapd.host import Host
from vswapd.notify import ServiceManager
from vswapd.shard import Shard
from vswapd.sizes import human_size
from vswapd.steering import Opened, Reloaded
from vswapd.watchdog import Watchdog
from vswapd_blockdev.sealed import SealedDevice
from vswapd_blockdev.swapfile import SwapFile

_LOG: Final = logging.getLogger(__name__)
__all__ = ["ServiceError", "serve"]


class OneShard:
    """A daemon's body that is one shard, in the daemon's own process."""

    def __init__(
        self,
        front: Front,
        config: Config,
        host: Host,
        source: Path | None,
        overrides: tuple[str, ...],
    ) -> None:
        self._front = front
        self._boot_id = secrets.token_bytes(16)
        self._shard = Shard(
            config=config,
            host=host,
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

    # What the front wants

    async def start(self, made: contextlib.AsyncExitStack) -> None:
        """See front.Body."""
        shard = self._shard
        config = shard.steering.config
        if config.pool.lock_memory:
            self._lock_memory()
        await shard.start(made)
        for entry in config.devices:
            opened = await shard.drive(shard.steering.swapon(entry))
            size = human_size(opened["size_bytes"])
            _LOG.info("%s: %s, priority %d", opened["path"], size, opened["priority"])

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

    def listen(self, listeners: list[socket.socket], made: contextlib.AsyncExitStack) -> None:
        """See front.Body."""
        self._shard.serve(made)
        for listener in listeners:
            self._shard.server.listen(listener)

    def watch(self, period_s: float, tell: Callable[[], None]) -> Coroutine[Any, Any, None]:
        """See front.Body."""
        return Watchdog(self._shard.driver, self._shard.shrinker, tell).run(period_s)

    async def document(self) -> dict[str, Any]:
        """See front.Body."""
        return await self._shard.drive(self._shard.steering.status())

    async def tally(self) -> Tally:
        """See front.Body."""
        with self._shard.driver.lock:
            snapshot = self._shard.engine.snapshot()
        return Tally(snapshot.slots.allocated, self._shard.server.clients, snapshot.saved_bytes)

    async def reload(self) -> Reloaded:
        """See front.Body."""
        return await self._shard.drive(self._shard.steering.reload())

    # What steering wants

    def facts(self, config: Config) -> status.Facts:
        """See steering.Surroundings."""
        return self._front.facts(
            config,
            clients=self._shard.server.clients,
            shrinker_errors=self._shard.shrinker.errors,
        )

    def configure(self, config: Config) -> None:
        """See steering.Surroundings."""
        self._front.configure(config)


def serve(config: Config, source: Path | None, overrides: tuple[str, ...]) -> None:
    """Run a daemon until it is told to stop.

    Raises:
        ListenError, ServiceError, ConfigError: it could not start; the text says why.
    """
    host, manager = Host.here(), ServiceManager()
    config.settings(host)  # what is wrong with it is found before anything is made
    sockets = open_sockets(config, host, manager)

    async def main() -> None:
        front = Front(config, sockets, manager)
        front.body = OneShard(front, config, host, source, overrides)
        await front.run()

    try:
        asyncio.run(main())
    except OutOfServiceError as error:
        raise ServiceError(str(error)) from None
