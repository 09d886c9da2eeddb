"""The verbs of vswapctl, on the daemon's side: checked arguments, engine calls, answers.

Invariants:
- A verb that fails has changed nothing, or says what it has changed.
- Opening, draining and closing a device never blocks the event loop.

This module must not know the wire, or concrete devices: it is given a way to open one.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from vswapd import status
from vswapd.config import Config, ConfigError, reloadable
from vswapd.config_schema import Device, Size
from vswapd.driver import Driver, Pending, T
from vswapd.errors import ArgumentError, OutOfServiceError
from vswapd.host import Host
from vswapd.sizes import UnitError, parse_size
from vswapd.snapshot import Snapshot
from vswapd.vswap import Engine
from vswapd_backends.base import Operation
from vswapd_blockdev.device import BlockDevice, OpenError

_LOG: Final = logging.getLogger(__name__)
OpenDevice = Callable[[Device], BlockDevice]
"""Opens what a configuration entry describes; raises OpenError."""


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a reload changed, and what it could not."""

    changed: tuple[str, ...]
    ignored: tuple[str, ...]


class Service(Protocol):
    """What the verbs need of the rest of the service."""

    @property
    def version(self) -> str:
        """The daemon's version."""

    def facts(self) -> status.Facts:
        """What the engine does not know."""

    def configure(self, config: Config) -> None:
        """Put another configuration into force; raises ConfigError or ArgumentError."""

    async def reload(self) -> Reloaded:
        """Read the configuration file again; raises ConfigError."""


