"""The service: everything wired together, from the configuration to the last close.

This is the one module that names concrete devices, and that knows all the others.

Invariants:
- Devices are opened, and locked, by the process that the service manager knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

from vswapd import status
from vswapd.config import Config
from vswapd.config_schema import Device
from vswapd.control import Origin
from vswapd.errors import OutOfServiceError
from vswapd.front import Front, ServiceError, Tally, cannot_lock, open_sockets
from vswapd.host import Host
from vswapd.ledger import shared_region
from vswapd.memory import ShardMemory
from vswapd.messages import Attach
from vswapd.notify import ServiceManager
from vswapd.shard import Shard
from vswapd.shard_process import Birth
from vswapd.sizes import human_size
from vswapd.steering import Opened, Reloaded
from vswapd.supervisor import Child, Supervisor, fork_shards
from vswapd.vswap import shape_for
from vswapd.watchdog import Watchdog
from vswapd_blockdev import opening
from vswapd_blockdev.opening import open_swap_device
from vswapd_blockdev.sealed import SealedDevice, new_key
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
        return _sealed(entry, device, self._boot_id)

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
            raise ServiceError(cannot_lock(error)) from None

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


class _Locked:
    """A device that the supervisor keeps open and locked, for its shards to use."""

    def __init__(self, entry: Device, boot_id: bytes) -> None:
        self._entry = entry
        self._boot_id = boot_id
        self._opened = open_swap_device(
            entry.path,
            size=None if entry.size is None else int(entry.size),
            boot_id=boot_id,
            encrypted=entry.encrypt,
        )

    def attach(self) -> tuple[Attach, int]:
        """See supervisor.LockedDevice."""
        opened = self._opened
        return (
            Attach(self._entry, opened.extents, opened.direct, opened.block_device, self._boot_id),
            opened.fd,
        )

    def close(self) -> None:
        """See supervisor.LockedDevice."""
        os.close(self._opened.fd)


def _adopt_device(attach: Attach, fd: int, key: bytes | None) -> Opened:
    """A shard's own device on a descriptor that it was given, with a key of its own.

    Args:
        attach: the device.
        fd: owned from now on.
        key: what an earlier process of the shard has encrypted with; None: a new one is made.
    """
    entry = attach.entry
    opened = opening.Opened(
        fd=fd, extents=attach.extents, direct=attach.direct, block_device=attach.block_device
    )
    return _sealed(entry, SwapFile(entry.path, opened), attach.boot_id, key)


def _sealed(entry: Device, file: SwapFile, boot_id: bytes, key: bytes | None = None) -> Opened:
    """A device as the engine has it, with a new key if it is to be encrypted and has none."""
    if key is None:
        key = new_key() if entry.encrypt else b""
    device = SealedDevice(file, key) if entry.encrypt else file
    return Opened(device, file.discards, Origin(boot_id=boot_id, key=key))


def serve(config: Config, source: Path | None, overrides: tuple[str, ...]) -> None:
    """Run a daemon until it is told to stop.

    Raises:
        ListenError, ServiceError, ConfigError: it could not start, or go on; the text says why.
    """
    host, manager = Host.here(), ServiceManager()
    config.settings(host)  # what is wrong with it is found before anything is made
    shards = config.shards(host)
    sockets = open_sockets(config, host, manager)
    births: list[Birth] = []
    children: list[Child] = []
    if shards > 1:
        ledger = shared_region(shards)
        settings = config.settings(host).of_one(shards)
        births = [
            Birth(
                index=index,
                ledger=ledger,
                config=config,
                host=host,
                source=source,
                overrides=overrides,
                watchdog_s=manager.watchdog_s,
                adopt_device=_adopt_device,
                memory=ShardMemory.create(shape_for(settings, index)),
            )
            for index in range(shards)
        ]
        children = fork_shards(births, [sock.fileno() for sock in sockets.listeners])

    async def main() -> None:
        front = Front(config, sockets, manager)
        if births:
            boot_id = secrets.token_bytes(16)
            front.body = Supervisor(front, births, children, lambda entry: _Locked(entry, boot_id))
        else:
            front.body = OneShard(front, config, host, source, overrides)
        await front.run()

    try:
        asyncio.run(main())
    except OutOfServiceError as error:
        raise ServiceError(str(error)) from None
