"""A shard in a process of its own, behind a channel to its supervisor.

Invariants:
- It ends when it is told to, or when the supervisor has gone: it never outlives it.
- What operators ask of it is asked of the supervisor, who asks all shards.

This module must not know other shards, signals, or the service manager.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from vswapd import __version__, causes, journal, status
from vswapd.beside import beside
from vswapd.channel import Channel, ChannelClosedError
from vswapd.claims import Claim, Connected, Known, Verdict
from vswapd.config import Config
from vswapd.config_schema import Device
from vswapd.control import KeptDevice
from vswapd.driver import Elsewhere, Task
from vswapd.errors import OutOfServiceError, StoppingError
from vswapd.front import ServiceError
from vswapd.host import Host
from vswapd.keeping import KeepingError, claim
from vswapd.ledger import Column, Ledger
from vswapd.memory import ShardMemory
from vswapd.messages import (
    Adopt,
    AskStatus,
    Attach,
    Beat,
    Carry,
    Failed,
    Hungry,
    Inherit,
    Leave,
    Operate,
    Parted,
    Ready,
    Seek,
    Serve,
    ShardState,
    Stop,
    Tell,
)
from vswapd.own_memory import own_bytes
from vswapd.recovery import RecoveryError
from vswapd.shard import Kept, Shard, clock
from vswapd.steering import Opened
from vswapd.watchdog import Watchdog
from vswapd_backends.label import ForeignMemoryError
from vswapd_backends.shared import SharedRegion
from vswapd_backends.shared_extents import SharedExtents, adopt_owners_region
from vswapd_blockdev.extents import ExtentMap

_LOG: Final = logging.getLogger(__name__)
_HUNGRY_S: Final = 0.02
"""Others are told that the pool is nearly full at most every so many seconds: soon enough for them
to give their share of what one shard stores meanwhile, before it has to make room by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Birth:
    """What a shard's process is made with."""

    index: int
    ledger: SharedRegion
    config: Config
    host: Host
    source: Path | None
    overrides: tuple[str, ...]
    watchdog_s: float | None
    adopt_device: Callable[[Attach, int, bytes | None], Opened]
    """Makes a device of a descriptor, with a key; None: with a new one."""
    memory: ShardMemory
    """What outlives the process. The supervisor has it, too."""
    revived: bool = False
    """Whether an earlier process has left something in it."""
    kept: bool = False
    """Whether the memory outlives the supervisor, too."""
    locks: bool = False
    """Whether it is to be locked into RAM."""
    devices: tuple[InUse, ...] = ()
    """Those in use, for a process that comes after another."""


@dataclass(frozen=True, slots=True)
class InUse:
    """A device as a new process inherits it from the supervisor."""

    attach: Attach
    fd: int
    owners_fd: int


class _Operators:
    """What sessions ask of the daemon as a whole: the supervisor answers it."""

    version = __version__

    def __init__(self, channel: Channel, host: Host) -> None:
        self._channel = channel
        self._host = host

    def status(self) -> Task[dict[str, Any]]:
        """See session.Steering."""
        return self._ask(AskStatus())

    def may_steer(self, uid: int) -> bool:
        """See session.Steering."""
        return uid in {0, self._host.uid}

    def carry_out(self, request: dict[str, Any]) -> Task[dict[str, Any]]:
        """See session.Steering."""
        return self._ask(Operate(request))

    def _ask(self, message: object) -> Task[dict[str, Any]]:
        answer: dict[str, Any] = yield from _ask(self._channel, message)
        return answer