class Steering:
    """Carries verbs out."""

    def __init__(
        self,
        *,
        engine: Engine,
        driver: Driver,
        service: Service,
        host: Host,
        config: Config,
        open_device: OpenDevice,
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._driver = driver
        self._service = service
        self._host = host
        self.config = config
        self._open_device = open_device
        self._clock = clock
        self.devices: Final[dict[str, BlockDevice]] = {}
        """By path: to be closed after swapoff, and at the end."""
        self.version: Final = service.version
        self._verbs: Final[Mapping[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]]] = {
            "set": self._set,
            "swapon": self._swapon,
            "swapoff": self._swapoff,
            "writeback": self._writeback,
            "compact": self._compact,
            "verify": self._verify,
            "spaces": self._spaces,
            "reload": self._reload,
        }

    # What a session asks

    def status(self) -> dict[str, Any]:
        """The status document."""
        with self._driver.lock:
            snapshot = self._engine.snapshot()
        return status.document(snapshot, self._service.facts())

    def may_steer(self, uid: int) -> bool:
        """Root, and whoever the daemon runs as."""
        return uid in {0, self._host.uid}

    async def carry_out(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a CONTROL request asks for.

        Raises:
            ArgumentError, OutOfServiceError: with what to do about it.
        """
        arguments = dict(request)
        verb = arguments.pop("verb", None)
        if verb not in self._verbs:
            raise ArgumentError(f"there is no verb {verb!r}; there are {', '.join(self._verbs)}")
        answer = await self._verbs[verb](arguments)
        _LOG.info("%s %s", verb, " ".join(f"{k}={v}" for k, v in arguments.items()) or "done")
        return answer

    async def _run(self, operation: Operation[T]) -> T:
        result = self._driver.start(operation)
        return await self._driver.finish(result) if isinstance(result, Pending) else result

    # Verbs

    async def _set(self, arguments: dict[str, Any]) -> dict[str, Any]:
        key, value = _take(arguments, "key", str), _take(arguments, "value", str)
        _nothing_else(arguments)
        try:
            old = self.config.flat().get(key, "")
            config = self.config.with_override(key, value)
            if not reloadable(key):
                raise ArgumentError(f"{key} cannot be changed while the daemon runs")
            self._service.configure(config)
        except ConfigError as error:
            raise ArgumentError(str(error)) from None
        return {"key": key, "old": old, "new": self.config.get(key)}

    async def _swapon(self, arguments: dict[str, Any]) -> dict[str, Any]:
        path = _absolute(_take(arguments, "path", str))
        size = arguments.pop("size", None)
        priority = arguments.pop("priority", None)
        encrypt = arguments.pop("encrypt", None)
        _nothing_else(arguments)
        try:
            device = Device(
                path=path,
                size=None if size is None else Size(_size(size)),
                priority=0 if priority is None else int(priority),
                encrypt=True if encrypt is None else bool(encrypt),
            )
        except (TypeError, ValueError) as error:
            raise ArgumentError(str(error)) from None
        return await self.swapon(device)

    async def swapon(self, entry: Device) -> dict[str, Any]:
        """Open a device and put it into use.

        Raises:
            OutOfServiceError: it cannot be opened, or is in use already.
        """
        if entry.path in self.devices:
            raise OutOfServiceError(f"{entry.path}: in use already")
        try:
            device = await asyncio.to_thread(self._open_device, entry)
        except OpenError as error:
            raise OutOfServiceError(str(error)) from None
        try:
            with self._driver.lock:
                self._engine.swapon(device, entry.priority)
        except BaseException:
            device.close()
            raise
        self.devices[entry.path] = device
        found = next(d for d in self._snapshot().devices if d.path == device.path)
        if not device.direct:
            _LOG.warning("%s: no O_DIRECT here, its pages go through the page cache", entry.path)
        return {"path": entry.path, "size_bytes": found.size_bytes, "priority": found.priority}

    async def _swapoff(self, arguments: dict[str, Any]) -> dict[str, Any]:
        path = _absolute(_take(arguments, "path", str))
        _nothing_else(arguments)
        moved = await self._run(self._engine.swapoff(path))
        device = self.devices.pop(path)
        await asyncio.to_thread(device.close)
        return {"path": path, "moved_pages": moved}

    async def _writeback(self, arguments: dict[str, Any]) -> dict[str, Any]:
        nbytes = _size(_take(arguments, "bytes", (int, str)))
        _nothing_else(arguments)
        written = await self._run(self._engine.writeback(nbytes))
        return {
            "bytes": written.bytes,
            "pages": written.pages,
            "stopped": None if written.stopped is None else written.stopped.value,
        }

    async def _compact(self, arguments: dict[str, Any]) -> dict[str, Any]:
        _nothing_else(arguments)
        done = await self._run(self._engine.compact())
        return {"moved_bytes": done.moved_bytes, "freed_bytes": done.freed_bytes}

    async def _verify(self, arguments: dict[str, Any]) -> dict[str, Any]:
        _nothing_else(arguments)
        report = await self._run(self._engine.verify())
        for problem in report.problems:
            _LOG.error("verify: %s", problem)
        return {
            "ok": report.ok,
            "problems": report.problems,
            "slots": report.slots,
            "entries": report.entries,
            "checked_bytes": report.checked_bytes,
        }

    async def _spaces(self, arguments: dict[str, Any]) -> dict[str, Any]:
        _nothing_else(arguments)
        return status.spaces(self._snapshot(), self._clock())

    async def _reload(self, arguments: dict[str, Any]) -> dict[str, Any]:
        _nothing_else(arguments)
        try:
            done = await self._service.reload()
        except ConfigError as error:
            raise ArgumentError(str(error)) from None
        return {"changed": list(done.changed), "ignored": list(done.ignored)}

    def _snapshot(self) -> Snapshot:
        with self._driver.lock:
            return self._engine.snapshot()


def _take(arguments: dict[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    if name not in arguments:
        raise ArgumentError(f"{name} is missing")
    value = arguments.pop(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ArgumentError(f"{name}: {value!r} is not of the kind that is wanted")
    return value


def _nothing_else(arguments: dict[str, Any]) -> None:
    if arguments:
        raise ArgumentError(f"unknown argument {next(iter(arguments))}")


def _absolute(path: str) -> str:
    """The daemon's working directory is not the caller's."""
    if not path.startswith("/"):
        raise ArgumentError(f"{path}: give an absolute path, the daemon runs elsewhere")
    return os.path.normpath(path)


def _size(value: int | str) -> int:
    if isinstance(value, int):
        if value <= 0:
            raise ArgumentError(f"{value} is no number of bytes")
        return value
    try:
        return parse_size(value)
    except UnitError as error:
        raise ArgumentError(str(error)) from None