class _Judge:
    """Who may have which space: the supervisor knows. See seats.Judge."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def claim(self, claim: Claim) -> Task[Verdict]:
        """See seats.Judge."""
        if not claim.joins and not claim.named:
            # Nobody else can know of it: there is nothing to wait for. A lane on another shard may
            # be heard of first; then all shards are asked, and this one knows.
            self._channel.tell(Seek(claim))
            return Verdict.GRANTED
        try:
            verdict: Verdict = yield from _ask(self._channel, Seek(claim))
        except OutOfServiceError as error:
            # Whoever comes back is to try again: it says nothing about the space.
            raise StoppingError(str(error)) from None
        return verdict

    def leave(self, claim: Claim) -> None:
        """See seats.Judge."""
        self._channel.tell(Leave(claim.key, claim.number))


def _ask(channel: Channel, message: object) -> Task[Any]:
    """Ask the supervisor, in the middle of a request.

    Raises:
        OutOfServiceError: it is ending, or whatever it says.
    """
    asked: list[asyncio.Task[Any]] = []

    def begin(done: Callable[[], None]) -> None:
        task = asyncio.get_running_loop().create_task(channel.ask(message))
        task.add_done_callback(lambda _: done())
        asked.append(task)

    yield Elsewhere(begin)
    try:
        return asked[0].result()
    except ChannelClosedError:
        raise OutOfServiceError("the daemon is ending: ask again when it is back") from None


class ShardProcess:
    """See the module. Made inside a running event loop."""

    def __init__(self, birth: Birth, sock: socket.socket) -> None:
        self._birth = birth
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._ready = asyncio.Event()
        self._hungry_at = 0.0
        self._changing = asyncio.Lock()
        """Configurations and devices change one after the other, in the order of the messages."""
        self._newest: Adopt | None = None
        """The last configuration that was to be adopted."""
        self._own_bytes = 0
        self._channel = Channel(sock, self._handle, self._stopping.set)
        self._shard: Shard

    def _make(self) -> None:
        """Make the shard, over the memory that an earlier process may have left."""
        birth = self._birth
        claim(birth.memory)
        self._shard = Shard(
            config=birth.config,
            host=birth.host,
            source=birth.source,
            overrides=birth.overrides,
            surroundings=self,
            open_device=self._open_device,
            ledger=Ledger(birth.ledger, birth.index),
            operators=_Operators(self._channel, birth.host),
            judge=_Judge(self._channel),
            kept=Kept(birth.memory, self._reopen if birth.revived else None, birth.kept),
        )
        for used in birth.devices:
            # What was taken up has its own by now. A device's lock lasts until all are closed.
            os.close(used.fd)
            os.close(used.owners_fd)
        self._shard.engine.on_pressure = self._pressure

    async def run(self) -> None:
        """Serve until told to stop.

        Raises:
            ServiceError: it cannot start; the supervisor has been told why.
        """
        with contextlib.closing(self._channel):
            try:
                await self._run()
            except Exception as error:
                known = isinstance(error, (ServiceError, RecoveryError, KeepingError))
                if self._ready.is_set() or not (known or causes.is_systems(error)):
                    raise
                why = str(error) if known else causes.explained(error)
                with contextlib.suppress(ChannelClosedError):
                    await self._channel.ask(Failed(why))
                raise ServiceError(why) from None

    async def _run(self) -> None:
        async with contextlib.AsyncExitStack() as made:
            self._make()
            if self._birth.locks:
                self._lock_memory()
            await self._shard.start(made)
            # What the supervisor wants goes on as long as there are connections, and no longer.
            made.push_async_callback(self._channel.end)
            self._shard.serve(made)
            if self._birth.watchdog_s is not None:
                watchdog = Watchdog(
                    self._shard.driver, self._shard.shrinker, lambda: self._channel.tell(Beat())
                )
                beside(made, watchdog.run(self._birth.watchdog_s))
            self._own_bytes = own_bytes()
            self._ready.set()
            self._channel.tell(Ready())
            await self._stopping.wait()

    def _lock_memory(self) -> None:
        """As the supervisor could: not to be able to is news, and no reason to lose pages for."""
        try:
            self._shard.engine.lock_memory()
        except OSError as error:
            _LOG.error("shard %d goes on without a lock: %s", self._birth.index, error.strerror)

    async def _handle(self, message: Any, descriptors: list[int]) -> Any:
        await self._ready.wait()
        shard = self._shard
        match message:
            case Serve(place):
                # What it says later may be something else: what was counted is what is taken off.
                gone = partial(self._channel.tell, Parted(place))
                if descriptors:
                    shard.server.welcome(socket.socket(fileno=descriptors[0]), gone)
                else:
                    gone()  # it was lost on the way
            case Tell():
                return self._state()
            case Carry(request):
                return await self._carry(request)
            case Connected() | Known() | Inherit():
                return await self._about_spaces(message)
            case Adopt():
                await self._adopt_config(message)
            case Attach():
                async with self._changing:
                    self._attach(message, *descriptors)
            case Hungry():
                shard.shrinker.poke()
            case Stop():
                self._stopping.set()
            case _:
                raise TypeError(message)
        return None

    async def _about_spaces(self, message: Connected | Known | Inherit) -> bool:
        shard = self._shard
        if isinstance(message, Connected):
            return await shard.drive(shard.seats.connected(message))
        with shard.driver.lock:
            if isinstance(message, Known):
                return shard.engine.is_known(message.key, message.token)
            shard.engine.bequeath(message.key, message.holder)
            return True

    async def _carry(self, request: dict[str, Any]) -> dict[str, Any]:
        turn = self._changing if request["verb"] == "swapoff" else contextlib.nullcontext()
        async with turn:
            return await self._shard.drive(self._shard.steering.answer(request))

    async def _adopt_config(self, message: Adopt) -> None:
        """Put a configuration into force, unless there is another one by now.

        This process may have been stopped when it came: whoever waited for it has given up, and
        what a later message takes back is not put into force at all.
        """
        self._newest = message
        await asyncio.sleep(0)  # all that has arrived with it is known then
        async with self._changing:
            if self._newest is message:
                steering = self._shard.steering
                await self._shard.drive(
                    steering.configure(lambda _: message.config, lambda _: message.run_time)
                )

    def _state(self) -> ShardState:
        with self._shard.driver.lock:
            snapshot = self._shard.engine.snapshot()
        return ShardState(
            snapshot=snapshot,
            clients=self._shard.server.clients,
            shrinker_errors=self._shard.shrinker.errors,
            discards={
                path: opened.discards for path, opened in self._shard.steering.devices.items()
            },
            now=clock(),
            own_bytes=self._own_bytes,
        )

    def _attach(self, message: Attach, device_fd: int, owners_fd: int) -> None:
        if message.entry.path in self._shard.steering.devices:
            os.close(device_fd)
            with self._shard.driver.lock:
                # Whichever descriptor of a file is closed, the process holds no record of it any
                # more: not while the shrinker takes a chunk.
                os.close(owners_fd)
            return
        opened, extents = self._adopt(message, device_fd, owners_fd, None)
        try:
            with self._shard.driver.lock:
                self._shard.engine.swapon(
                    opened.device, message.entry.priority, extents, opened.origin
                )
        except BaseException:
            opened.device.close()
            raise
        self._shard.steering.devices[message.entry.path] = opened

    def _adopt(
        self, message: Attach, device_fd: int, owners_fd: int, key: bytes | None
    ) -> tuple[Opened, SharedExtents]:
        """A device and this shard's part of it, of descriptors that are owned from now on."""
        shards = Ledger(self._birth.ledger, self._birth.index).shards
        try:
            owners = adopt_owners_region(message.extents, shards, owners_fd)
        except ForeignMemoryError:
            os.close(owners_fd)
            os.close(device_fd)
            raise
        except BaseException:
            os.close(device_fd)
            raise
        opened = self._birth.adopt_device(message, device_fd, key)
        return opened, SharedExtents(message.extents, owners, self._birth.index, shards)

    def _reopen(self, kept: KeptDevice) -> tuple[Opened, ExtentMap | None] | None:
        """See shard.Reopen."""
        for used in self._birth.devices:
            same = used.attach.boot_id == kept.origin.boot_id
            if used.attach.entry.path == kept.path and same:
                return self._adopt(
                    used.attach, os.dup(used.fd), os.dup(used.owners_fd), kept.origin.key
                )
        return None

    def _pressure(self) -> None:
        """There is something for the shrinker to do; perhaps for those of other shards too."""
        self._shard.shrinker.poke()
        core = self._shard.engine.core
        if core.ledger.others(Column.POOL) and core.pool_use() > (
            core.settings.high_watermark * core.pressure.limit
        ):
            now = clock()
            if now - self._hungry_at > _HUNGRY_S:
                self._hungry_at = now
                self._loop.call_soon_threadsafe(self._channel.tell, Hungry())

    # What steering wants

    def facts(self, config: Config) -> status.Facts:
        """Nobody asks a shard for the document."""
        raise NotImplementedError

    def configure(self, config: Config) -> None:
        """See steering.Surroundings. Metrics are the supervisor's."""
        journal.set_up(config.log.level)

    def was_read(self, read: Config | str) -> None:
        """Files are read by the supervisor."""
        raise NotImplementedError

    def _open_device(self, entry: Device) -> Opened:
        raise OutOfServiceError(f"{entry.path}: devices are opened by the supervisor")


def run(birth: Birth, sock: socket.socket) -> int:
    """A shard's whole life, in its own process; returns its exit code."""

    async def main() -> None:
        await ShardProcess(birth, sock).run()

    journal.begin()
    try:
        asyncio.run(main())
    except ServiceError:
        return ServiceError.exit_code  # the supervisor says it
    except (OSError, MemoryError, RuntimeError) as error:
        if not causes.is_systems(error):
            raise
        # It has failed when it was to end: what it holds is what it has to be, as after a kill.
        _LOG.warning("shard %d ends without order: %s", birth.index, causes.explained(error))
        return ServiceError.exit_code
    return 0
